"""An adapter's matrices as `cpu_kernels.c` reads them: in panels of as many columns as a vector has lanes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from services.worker.engine.kernels.kernels import AdapterRows, LoraPart

LANES = 16
MAX_PARTS = 3
MAX_ROWS = 8

_PART = np.dtype(
    [("b", "u8"), *((name, "i8") for name in ("first", "rank", "start", "size")), ("scale", "f4")], align=True
)
_PRODUCT = np.dtype([("a", "u8"), ("ranks", "i8"), ("parts", "i8"), ("part", _PART, (MAX_PARTS,))], align=True)


class PanelAdapter:
    """`PackedAdapter` of the kernels in C; `table` [products] are their `struct lora`."""

    def __init__(self, products: Sequence[Sequence[LoraPart]]) -> None:
        self.table = np.zeros(len(products), _PRODUCT)
        self.products = frozenset(number for number, parts in enumerate(products) if parts)
        self._tensors: list[torch.Tensor] = []
        for number in self.products:
            self._describe(self.table[number], products[number])
        self.ranks = int(self.table["ranks"].max(initial=0))

    def _describe(self, row: Any, parts: Sequence[LoraPart]) -> None:
        a = self._keep(panels(torch.cat([part.a for part in parts])))
        row["a"], row["ranks"], row["parts"] = a.data_ptr(), a.shape[0] * LANES, len(parts)
        first = 0
        for number, part in enumerate(parts):
            columns, rank = part.b.shape
            row["part"][number] = (self._keep(panels(part.b)).data_ptr(), first, rank, part.start, columns, part.scale)
            first += rank

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._tensors.append(tensor)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)


def panels(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` [out, in] as panels [panels, in, LANES] of its transpose, the last filled up with zeros."""
    out = weight.shape[0]
    padded = functional.pad(weight, (0, 0, 0, -out % LANES))
    return padded.view(-1, LANES, weight.shape[1]).transpose(1, 2).contiguous()


def padded(size: int) -> int:
    """Return how many columns a matrix of `size` columns takes in panels."""
    return -(-size // LANES) * LANES


class StepItems:
    """A step's rows with adapters, cut for the kernel: items (adapter, first of its rows, count), the longest first."""

    def __init__(self, step: AdapterRows) -> None:
        adapters: Sequence[Any] = step.adapters
        self.tables = np.array([adapter.table.ctypes.data for adapter in adapters], np.uint64)
        self.ranks = max(adapter.ranks for adapter in adapters)
        self.rows = np.concatenate(step.rows)
        items, start = [], 0
        for number, rows in enumerate(step.rows):
            items += [
                (number, start + first, min(MAX_ROWS, len(rows) - first)) for first in range(0, len(rows), MAX_ROWS)
            ]
            start += len(rows)
        # Long ones last would leave the other cores idle at the end.
        items.sort(key=lambda item: -adapters[item[0]].ranks * (2 + item[2]))
        self.items = np.array(items, np.int32)
