"""Matrix products give a row the same bits in any batch, at the sizes of real models: promise 3 stands on it."""

import pytest
import torch

from services.worker.engine import linear
from services.worker.engine.linear import Linear, divide

pytestmark = pytest.mark.engine

SHAPES = [(576, 960), (576, 3072), (1536, 576), (2048, 2048), (42, 40)]
"""(in, out): SmolLM-135M's, one of a model ten times as large, and one that fits no vector."""
BATCHES = (1, 2, 7, 8, 9, 16, 31, 33, 48, 63, 65, 100, 129, 257, 300, 511, 513, 600)


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_row_has_the_same_bits_in_any_batch(monkeypatch, inputs, outputs, dtype, is_packed):
    if not is_packed:
        monkeypatch.setattr(linear, "can_pack", lambda _: False)
    generator = torch.Generator().manual_seed(3)
    product = Linear(torch.randn(outputs, inputs, generator=generator).to(dtype))
    x = torch.randn(600, inputs, generator=generator).to(dtype)
    whole = product(x)
    for rows in BATCHES:
        start = (7 * rows) % (601 - rows)
        assert torch.equal(product(x[start : start + rows]), whole[start : start + rows]), rows
    exact = x.double() @ torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(3)).to(dtype).double().T
    bound = 2e-5 if dtype is torch.float32 else 1e-2
    assert float((whole.double() - exact).norm() / exact.norm()) < bound


def test_rows_are_divided_among_what_is_allowed_without_much_padding():
    assert divide(0, (8, 16)) == (8,)
    assert divide(1, (40, 64)) == (40,)
    assert divide(48, (8, 32)) == (32, 8, 8)
    assert divide(60, (8, 64)) == (64,)
    for rows in range(1, 2000):
        counts = divide(rows, linear.ROW_COUNTS)
        assert set(counts) <= set(linear.ROW_COUNTS) and rows <= sum(counts) <= max(rows + 8, 1.25 * rows)
