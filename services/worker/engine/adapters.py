"""LoRA adapters of a loaded model: read from PEFT's files, and brought to the rows of a step that asked for them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from services.worker.engine.kernels.kernels import AdapterRows, Kernels, LoraPart, PackedAdapter
from services.worker.engine.kernels.panels import padded
from services.worker.engine.linear import Linear, Part
from shared.adapter_files import CONFIG_FILE, LoraModule, read_adapter_files
from shared.domain.errors import ModelRefused


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory, beside the weights of its base. `digest` stands for its content: what one adapter computed
    of a prompt is never another's.
    """

    digest: str
    packed: PackedAdapter

    @property
    def bytes(self) -> int:
        return self.packed.bytes


def read_adapter(directory: Path, products: Sequence[Linear], kernels: Kernels, like: torch.Tensor) -> Adapter:
    """Return the adapter in a directory, in the number type and on the device of the base's weight `like`.

    `products` are those of the base's decoder. Raises ModelRefused when the files cannot be used or do not fit.
    """
    files = read_adapter_files(directory)
    places = {part.module: (linear, part) for linear in products for part in linear.parts}
    parts: list[list[LoraPart]] = [[] for _ in products]
    try:
        with safe_open(files.weights, framework="pt") as tensors:
            for module in files.modules:
                linear, part = _place(module, places)
                a, b = (tensors.get_tensor(name).to(like) for name in (module.a_name, module.b_name))
                parts[linear.number].append(LoraPart(part.start, a, b, module.scale))
        digest = _digest(directory / CONFIG_FILE, files.weights)
    except (OSError, SafetensorError) as error:
        raise ModelRefused(f"{files.weights.name} cannot be read: {error}") from error
    return Adapter(digest, kernels.pack_adapter(parts))


def _place(module: LoraModule, places: dict[str, tuple[Linear, Part]]) -> tuple[Linear, Part]:
    """Return the columns of the product that a module is; raises ModelRefused when there are none of its shape."""
    if module.name not in places:
        raise ModelRefused(f"target_modules: its base has no layer {module.name!r} that could be adapted.")
    linear, part = places[module.name]
    if (module.outputs, module.inputs) != (part.size, linear.in_features):
        shapes = f"{[module.outputs, module.inputs]}; its base's has {[part.size, linear.in_features]}"
        raise ModelRefused(f"{module.name!r} is for a matrix of {shapes}.")
    return linear, part


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def adapter_bytes(directory: Path, width: int) -> int:
    """Return the most that an adapter takes in memory, from its files; `width` is the number type's bytes.

    Raises ModelRefused.
    """
    modules = read_adapter_files(directory).modules
    return width * sum(padded(module.rank) * module.inputs + module.rank * padded(module.outputs) for module in modules)


def route(owners: Iterable[tuple[Adapter | None, int]]) -> AdapterRows | None:
    """Return which of a step's rows belong to which adapter; None when none does.

    `owners`: in the order of the rows, how many of them belong to which adapter.
    """
    rows: dict[int, list[int]] = {}
    adapters: dict[int, PackedAdapter] = {}
    start = 0
    for adapter, count in owners:
        if adapter is not None:
            rows.setdefault(id(adapter), []).extend(range(start, start + count))
            adapters[id(adapter)] = adapter.packed
        start += count
    if not rows:
        return None
    products = frozenset().union(*(packed.products for packed in adapters.values()))
    return AdapterRows(list(adapters.values()), [np.array(each, np.int32) for each in rows.values()], products)
