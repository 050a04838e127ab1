"""Sums in one order, as a GPU computes them (`stable.py`): the same as torch's, and a row alone as among others."""

import pytest
import torch

from services.worker.engine.stable import running_sums_in_blocks, sum_of_halves

pytestmark = pytest.mark.engine
SIZES = [1, 2, 5, 255, 256, 257, 5000]


@pytest.mark.parametrize("size", SIZES)
def test_a_sum_of_halves_is_the_sum(size):
    x = torch.randn(7, size, generator=torch.Generator().manual_seed(size))
    together = sum_of_halves(x)
    torch.testing.assert_close(together, x.double().sum(-1, keepdim=True).float(), atol=1e-4, rtol=1e-5)
    assert torch.equal(torch.cat([sum_of_halves(row[None]) for row in x]), together)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_running_sums_are_those_of_torch(size, shape):
    x = torch.rand(*shape, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    found = running_sums_in_blocks(x)
    torch.testing.assert_close(found, x.cumsum(-1), atol=1e-12, rtol=1e-12)
    rows, sums = x.reshape(-1, size), found.reshape(-1, size)
    assert torch.equal(torch.stack([running_sums_in_blocks(row) for row in rows]), sums)
