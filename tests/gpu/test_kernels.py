"""The GPU's kernels against the same in torch, and each row against itself in other company: bit for bit.

Without a GPU they run in Triton's interpreter, where Triton is installed: `TRITON_INTERPRET=1 pytest tests/gpu`.
"""

import os

import numpy as np
import pytest
import torch

from services.worker.engine.kernels.kernels import (
    BLOCK_TOKENS,
    HeadNorms,
    HeadShape,
    Norm,
    Rotary,
    Span,
    plan_layout,
)
from services.worker.engine.kernels.reference import TorchKernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="there is no CUDA device"),
    # The interpreter computes both sides of a choice, and asks numpy for what it is about to give up.
    *([pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")] if INTERPRETED else []),
]
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]  # it has bfloat16 as integers
SHAPES = [
    HeadShape(8, 2, 64, rotated=64, scale=0.125),
    HeadShape(4, 4, 32, rotated=16, scale=0.2),
    HeadShape(4, 1, 128, rotated=128, scale=0.1, window=20),
    HeadShape(3, 1, 80, rotated=80, scale=0.1, softcap=5.0),
    HeadShape(4, 2, 256, rotated=256, scale=0.06, window=600),
]
POSITIONS = 1400


def gpu_kernels():
    return pytest.importorskip("services.worker.engine.kernels.gpu").GpuKernels()


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """In the interpreter, which is slow, parts are of 64 keys and sequences are as much shorter."""
    gpu = pytest.importorskip("services.worker.engine.kernels.gpu")
    if INTERPRETED:
        monkeypatch.setattr(gpu, "PART_KEYS", 64)
    return gpu.PART_KEYS


def close(dtype):
    return {"atol": 2e-4, "rtol": 2e-4} if dtype is torch.float32 else {"atol": 2e-2, "rtol": 2e-2}


def rows(count, width, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator).to(dtype).to(DEVICE)


def rotary(shape):
    angles = torch.rand(POSITIONS, shape.rotated // 2, generator=torch.Generator().manual_seed(3)) * 6
    angles = torch.cat([angles, angles], dim=1)
    return Rotary(angles.cos().contiguous().to(DEVICE), angles.sin().contiguous().to(DEVICE))


def two_steps(*wanted):
    """Return two layouts for (tokens before, tokens now) of sequences whose blocks lie in no order."""
    blocks = iter(np.random.default_rng(1).permutation(400).tolist())
    tables = [[next(blocks) for _ in range(-(-(before + count) // BLOCK_TOKENS))] for before, count in wanted]
    layouts = []
    for step in range(2):
        spans, row = [], 0
        for (before, count), table in zip(wanted, tables, strict=True):
            start, size = (0, before) if step == 0 else (before, count)
            if size:
                spans.append(Span(table, start, row, size))
                row += size
        layouts.append(plan_layout(spans))
    return layouts


def run(kernels, shape, layouts, dtype, norms=None):
    pool = kernels.new_pool(400, shape, dtype, DEVICE)
    for number, layout in enumerate(layouts):
        qkv = rows(layout.tokens, shape.qkv_width, dtype, number)
        queries = kernels.prepare_heads(qkv, shape, norms, rotary(shape), pool, layout)
        out = kernels.attend(queries, shape, pool, layout)
    return queries.float(), out.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_norms", [False, True])
def test_attention_is_torchs(shape, dtype, has_norms, parts):
    """Of sequences of one part and of three, beginning and going on."""
    norms = HeadNorms(1 + rows(1, shape.size, dtype)[0] / 9, 1 - rows(1, shape.size, dtype)[0] / 9)
    wanted = [(5, 1), (0, 37), (parts - 1, 1), (parts, 3), (2 * parts + 17, 40)]
    ours, theirs = (
        run(kernels, shape, two_steps(*wanted), dtype, norms if has_norms else None)
        for kernels in (gpu_kernels(), TorchKernels())
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **close(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tokens_attention_is_the_same_in_any_company(shape, dtype, parts):
    """At once, in chunks, alone or beside a longer sequence, in one group of rows or several: the same bits."""
    from services.worker.engine.kernels import gpu

    total, kernels = parts + 40, gpu_kernels()
    table = list(range(40))[::-1]
    qkv, others = (rows(total, shape.qkv_width, dtype, seed) for seed in (2, 3))

    def attend(pieces, company, scratch_bytes=gpu.SCRATCH_BYTES):
        pool, outs = kernels.new_pool(400, shape, dtype, DEVICE), []
        for start, count in pieces:
            before = [Span(list(range(50, 138)), 0, 0, total)] if company else []
            skipped = total if company else 0
            layout = plan_layout([*before, Span(table, start, skipped, count)])
            mine = qkv[start : start + count]
            queries = kernels.prepare_heads(
                torch.cat([others, mine]) if company else mine, shape, None, rotary(shape), pool, layout
            )
            _, tokens = gpu.tile_size(shape)
            plan = gpu.plan_tiles(layout, tokens, gpu.part_bytes(shape), DEVICE, scratch_bytes)
            layout.cache[gpu.tiles_key(shape)] = plan
            outs.append(kernels.attend(queries, shape, pool, layout)[skipped:])
        return torch.cat(outs)

    whole = attend([(0, total)], company=False)
    starts = [0, parts - 12, parts - 11, parts - 10, parts - 3, parts + 13, total]
    chunks = [(start, end - start) for start, end in zip(starts, starts[1:], strict=False)]
    assert torch.equal(attend(chunks, company=True), whole)
    few_rows = 50 * gpu.part_bytes(shape)
    # Within its first part alone, where parts are not joined, and beside a sequence of several, where they are.
    short = parts - 12
    assert torch.equal(attend([(0, short)], company=False), whole[:short])
    assert torch.equal(attend([(0, total)], company=True, scratch_bytes=few_rows), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_norms_are_torchs(dtype, has_bias):
    weight, bias = rows(2, 576, dtype, 7)
    norm = Norm(weight, bias if has_bias else None, 1e-5, 0.0 if has_bias else 1.0)
    results = []
    for kernels in (gpu_kernels(), TorchKernels()):
        residual = rows(9, 576, dtype)
        results.append([kernels.add_norm(residual, added, norm) for added in (None, rows(9, 576, dtype, 2))])
        results[-1].append(residual)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **close(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_activations_are_torchs(dtype, activation, is_gated):
    x = 3 * rows(5, 2 * 1100, dtype)
    one, other = (k.activate(x.clone(), activation, is_gated=is_gated) for k in (gpu_kernels(), TorchKernels()))
    torch.testing.assert_close(one, other, **close(dtype))
