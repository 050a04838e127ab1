"""The GPU kernels themselves, in Triton, which comes with torch's builds for CUDA; `gpu.py` starts them.

Legend of shapes: T tokens of one step, H heads, K kv heads, D head size, B tokens of a block, P parts of a sequence's
keys. Everything that a row's result is summed from is summed in an order that follows from the row's own position: keys
in blocks of BLOCK_N, parts of PART keys, whoever else is in the step (promise 3).
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def add_norm(
    residual,
    added,
    weight,
    bias,
    out,
    width,
    epsilon,
    offset,
    has_added: tl.constexpr,
    is_layer_norm: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a row: residual += added; out = norm(residual) [T, width]."""
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(residual + start + columns, mask=inside, other=0.0)
    if has_added:
        more = tl.load(added + start + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)
        tl.store(residual + start + columns, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if is_layer_norm:
        mean = tl.sum(wide, 0) / width
        centred = tl.where(inside, wide - mean, 0.0)
        variance = tl.sum(centred * centred, 0) / width
        shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        normed = centred / tl.sqrt(variance + epsilon) * scale + shift
    else:
        normed = wide / tl.sqrt(tl.sum(wide * wide, 0) / width + epsilon) * (scale + offset)
    tl.store(out + start + columns, normed.to(x.dtype), mask=inside)


@triton.jit
def activate(x, out, width, is_gated: tl.constexpr, is_silu: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """A program for BLOCK columns of a row: out = activation(gate) * up of x = (gate, up)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    own = x + row * width * (2 if is_gated else 1) + columns
    raw = tl.load(own, mask=inside, other=0.0)
    gate = raw.to(tl.float32)
    if is_silu:
        active = gate * tl.sigmoid(gate)
    else:  # gelu with tanh, which is 2 * sigmoid(2z) - 1
        active = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    if is_gated:
        active = active * tl.load(own + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, active.to(raw.dtype), mask=inside)


@triton.jit
def prepare_heads(
    qkv,
    query_norm,
    key_norm,
    cosines,
    sines,
    positions,
    slots,
    queries,
    keys,
    values,
    epsilon,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    rotated: tl.constexpr,
    has_norms: tl.constexpr,
    B: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """A program for a few heads of one token: normalised, rotated, and put where they belong."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    half: tl.constexpr = rotated // 2
    other_column = tl.where(columns < half, columns + half, columns - half)
    turning = columns < rotated
    if rotated > 0:
        turn = tl.load(positions + token).to(tl.int64) * rotated + columns
        cosine = tl.load(cosines + turn, mask=turning, other=1.0)
        sine = tl.load(sines + turn, mask=turning, other=0.0)
    slot = tl.load(slots + token)
    for number in tl.static_range(AT_ONCE):
        head = tl.program_id(1) * AT_ONCE + number
        if head < heads + 2 * kv_heads:
            own = qkv + (token * (heads + 2 * kv_heads) + head) * size
            x = tl.load(own + columns, mask=inside, other=0.0)
            dtype = x.dtype
            if head < heads + kv_heads:
                other = tl.load(own + other_column, mask=turning, other=0.0)
                if has_norms:
                    wide = x.to(tl.float32)
                    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + epsilon)
                    weight = query_norm if head < heads else key_norm
                    own_weight = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
                    other_weight = tl.load(weight + other_column, mask=turning, other=0.0).to(tl.float32)
                    # Rounded twice, as models do it.
                    x = ((wide * factor).to(dtype).to(tl.float32) * own_weight).to(dtype)
                    other = ((other.to(tl.float32) * factor).to(dtype).to(tl.float32) * other_weight).to(dtype)
                if rotated > 0:
                    signed = tl.where(columns < half, -other.to(tl.float32), other.to(tl.float32))
                    x = (x.to(tl.float32) * cosine + signed * sine).to(dtype)
            if head < heads:
                tl.store(queries + (token * heads + head) * size + columns, x, mask=inside)
            else:
                is_key = head < heads + kv_heads
                kv_head = head - heads if is_key else head - heads - kv_heads
                place = ((slot // B * kv_heads + kv_head) * B + slot % B) * size + columns
                tl.store((keys if is_key else values) + place, x, mask=inside)


@triton.jit
def masked_scores(
    q,
    k,
    key,
    inside,
    own_position,
    scale,
    window: tl.constexpr,
    softcap: tl.constexpr,
    precision: tl.constexpr,
):
    """Return scores of base 2 [BLOCK_M, BLOCK_N], minus infinity for keys that a row does not see."""
    score = tl.dot(q, tl.trans(k), input_precision=precision) * scale
    if softcap > 0:
        score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
    visible = (key[None, :] <= own_position[:, None]) & inside[None, :]
    if window > 0:
        visible = visible & (key[None, :] > own_position[:, None] - window)
    return tl.where(visible, score * LOG2_E, float("-inf"))


@triton.jit
def attend_keys(
    q,
    keys,
    values,
    table,
    own_position,
    start,
    end,
    kv_head,
    scale,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    window: tl.constexpr,
    softcap: tl.constexpr,
    B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    precision: tl.constexpr,
):
    """Return each row's largest score, sum of weights, and weighted sum of values over the keys from start to end."""
    columns = tl.arange(0, BLOCK_D)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        inside = key < end
        block = tl.load(table + key // B, mask=inside, other=0).to(tl.int64)
        offset = ((block * kv_heads + kv_head) * B + key % B) * size
        read = inside[:, None] & (columns < size)[None, :]
        k = tl.load(keys + offset[:, None] + columns[None, :], mask=read, other=0.0)
        v = tl.load(values + offset[:, None] + columns[None, :], mask=read, other=0.0)
        score = masked_scores(q, k, key, inside, own_position, scale, window, softcap, precision)
        now = tl.maximum(highest, tl.max(score, 1))
        finite = tl.where(now == float("-inf"), 0.0, now)
        kept = tl.exp2(highest - finite)
        weight = tl.exp2(score - finite[:, None])
        total = total * kept + tl.sum(weight, 1)
        mixed = mixed * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=precision)
        highest = now
    return highest, total, mixed


@triton.jit
def attend_part(
    queries,
    keys,
    values,
    tables,
    tiles,
    sums,
    weights,
    out,
    table_width,
    first_row,
    parts,
    scale,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    window: tl.constexpr,
    softcap: tl.constexpr,
    is_whole: tl.constexpr,
    B: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """A program for one tile (some tokens of a sequence, all query heads of one kv head) and PART of its keys.

    Writes `sums` [T, H, P, D], not yet divided, and `weights` [T, H, P, 2]: the largest score, and the sum of weights.
    Where no sequence has more than one part (`is_whole`) it writes `out` [T, H, D] instead.
    """
    group: tl.constexpr = heads // kv_heads
    tile = tiles + tl.program_id(0) * 4  # its first row, its tokens, the first one's position, its sequence
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    row = tl.load(tile).to(tl.int64)
    count = tl.load(tile + 1)
    position = tl.load(tile + 2)
    table = tables + tl.load(tile + 3).to(tl.int64) * table_width
    start = part * PART
    end = tl.minimum(start + PART, position + count)
    if window > 0:  # blocks of keys that no token of the tile sees are passed over: they would change nothing
        start = tl.maximum(start, tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N)
    if start >= end:
        return
    m = tl.arange(0, BLOCK_M)
    token = m // group
    head = kv_head * group + m % group
    columns = tl.arange(0, BLOCK_D)
    is_real = (token < count) & (token < BLOCK_M // group)
    wanted = is_real[:, None] & (columns < size)[None, :]
    place = (row + token) * heads + head
    q = tl.load(queries + place[:, None] * size + columns[None, :], mask=wanted, other=0.0)
    highest, total, mixed = attend_keys(
        q, keys, values, table, position + token, start, end, kv_head, scale,
        kv_heads, size, window, softcap, B, BLOCK_M, BLOCK_N, BLOCK_D, precision,
    )  # fmt: skip
    if is_whole:
        tl.store(out + place[:, None] * size + columns[None, :], (mixed / total[:, None]).to(q.dtype), mask=wanted)
    else:
        at = ((row - first_row + token) * heads + head) * parts + part
        tl.store(sums + at[:, None] * size + columns[None, :], mixed, mask=wanted)
        tl.store(weights + at * 2, highest, mask=is_real)
        tl.store(weights + at * 2 + 1, total, mask=is_real)


@triton.jit
def join_parts(
    sums,
    weights,
    positions,
    out,
    first_row,
    parts,
    heads: tl.constexpr,
    size: tl.constexpr,
    window: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A program for one head of one token: joins what `attend_part` made of the parts of its keys, in their order."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + first_row + row)
    first = 0
    if window > 0:
        first = tl.maximum(position - window + 1, 0) // PART
    columns = tl.arange(0, BLOCK_D)
    inside = columns < size
    at = (row * heads + head) * parts
    highest = float("-inf")
    total = 0.0
    mixed = tl.zeros([BLOCK_D], tl.float32)
    for part in range(first, position // PART + 1):
        theirs = tl.load(weights + (at + part) * 2)
        now = tl.maximum(highest, theirs)
        kept = tl.exp2(highest - now)
        gained = tl.exp2(theirs - now)
        total = total * kept + tl.load(weights + (at + part) * 2 + 1) * gained
        more = tl.load(sums + (at + part) * size + columns, mask=inside, other=0.0)
        mixed = mixed * kept + more * gained
        highest = now
    place = ((first_row + row) * heads + head) * size + columns
    tl.store(out + place, (mixed / total).to(out.dtype.element_ty), mask=inside)
