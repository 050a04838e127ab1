"""Reads LoRA adapters as PEFT writes them, without torch: what they change and how strongly. What else PEFT knows is
refused by name, as an adapter that is applied in part would answer wrongly in silence.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from shared.domain.errors import ModelRefused
from shared.model_files import TensorInfo, read_json, read_tensor_infos, tensor_infos_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"

_KNOWN_FIELDS = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias",
    # What follows says how an adapter was made, or is known from its tensors' names.
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out",
    "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "ensure_weight_tying",
})  # fmt: skip
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Others (PiSSA, OLoRA, CorDA, LoftQ, MiCA) change the base's own weights, or are variants of LoRA."""
_PLAIN_PATTERN = re.compile(r"\^?[\w.|]+\$?")
"""Patterns are regular expressions; one with repetitions could take for ever."""
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_NUMBER_TYPES = ("F32", "F16", "BF16")
_MOST_NAMED = 3


@dataclass(frozen=True)
class LoraModule:
    """What an adapter adds to one module of its base: scale * B A, with A [rank, inputs] and B [outputs, rank]."""

    name: str
    rank: int
    inputs: int
    outputs: int
    scale: float

    @property
    def a_name(self) -> str:
        """The name of A in the file."""
        return f"base_model.model.{self.name}.lora_A.weight"

    @property
    def b_name(self) -> str:
        return f"base_model.model.{self.name}.lora_B.weight"


@dataclass(frozen=True)
class AdapterFiles:
    directory: Path
    modules: list[LoraModule]

    @property
    def weights(self) -> Path:
        return self.directory / WEIGHTS_FILE

    @property
    def bytes(self) -> int:
        return self.weights.stat().st_size


def read_adapter_files(directory: Path) -> AdapterFiles:
    """Return what the adapter in `directory` changes; raises ModelRefused with the field or the tensor at fault."""
    if not (directory / CONFIG_FILE).is_file():
        raise ModelRefused(f"There is no {CONFIG_FILE} in {str(directory)!r}.")
    config = read_json(directory / CONFIG_FILE)
    _check_config(config)
    if not (directory / WEIGHTS_FILE).is_file():
        is_pickled = (directory / PICKLED_FILE).exists()
        reason = f"{PICKLED_FILE} can carry code and is not loaded; save it as safetensors." if is_pickled else ""
        raise ModelRefused(f"There is no {WEIGHTS_FILE}. {reason}".strip())
    tensors = read_tensor_infos(directory / WEIGHTS_FILE)
    sides: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ModelRefused(f"{WEIGHTS_FILE} holds {name!r}, which is no matrix of a plain LoRA layer.")
        if tensor.dtype not in _NUMBER_TYPES:
            raise ModelRefused(f"{name!r} has the number type {tensor.dtype}; {', '.join(_NUMBER_TYPES)} are read.")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise ModelRefused(f"{WEIGHTS_FILE} holds no matrices.")
    return AdapterFiles(directory, [_module(name, found, config) for name, found in sides.items()])


def check_fit(adapter: AdapterFiles, base: Path) -> None:
    """Raise ModelRefused unless every module that the adapter changes is one of the base's, of that shape.

    `base` is the directory of its weights. The engine looks again, at the loaded model: it knows the modules that
    have other names in files.
    """
    shapes = {name: info.shape for name, info in tensor_infos_of(base).items()}
    found = {module.name: _shape_in_base(module.name, shapes) for module in adapter.modules}
    unknown = [name for name, shape in found.items() if shape is None or len(shape) != 2 or name == "lm_head"]
    if unknown:
        more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
        names = ", ".join(map(repr, unknown[:_MOST_NAMED]))
        raise ModelRefused(f"target_modules: the base has no layers to adapt of these names: {names}{more}.")
    for module in adapter.modules:
        shape = (module.outputs, module.inputs)
        # GPT-2 stores its matrices the other way round.
        its = found[module.name] or ()
        if its not in (shape, shape[::-1]):
            raise ModelRefused(f"{module.name!r} is for a matrix of {list(shape)}; the base's has {list(its)}.")


def _shape_in_base(module: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape of a module's weight; some files leave the first part of all names out."""
    return shapes.get(f"{module}.weight") or shapes.get(f"{module.partition('.')[2]}.weight")


def _check_config(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelRefused(f"peft_type: only LORA is served, not {config.get('peft_type')!r}.")
    if "auto_map" in config:
        raise ModelRefused("auto_map: the adapter brings its own code, which is not run.")
    if config.get("bias", "none") != "none":
        raise ModelRefused(f"bias: only 'none' is served, not {config['bias']!r}.")
    if config.get("init_lora_weights", True) not in _PLAIN_INITIALIZATIONS:
        raise ModelRefused(f"init_lora_weights: {config['init_lora_weights']!r} changes the base's own weights.")
    for field, value in config.items():
        if value and field not in _KNOWN_FIELDS:
            raise ModelRefused(f"{field}: this variant of LoRA is not served.")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict) or not all(map(_PLAIN_PATTERN.fullmatch, patterns)):
            raise ModelRefused(f"{field}: must map names of modules to numbers.")


def _module(name: str, sides: dict[str, TensorInfo], config: dict[str, Any]) -> LoraModule:
    if sides.keys() != {"A", "B"}:
        raise ModelRefused(f"{name!r} has one matrix of the two, lora_A and lora_B.")
    a, b = sides["A"].shape, sides["B"].shape
    rank = _number(config, "r", "rank_pattern", name, 8)
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise ModelRefused(f"{name!r} has lora_A {list(a)} and lora_B {list(b)}; the configured rank is {rank}.")
    alpha = _number(config, "lora_alpha", "alpha_pattern", name, 8)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraModule(name, int(rank), a[1], b[0], scale)


def _number(config: dict[str, Any], field: str, patterns: str, module: str, default: float) -> float:
    """Return a module's value of a field: that of the first pattern that its name ends in, as PEFT has it."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return _positive(value, patterns)
    return _positive(config.get(field, default), field)


def _positive(value: Any, field: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ModelRefused(f"{field}: {orjson.dumps(value).decode()[:80]} is not a number above 0.")
    return float(value)
