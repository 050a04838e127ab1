"""The kernels in C (`cpu_kernels.c`), called through ctypes."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_long, c_void_p
from typing import Any

import numpy as np
import torch

from services.worker.engine.kernels.compile import find_library
from services.worker.engine.kernels.kernels import (
    Activation,
    AdapterRows,
    HeadNorms,
    HeadShape,
    LayerPool,
    Layout,
    LoraPart,
    Norm,
    Rotary,
    new_pool,
)
from services.worker.engine.kernels.panels import LANES, MAX_ROWS, PanelAdapter, StepItems

MAX_HEAD_SIZE = 512
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class _Shape(Structure):
    _fields_ = (
        *((name, c_long) for name in ("heads", "kv_heads", "head_size", "table_width", "window")),
        ("scale", c_float),
        ("softcap", c_float),
    )


class _Item(Structure):
    _fields_ = tuple((name, c_int32) for name in ("sequence", "row", "tokens", "position"))


class _Heads(Structure):
    _fields_ = (
        *((name, c_long) for name in ("heads", "kv_heads", "head_size", "rotated")),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("epsilon", c_float),
    )


_SIGNATURES: dict[str, list[Any]] = {
    "attend": [c_void_p] * 6 + [c_long, POINTER(_Shape), c_long, c_int],
    "prepare_heads": [c_void_p] * 8 + [c_long, POINTER(_Heads), c_int],
    "add_norm": [c_void_p] * 5 + [c_long, c_long, c_float, c_float, c_int],
    "activate_rows": [c_void_p] * 2 + [c_long, c_long, c_int, c_int, c_int],
    "add_adapters": [c_void_p] * 3 + [c_long] + [c_void_p] * 2 + [c_long] * 4 + [c_int],
}


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class CpuKernels:
    """`Kernels` for float32 and bfloat16 on a CPU; raises NoCompilerError where they cannot be had."""

    def __init__(self) -> None:
        # torch is imported above: its OpenMP must be there before the library asks for one.
        library = ctypes.CDLL(str(find_library(torch.backends.cpu.get_cpu_capability())))
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = c_int if name in ("attend", "add_adapters") else None
        self._library = library

    @staticmethod
    def supports(shape: HeadShape, width: int, dtype: torch.dtype) -> bool:
        """Whether a model of these shapes can be computed here; `width` is that of its rows."""
        heads_fit = shape.size % LANES == 0 and shape.size <= MAX_HEAD_SIZE and shape.group <= MAX_ROWS
        return heads_fit and width % LANES == 0 and dtype in DTYPES

    def new_pool(self, blocks: int, shape: HeadShape, dtype: torch.dtype, device: torch.device) -> LayerPool:
        return new_pool(blocks, shape, dtype, device)

    def prepare_heads(
        self,
        qkv: torch.Tensor,
        shape: HeadShape,
        norms: HeadNorms | None,
        rotary: Rotary | None,
        pool: LayerPool,
        layout: Layout,
    ) -> torch.Tensor:
        queries = torch.empty(layout.tokens, shape.heads, shape.size)
        rotated = shape.rotated if rotary is not None else 0
        query_norm, key_norm = (norms.query, norms.key) if norms else (None, None)
        heads = _Heads(
            shape.heads, shape.kv_heads, shape.size, rotated, _pointer(query_norm), _pointer(key_norm), shape.epsilon
        )
        cosines, sines = (rotary.cosines, rotary.sines) if rotary else (None, None)
        self._library.prepare_heads(
            qkv.data_ptr(),
            queries.data_ptr(),
            pool.keys.data_ptr(),
            pool.values.data_ptr(),
            _pointer(cosines),
            _pointer(sines),
            layout.positions.ctypes.data,
            layout.slots.ctypes.data,
            layout.tokens,
            byref(heads),
            DTYPES[qkv.dtype],
        )
        return queries

    def attend(self, queries: torch.Tensor, shape: HeadShape, pool: LayerPool, layout: Layout) -> torch.Tensor:
        dtype = pool.keys.dtype
        out = torch.empty(layout.tokens, shape.heads * shape.size, dtype=dtype)
        items = layout.cache.get(shape.group)
        if items is None:
            items = layout.cache[shape.group] = _items(layout, MAX_ROWS // shape.group)
        described = _Shape(
            shape.heads,
            shape.kv_heads,
            shape.size,
            layout.tables.shape[1],
            shape.window,
            shape.scale,
            shape.softcap,
        )
        failed = self._library.attend(
            out.data_ptr(),
            queries.data_ptr(),
            pool.keys.data_ptr(),
            pool.values.data_ptr(),
            layout.tables.ctypes.data,
            items.ctypes.data,
            len(items),
            byref(described),
            layout.longest,
            DTYPES[dtype],
        )
        if failed:
            raise MemoryError("attention found no memory for its scores")
        return out

    def add_norm(self, residual: torch.Tensor, added: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        out = torch.empty_like(residual)
        rows, size = residual.shape
        self._library.add_norm(
            out.data_ptr(),
            residual.data_ptr(),
            _pointer(added),
            norm.weight.data_ptr(),
            _pointer(norm.bias),
            rows,
            size,
            norm.epsilon,
            norm.offset,
            DTYPES[residual.dtype],
        )
        return out

    def activate(self, x: torch.Tensor, activation: Activation, *, is_gated: bool) -> torch.Tensor:
        rows, size = x.shape[0], x.shape[1] // (2 if is_gated else 1)
        out = torch.empty(rows, size, dtype=x.dtype)
        self._library.activate_rows(
            out.data_ptr(), x.data_ptr(), rows, size, int(is_gated), ACTIVATIONS[activation], DTYPES[x.dtype]
        )
        return out

    def pack_adapter(self, products: Sequence[Sequence[LoraPart]]) -> PanelAdapter:
        return PanelAdapter(products)

    def add_adapters(self, out: torch.Tensor, x: torch.Tensor, product: int, adapters: AdapterRows) -> None:
        step = adapters.cache.get("items")
        if step is None:
            step = adapters.cache["items"] = StepItems(adapters)
        failed = self._library.add_adapters(
            out.data_ptr(),
            x.data_ptr(),
            step.tables.ctypes.data,
            product,
            step.rows.ctypes.data,
            step.items.ctypes.data,
            len(step.items),
            x.shape[1],
            out.shape[1],
            step.ranks,
            DTYPES[x.dtype],
        )
        if failed:
            raise MemoryError("an adapter found no memory for its rows")


def _items(layout: Layout, most: int) -> "np.ndarray[Any, np.dtype[np.int32]]":
    """Cut the spans into items of at most `most` tokens: rows (sequence, row, tokens, position), the longest first."""
    items = [
        (number, span.row + start, min(most, span.count - start), span.position + start)
        for number, span in enumerate(layout.spans)
        for start in range(0, span.count, most)
    ]
    items.sort(key=lambda item: -item[3])  # long ones last would leave the other cores idle at the end
    return np.array(items, np.int32)
