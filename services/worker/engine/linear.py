"""Matrix products with weights that never change: packed once for the machine, and the same for a row in any batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

FEWEST_ROWS = 8
"""Products of fewer rows take other code paths, whose last bits differ: so there are never fewer.

Measured: float32 with 1 row (packed), and with 1 or 2 rows (torch's own); from 4 rows on a row's bits are the same in
any batch."""


@dataclass(frozen=True)
class Part:
    """Which columns of a product are those of one of the model's own modules: `size` of them from `start` on."""

    module: str
    start: int
    size: int


class Linear:
    """`x @ weight.T + bias` for x [rows, in]; the weight is [out, in] and is not kept when it was packed.

    `parts`: the modules of which it is made; none when no adapter can change it. `number`: its place among its
    decoder's products, by which adapters know it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, parts: Sequence[Part] = ()) -> None:
        self.parts = tuple(parts)
        self.number = -1
        self.out_features, self.in_features = weight.shape
        self.weight_bytes = weight.numel() * weight.element_size()
        self._bias = bias
        self._is_packed = can_pack(weight)
        # oneDNN's own layout, which torch.compile uses too: 1.2 to 2 times the speed of F.linear (bench-engine).
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 64) if self._is_packed else weight  # noqa: SLF001

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if rows < FEWEST_ROWS:
            x = functional.pad(x, (0, 0, 0, FEWEST_ROWS - rows))
        if self._is_packed:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")  # noqa: SLF001
        else:
            out = functional.linear(x, self._weight, self._bias)
        return out[:rows] if rows < FEWEST_ROWS else out


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this machine has a packed form for a weight of this kind."""
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or not has_onednn:
        return False
    return weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and _has_bfloat16_products())


def _has_bfloat16_products() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001
