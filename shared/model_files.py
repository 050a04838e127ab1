"""Reads what a model is from its files, without torch: kind, number type, context, size. Code in it is refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from shared.domain.errors import ModelRefused

CONFIG_FILES = ("config.json", "tokenizer_config.json")
SERVED_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}


@dataclass(frozen=True)
class ModelDescription:
    kind: str
    source: str
    dtype: str
    context_length: int | None
    weight_bytes: int


def describe_model(source: str, revision: str | None) -> ModelDescription:
    """Return what the model at `source` (a directory, or a hub id to download) is. Raises ModelRefused."""
    directory = _directory(source, revision)
    configs = {name: _read_json(directory / name) for name in CONFIG_FILES if (directory / name).exists()}
    config = configs.get("config.json")
    if config is None:
        raise ModelRefused(f"There is no config.json in {source!r}.")
    if any("auto_map" in content for content in configs.values()):
        raise ModelRefused("The model brings its own code (auto_map); only architectures of transformers are served.")
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    if weights == 0:
        raise ModelRefused("There are no safetensors weights; other formats can carry code and are not loaded.")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return ModelDescription(
        kind=_kind(config),
        source=str(directory),
        dtype=SERVED_DTYPES.get(dtype, "float32"),
        context_length=config.get("max_position_embeddings") or config.get("n_positions"),
        weight_bytes=weights,
    )


def _directory(source: str, revision: str | None) -> Path:
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelRefused(f"{path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelRefused(f"{path.name} is not a JSON object.")
    return content


def _kind(config: dict[str, Any]) -> str:
    architectures = config.get("architectures") or []
    if not architectures or not isinstance(architectures[0], str):
        raise ModelRefused("config.json names no architecture.")
    architecture = architectures[0]
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal_lm"
    if architecture.endswith(("Model", "ForMaskedLM")):
        return "encoder"
    raise ModelRefused(f"The architecture {architecture} is not served.")
