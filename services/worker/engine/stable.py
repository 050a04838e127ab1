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


class SameInAnyCompany(TorchFunctionMode):
    """Within it, functions whose last bits would depend on a row's neighbours are replaced by those of this module."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ELEMENTWISE and "out" not in kwargs and not kwargs.get("inplace"):
            return elementwise(lambda x: func(x, *args[1:], **kwargs), args[0])
        return _REPLACED.get(func, func)(*args, **kwargs)
