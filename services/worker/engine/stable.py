"""Has torch compute a row with the same bits in any company (promise 3), where a model's own code calls it.

On CPUs torch divides an array among its threads, and computes what is left over of each part after its last whole
vectors by other instructions, whose last bits differ. Products are summed in an order that the number of rows decides.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from services.worker.engine.linear import multiply_in_known_numbers, row_counts_of

WHOLE = 32
"""Numbers that torch computes at once on any CPU: two of the widest vectors."""
SUMMED_AT_ONCE = 256
UNDIVIDED = 32_767
"""Numbers up to which torch leaves an array to one thread."""


def sum_in_one_order() -> None:
    """Keep cuBLAS from dividing sums among programs, which it does by a product's number of rows. Before any product.

    It needs room to put parts of sums, and is given none. `row_counts_of` shows which orders are left.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    os.environ["CUBLASLT_WORKSPACE_SIZE"] = "1"


def elementwise(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return a function of every number of x [..., size]: no part is divided, and nothing is left over."""
    size = x.shape[-1] if x.dim() else 1
    if x.device.type != "cpu" or x.numel() == 0:
        return function(x)
    padded = functional.pad(x.reshape(-1, size), (0, -size % WHOLE))
    parts = [function(part) for part in torch.split(padded, max(1, UNDIVIDED // padded.shape[-1]))]
    return torch.cat(parts)[:, :size].reshape(x.shape)


def mean(
    x: torch.Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the mean over the last dimension; over others it is torch's own.

    On a GPU torch has as many threads add up a row as the number of rows leaves over.
    """
    if x.device.type == "cpu" or dim not in (-1, x.dim() - 1):
        return torch.mean(x, dtype=dtype) if dim is None else torch.mean(x, dim, keepdim, dtype=dtype)
    result = sum_of_halves(x.float()) / x.shape[-1]
    return (result if keepdim else result.squeeze(-1)).to(dtype or x.dtype)


def sum_of_halves(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over the last dimension [..., 1]: one half is added to the other until one number is left."""
    x = functional.pad(x, (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    while (half := x.shape[-1] // 2) > 0:
        x = x[..., :half] + x[..., half:]
    return x


def running_sums(x: torch.Tensor) -> torch.Tensor:
    """Return sums over all numbers up to each one of a row [..., size].

    On a GPU torch's own look back at whichever part is done first, and differ from run to run.
    """
    return x.cumsum(-1) if x.device.type == "cpu" else running_sums_in_blocks(x)


def running_sums_in_blocks(x: torch.Tensor) -> torch.Tensor:
    """Return running sums that are added in one order: within blocks, then over them."""
    size = x.shape[-1]
    blocks = functional.pad(x, (0, -size % SUMMED_AT_ONCE)).reshape(*x.shape[:-1], -1, SUMMED_AT_ONCE)
    within = _shifted_sums(blocks)
    before = functional.pad(_shifted_sums(within[..., -1])[..., :-1], (1, 0))
    return (within + before[..., None]).flatten(-2)[..., :size]


def _shifted_sums(x: torch.Tensor) -> torch.Tensor:
    shift = 1
    while shift < x.shape[-1]:
        x = torch.cat([x[..., :shift], x[..., shift:] + x[..., :-shift]], dim=-1)
        shift *= 2
    return x


def softmax(x: torch.Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return softmax over the last dimension, filled up to whole vectors: rows of fewer numbers are computed several at
    a time. Over another one it is torch's own.
    """
    size = x.shape[-1]
    if dim not in (-1, x.dim() - 1) or size % WHOLE == 0:
        return functional.softmax(x, dim, dtype=dtype)
    padded = functional.pad(x if dtype is None else x.to(dtype), (0, -size % WHOLE), value=float("-inf"))
    return functional.softmax(padded, -1)[..., :size]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `functional.linear` of a weight that is no module's, such as one expert's, which only some rows meet."""

    def multiply(part: torch.Tensor) -> torch.Tensor:
        return functional.linear(part, weight, bias)

    rows = x.reshape(-1, x.shape[-1])
    out = multiply_in_known_numbers(multiply, rows, row_counts_of(multiply, weight, is_packed=False))
    return out.view(*x.shape[:-1], out.shape[-1])


_ELEMENTWISE = frozenset({
    functional.silu, functional.gelu, functional.softplus, functional.mish, torch.sigmoid, torch.Tensor.sigmoid,
    torch.tanh, torch.Tensor.tanh, torch.exp, torch.Tensor.exp, torch.erf, torch.Tensor.erf,
    torch.cos, torch.Tensor.cos, torch.sin, torch.Tensor.sin,
})  # fmt: skip
_REPLACED: dict[Any, Callable[..., torch.Tensor]] = {functional.linear: linear, functional.softmax: softmax}
_REPLACED_ON_GPUS: dict[Any, Callable[..., torch.Tensor]] = {torch.mean: mean, torch.Tensor.mean: mean}
_MEANS_KEYWORDS = {"dim", "keepdim", "dtype"}


class SameInAnyCompany(TorchFunctionMode):
    """Within it, functions whose last bits would depend on a row's neighbours are replaced by those of this module."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ELEMENTWISE and "out" not in kwargs and not kwargs.get("inplace"):
            return elementwise(lambda x: func(x, *args[1:], **kwargs), args[0])
        if func in _REPLACED_ON_GPUS and args and args[0].is_cuda and kwargs.keys() <= _MEANS_KEYWORDS:
            return _REPLACED_ON_GPUS[func](*args, **kwargs)
        return _REPLACED.get(func, func)(*args, **kwargs)
