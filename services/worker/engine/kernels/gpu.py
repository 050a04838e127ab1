"""The kernels of GPUs, in Triton: one launch for each thing between two products, attention straight from the pool."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from services.worker.engine.kernels import programs
from services.worker.engine.kernels.kernels import (
    BLOCK_TOKENS,
    Activation,
    HeadNorms,
    HeadShape,
    LayerPool,
    Layout,
    Norm,
    Rotary,
    Span,
    cached,
    on_device,
    plan_layout,
)
from services.worker.engine.kernels.reference import TorchKernels
from services.worker.engine.kernels.transfer import to_device

PART_KEYS = 512
"""Keys of a sequence that one program attends to; fixed, so that a row's sums have the order of its position."""
FEWEST_TILE_ROWS = 16
"""The least that a GPU's matrix units multiply: query heads times tokens, of one kv head."""
BLOCK_KEYS = 64
ATTENTION_WARPS = 2
WIDE_HEAD = 128
"""Heads beyond this size have half as many keys at a time, for shared memory's sake."""
SCRATCH_BYTES = 512 << 20
"""For parts that wait to be joined; more rows than that are attended one group after another."""
ACTIVATED_AT_ONCE = 1024
HEADS_AT_ONCE = 4


@dataclass(frozen=True)
class Tiles:
    """What the programs of one step's attention share: `parts` is the most that any of these sequences has.

    `tiles` [N, 4] int32: first row, tokens, the first token's position, sequence. `groups`: tiles and rows that are
    attended together.
    """

    tiles: torch.Tensor
    groups: list[tuple[slice, slice]]
    parts: int


class GpuKernels(TorchKernels):
    """`Kernels` in Triton, for every shape of head."""

    def try_out(self, shapes: Sequence[HeadShape], dtype: torch.dtype, device: torch.device) -> None:
        """Raise whatever Triton raises on a device that cannot serve these shapes; attends to one part, and to two."""
        blocks = PART_KEYS // BLOCK_TOKENS + 1
        for shape in set(shapes):
            pool = self.new_pool(blocks, shape, dtype, device)
            for position in (0, PART_KEYS):
                layout = plan_layout([Span(list(range(blocks)), position, 0, 1)])
                qkv = torch.zeros(1, shape.qkv_width, dtype=dtype, device=device)
                self.attend(self.prepare_heads(qkv, shape, None, None, pool, layout), shape, pool, layout)

    def new_pool(self, blocks: int, shape: HeadShape, dtype: torch.dtype, device: torch.device) -> LayerPool:
        """Return keys and values [blocks, K, B, D]."""
        size = (blocks, shape.kv_heads, BLOCK_TOKENS, shape.size)
        return LayerPool(*(torch.zeros(size, dtype=dtype, device=device) for _ in range(2)))

    def prepare_heads(
        self,
        qkv: torch.Tensor,
        shape: HeadShape,
        norms: HeadNorms | None,
        rotary: Rotary | None,
        pool: LayerPool,
        layout: Layout,
    ) -> torch.Tensor:
        """As `Kernels` says, but the queries have the type of `qkv`: they were rounded to it anyway."""
        qkv = qkv.contiguous()
        queries = qkv.new_empty(layout.tokens, shape.heads, shape.size)
        programs.prepare_heads[(layout.tokens, -(-(shape.heads + 2 * shape.kv_heads) // HEADS_AT_ONCE))](
            qkv,
            *((qkv, qkv) if norms is None else (norms.query, norms.key)),
            *((qkv, qkv) if rotary is None else (rotary.cosines, rotary.sines)),
            on_device(layout, "positions", qkv.device),
            on_device(layout, "slots", qkv.device),
            queries,
            pool.keys,
            pool.values,
            shape.epsilon,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            size=shape.size,
            rotated=0 if rotary is None else shape.rotated,
            has_norms=norms is not None,
            B=BLOCK_TOKENS,
            BLOCK=_power_of_two(shape.size),
            AT_ONCE=HEADS_AT_ONCE,
            num_warps=1,
        )
        return queries

    def attend(self, queries: torch.Tensor, shape: HeadShape, pool: LayerPool, layout: Layout) -> torch.Tensor:
        rows, tokens = tile_size(shape)
        tiles = cached(layout, tiles_key(shape), lambda: plan_tiles(layout, tokens, part_bytes(shape), queries.device))
        out = torch.empty_like(queries)
        for which, own_rows in tiles.groups:
            self._attend_group(queries, out, tiles, which, own_rows, shape, pool, layout, rows)
        return out.view(layout.tokens, -1)

    def _attend_group(
        self,
        queries: torch.Tensor,
        out: torch.Tensor,
        tiles: Tiles,
        which: slice,
        own_rows: slice,
        shape: HeadShape,
        pool: LayerPool,
        layout: Layout,
        tile_rows: int,
    ) -> None:
        device, parts, is_whole = queries.device, tiles.parts, tiles.parts == 1
        count = own_rows.stop - own_rows.start
        size = 0 if is_whole else count * shape.heads * parts
        sums = torch.empty(size * shape.size, dtype=torch.float32, device=device)
        weights = torch.empty(size * 2, dtype=torch.float32, device=device)
        common = {"heads": shape.heads, "size": shape.size, "window": shape.window, "PART": PART_KEYS}
        common["BLOCK_D"] = max(FEWEST_TILE_ROWS, _power_of_two(shape.size))
        programs.attend_part[(which.stop - which.start, shape.kv_heads, parts)](
            queries,
            pool.keys,
            pool.values,
            on_device(layout, "tables", device),
            tiles.tiles[which],
            sums,
            weights,
            out,
            layout.tables.shape[1],
            own_rows.start,
            parts,
            shape.scale,
            kv_heads=shape.kv_heads,
            softcap=shape.softcap,
            is_whole=is_whole,
            B=BLOCK_TOKENS,
            BLOCK_M=tile_rows,
            BLOCK_N=BLOCK_KEYS if shape.size <= WIDE_HEAD else BLOCK_KEYS // 2,
            precision="ieee",
            **common,
            num_warps=ATTENTION_WARPS,
            num_stages=3,
        )
        if not is_whole:
            positions = on_device(layout, "positions", device)
            programs.join_parts[(count, shape.heads)](
                sums, weights, positions, out, own_rows.start, parts, **common, num_warps=1
            )

    def add_norm(self, residual: torch.Tensor, added: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        width, out = residual.shape[-1], torch.empty_like(residual)
        programs.add_norm[(residual.shape[0],)](
            residual,
            residual if added is None else added,
            norm.weight,
            norm.weight if norm.bias is None else norm.bias,
            out,
            width,
            norm.epsilon,
            norm.offset,
            has_added=added is not None,
            is_layer_norm=norm.bias is not None,
            BLOCK=_power_of_two(width),
            num_warps=8 if width > ACTIVATED_AT_ONCE else 4,
        )
        return out

    def activate(self, x: torch.Tensor, activation: Activation, *, is_gated: bool) -> torch.Tensor:
        rows, width = x.shape[0], x.shape[1] // (2 if is_gated else 1)
        out = x.new_empty(rows, width)
        grid = (rows, -(-width // ACTIVATED_AT_ONCE))
        programs.activate[grid](x, out, width, is_gated=is_gated, is_silu=activation == "silu", BLOCK=ACTIVATED_AT_ONCE)
        return out


def plan_tiles(
    layout: Layout, tokens: int, row_bytes: int, device: torch.device, scratch_bytes: int = SCRATCH_BYTES
) -> Tiles:
    """Divide a step's spans into tiles of at most `tokens`; made once a step, used by every layer.

    `row_bytes`: see `part_bytes`. Groups hold `scratch_bytes` of them at most, or one
    tile.
    """
    counts = np.array([span.count for span in layout.spans])
    numbers = -(-counts // tokens)
    owners = np.repeat(np.arange(len(counts)), numbers)
    within = (np.arange(len(owners)) - np.repeat(np.cumsum(numbers) - numbers, numbers)) * tokens
    rows = np.array([span.row for span in layout.spans])[owners] + within
    positions = np.array([span.position for span in layout.spans])[owners] + within
    tiles = np.stack([rows, np.minimum(tokens, counts[owners] - within), positions, owners], axis=1).astype(np.int32)
    parts = -(-layout.longest // PART_KEYS)
    most = layout.tokens if parts == 1 else max(tokens, scratch_bytes // (row_bytes * parts))
    groups: list[tuple[slice, slice]] = []
    first = 0
    while first < len(tiles):
        last = max(first + 1, int(np.searchsorted(rows + tiles[:, 1], rows[first] + most, side="right")))
        groups.append((slice(first, last), slice(int(rows[first]), int(rows[last - 1] + tiles[last - 1, 1]))))
        first = last
    return Tiles(to_device(tiles, device), groups, parts)


def tile_size(shape: HeadShape) -> tuple[int, int]:
    """Return the rows of a tile, which are its tokens times the query heads of one kv head, and its tokens."""
    rows = max(FEWEST_TILE_ROWS, _power_of_two(shape.group))
    return rows, rows // shape.group


def tiles_key(shape: HeadShape) -> str:
    """Return where a layout's cache has the tiles for a shape."""
    return f"tiles of {tile_size(shape)[1]}"


def part_bytes(shape: HeadShape) -> int:
    """Return the bytes of one part of one row while it waits to be joined."""
    return shape.heads * (shape.size + 2) * 4


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
