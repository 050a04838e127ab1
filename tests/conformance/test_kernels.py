"""The C kernels against the same in torch, and each row against itself in other company: bit for bit."""

import numpy as np
import pytest
import torch

from services.worker.engine.kernels.compile import KINDS, NoCompilerError, compile_kernels, find_library
from services.worker.engine.kernels.cpu import CpuKernels
from services.worker.engine.kernels.kernels import (
    BLOCK_TOKENS,
    HeadNorms,
    HeadShape,
    Norm,
    Rotary,
    Span,
    new_pool,
    plan_layout,
)
from services.worker.engine.kernels.reference import TorchKernels

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    HeadShape(9, 3, 64, rotated=64, scale=0.125),
    HeadShape(8, 8, 32, rotated=16, scale=0.2),
    HeadShape(4, 1, 128, rotated=128, scale=0.1, window=20),
    HeadShape(16, 2, 80, rotated=80, scale=0.1, softcap=5.0),
]
CPU = torch.device("cpu")


def close(dtype):
    return {"atol": 2e-5, "rtol": 2e-5} if dtype is torch.float32 else {"atol": 2e-2, "rtol": 2e-2}


def rotary(shape):
    generator = torch.Generator().manual_seed(3)
    angles = torch.rand(600, shape.rotated // 2, generator=generator) * 6
    angles = torch.cat([angles, angles], dim=1)
    return Rotary(angles.cos().contiguous(), angles.sin().contiguous())


def spans(*wanted):
    """Return spans for (tokens before, tokens now), each sequence in blocks of its own, in no order."""
    blocks = iter(np.random.default_rng(1).permutation(200).tolist())
    made, row = [], 0
    for before, count in wanted:
        table = [next(blocks) for _ in range(-(-(before + count) // BLOCK_TOKENS))]
        made.append(Span(table, before, row, count))
        row += count
    return made


def run(kernels, shape, layout, qkv, dtype, norms=None):
    generator = torch.Generator().manual_seed(5)
    pool = kernels.new_pool(200, shape, dtype, CPU)
    for tensor in (pool.keys, pool.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    queries = kernels.prepare_heads(qkv, shape, norms, rotary(shape), pool, layout)
    return queries, kernels.attend(queries, shape, pool, layout), pool


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_norms", [False, True])
def test_attention_is_torchs(shape, dtype, has_norms):
    layout = plan_layout(spans((0, 1), (0, 37), (100, 1), (250, 1), (15, 2), (16, 40)))
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(layout.tokens, shape.qkv_width, generator=generator).to(dtype)
    weights = [(1 + 0.1 * torch.randn(shape.size, generator=generator)).to(dtype) for _ in range(2)]
    norms = HeadNorms(*weights) if has_norms else None
    ours, reference = (run(kernels, shape, layout, qkv, dtype, norms) for kernels in (CpuKernels(), TorchKernels()))
    torch.testing.assert_close(ours[0], reference[0], **close(dtype))
    torch.testing.assert_close(ours[1], reference[1], **close(dtype))
    torch.testing.assert_close(ours[2].keys, reference[2].keys, **close(dtype))
    assert torch.equal(ours[2].values, reference[2].values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tokens_attention_is_the_same_in_any_company(shape, dtype):
    """A prompt at once, in chunks of 1, 3 and 7, and beside others: the same bits."""
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(70, shape.qkv_width, generator=generator).to(dtype)
    others = torch.randn(200, shape.qkv_width, generator=generator).to(dtype)
    kernels = CpuKernels()
    table = [7, 3, 9, 1, 5]

    def chunks(size, company):
        pool = new_pool(200, shape, dtype, CPU)
        pieces = []
        for start in range(0, 70, size):
            count = min(size, 70 - start)
            before = [Span([20 + b for b in range(13)], 0, 0, 200)] if company else []
            offset = 200 if company else 0
            layout = plan_layout([*before, Span(table, start, offset, count)])
            rows = torch.cat([others, qkv[start : start + count]]) if company else qkv[start : start + count]
            queries = kernels.prepare_heads(rows, shape, None, rotary(shape), pool, layout)
            pieces.append(kernels.attend(queries, shape, pool, layout)[offset:])
        return torch.cat(pieces)

    whole = chunks(70, company=False)
    for size in (1, 3, 7, 70):
        assert torch.equal(chunks(size, company=True), whole), size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_norms_are_torchs(dtype, has_bias):
    generator = torch.Generator().manual_seed(4)
    residual, added = (torch.randn(13, 48, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(48, generator=generator).to(dtype) for _ in range(2))
    norm = Norm(weight, bias if has_bias else None, epsilon=1e-5, offset=1.0 if not has_bias else 0.0)
    for addition in (None, added):
        mine, theirs = residual.clone(), residual.clone()
        out = CpuKernels().add_norm(mine, addition, norm)
        torch.testing.assert_close(out, TorchKernels().add_norm(theirs, addition, norm), **close(dtype))
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_activations_are_torchs(dtype, activation, is_gated):
    x = (torch.randn(5, 64, generator=torch.Generator().manual_seed(6)) * 10).to(dtype)
    ours = CpuKernels().activate(x, activation, is_gated=is_gated)
    torch.testing.assert_close(ours, TorchKernels().activate(x, activation, is_gated=is_gated), **close(dtype))


@pytest.mark.long
def test_libraries_are_compiled_once_and_for_every_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LAMPLIGHTER_KERNELS", raising=False)
    first = find_library("DEFAULT")
    made_at = first.stat().st_mtime_ns
    assert find_library("DEFAULT").stat().st_mtime_ns == made_at
    shipped = tmp_path / "shipped"
    compile_kernels("AVX2", shipped)
    monkeypatch.setenv("LAMPLIGHTER_KERNELS", str(shipped))
    monkeypatch.setenv("PATH", "")
    assert find_library("AVX2").parent == shipped  # an image without a compiler
    assert set(KINDS) == {"AVX512", "AVX2", "DEFAULT"}
    with pytest.raises(NoCompilerError, match="no C compiler"):
        find_library("AVX512")
