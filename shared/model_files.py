"""Reads what a model is from its files, without torch: kind, number type, context, size. Code in it is refused."""

from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import orjson

from shared.domain.errors import ModelRefused

DEFAULT_KV_TOKENS = 32_768
"""Of a model's KV cache. On a large GPU, more are faster: 256 requests of 1,024 tokens take 262,144."""
CONFIG_FILES = ("config.json", "tokenizer_config.json")
SERVED_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}


MOST_HEADER_BYTES = 100_000_000
"""What safetensors itself allows."""


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors file says of one tensor; the number type in its own words (F32, BF16)."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelDescription:
    kind: str
    source: str
    dtype: str
    context_length: int | None
    weight_bytes: int
    warning: str | None = None
    """What is served otherwise than it is stored."""


def describe_model(source: str, revision: str | None) -> ModelDescription:
    """Return what the model at `source` (a directory, or a hub id to download) is. Raises ModelRefused."""
    directory = model_directory(source, revision)
    configs = {name: read_json(directory / name) for name in CONFIG_FILES if (directory / name).exists()}
    config = configs.get("config.json")
    if config is None:
        hint = " It is an adapter: name its base." if (directory / "adapter_config.json").exists() else ""
        raise ModelRefused(f"There is no config.json in {source!r}.{hint}")
    if any("auto_map" in content for content in configs.values()):
        raise ModelRefused("The model brings its own code (auto_map); only architectures of transformers are served.")
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    if weights == 0:
        raise ModelRefused("There are no safetensors weights; other formats can carry code and are not loaded.")
    _require_whole(directory)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return ModelDescription(
        kind=_kind(config),
        source=str(directory),
        dtype=SERVED_DTYPES.get(dtype, "float32"),
        context_length=context_of(config),
        weight_bytes=weights,
        warning=_warning(dtype),
    )


def context_of(config: dict[str, Any]) -> int | None:
    """Return how many tokens a sequence may have, by a model's config.json.

    `longrope` encodes positions in one way up to a length and in another beyond it, for all that is computed together.
    Up to that length a token's place is all that counts, so that is how far such a model is served.
    """
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return longest
    border = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return min(border, longest) if border and longest else longest


def _warning(dtype: str) -> str | None:
    if SERVED_DTYPES.get(dtype) == dtype:
        return None
    served = SERVED_DTYPES.get(dtype, "float32")
    return f"Its weights are {dtype}; they are served as {served}."


def _require_whole(directory: Path) -> None:
    """Raise ModelRefused when a file of weights is cut off, or one that the index names is not there."""
    tensor_infos_of(directory)
    index_file = directory / "model.safetensors.index.json"
    if index_file.exists():
        named = read_json(index_file).get("weight_map")
        missing = sorted({str(file) for file in (named or {}).values() if not (directory / str(file)).is_file()})
        if missing:
            raise ModelRefused(f"{missing[0]} is not there, though {index_file.name} names it.")


def model_directory(source: str, revision: str | None) -> Path:
    """Return where the files of `source` (a directory, or a hub id to download) are. Raises ModelRefused."""
    path = Path(source)
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or source.startswith((".", "~")):
        raise ModelRefused(f"There is no directory {source!r} on the server.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelRefused("Hub downloads need the package huggingface_hub on the server.") from None
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise ModelRefused(f"The hub did not give {source!r}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises ModelRefused."""
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelRefused(f"{path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelRefused(f"{path.name} is not a JSON object.")
    return content


def tensor_infos_of(directory: Path) -> dict[str, TensorInfo]:
    """Return what the weights in a directory, in one file or several, are made of. Raises ModelRefused."""
    return {
        name: info for path in sorted(directory.glob("*.safetensors")) for name, info in read_tensor_infos(path).items()
    }


def read_tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file, whose content is not read; raises ModelRefused, also for a file that
    ends before its last tensor. Format: https://github.com/huggingface/safetensors#format
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MOST_HEADER_BYTES, path.stat().st_size):
                raise ModelRefused(f"{path.name} is cut off, or no safetensors file.")
            header = orjson.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        infos = {name: TensorInfo(entry["dtype"], tuple(map(index, entry["shape"]))) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        is_whole = path.stat().st_size >= 8 + length + end
    except (OSError, orjson.JSONDecodeError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ModelRefused(f"{path.name} cannot be read: {type(error).__name__}.") from None
    if not is_whole:
        raise ModelRefused(f"{path.name} is cut off.")
    return infos


def _kind(config: dict[str, Any]) -> str:
    architectures = config.get("architectures") or []
    if not architectures or not isinstance(architectures[0], str):
        raise ModelRefused("config.json names no architecture.")
    architecture = architectures[0]
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal_lm"
    if architecture.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder"):
        return "seq2seq"
    if architecture.endswith(("Model", "ForMaskedLM")):
        return "encoder"
    raise ModelRefused(f"The architecture {architecture} is not served.")
