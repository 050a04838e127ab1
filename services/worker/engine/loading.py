"""Loads models from local files. The only module through which a child comes to import torch."""

import math
import os
from pathlib import Path
from typing import Any

import orjson
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from services.worker.engine.continuous import ContinuousEngine, kv_bytes_per_token, kv_tokens
from services.worker.engine.encoder import EncoderEngine, EncoderSettings
from services.worker.engine.engine import Engine
from services.worker.protocol import ModelSpec
from shared.domain.errors import ModelRefused


def model_bytes(spec: ModelSpec) -> int:
    """Return what a model will hold in memory: its weights in the served number type, and its KV cache."""
    directory = Path(spec.source)
    try:
        config = orjson.loads((directory / "config.json").read_bytes())
        stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelRefused(f"Its files cannot be read: {error}") from None
    if stored == 0:
        raise ModelRefused("Its weights are gone.")
    stored_width = _width(str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    weights = math.ceil(stored / stored_width * _width(spec.dtype))
    if spec.kind == "encoder":
        return weights
    return weights + kv_bytes_per_token(config, _width(spec.dtype)) * kv_tokens(spec.context_length)


def _width(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "float16") else 4


def load_model(spec: ModelSpec, device: str) -> Engine:
    """Load a model onto `device` (`cpu:N` or `cuda:N`) and return its engine.

    `CUDA_VISIBLE_DEVICES` shows this process one GPU, so that is always `cuda:0` here.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    torch_device = torch.device("cuda:0" if device.startswith("cuda") else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(spec.source, local_files_only=True, trust_remote_code=False)
    auto_class = AutoModel if spec.kind == "encoder" else AutoModelForCausalLM
    model: Any = auto_class.from_pretrained(
        spec.source,
        dtype=getattr(torch, spec.dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="sdpa",
    )
    model = model.to(torch_device).eval()
    if spec.kind == "encoder":
        return EncoderEngine(model, tokenizer, _encoder_settings(spec))
    return ContinuousEngine(model, tokenizer, spec)


def _encoder_settings(spec: ModelSpec) -> EncoderSettings:
    """Read how vectors are pooled, as sentence-transformers stores it beside the weights; mean pooling by default."""
    directory = Path(spec.source)
    pooling = _json_or_empty(directory / "1_Pooling" / "config.json")
    sentence = _json_or_empty(directory / "sentence_bert_config.json")
    modules = _json_or_empty(directory / "modules.json")
    max_tokens = sentence.get("max_seq_length") or spec.context_length or 512
    return EncoderSettings(
        max_tokens=int(max_tokens),
        pooling="cls" if pooling.get("pooling_mode_cls_token") else "mean",
        # A directory without modules.json is a bare encoder: its vectors are normalised, as clients compare by cosine.
        normalize=not modules or any("Normalize" in module["type"] for module in modules),
    )


def _json_or_empty(path: Path) -> Any:
    return orjson.loads(path.read_bytes()) if path.exists() else {}
