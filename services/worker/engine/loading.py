"""Loads models from local files. The only module through which a child comes to import torch."""

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from services.worker.engine.adapters import adapter_bytes
from services.worker.engine.decoder import is_out_of_memory
from services.worker.engine.decoding import build_decoder, kv_bytes_per_token
from services.worker.engine.encoder import EncoderEngine, EncoderSettings
from services.worker.engine.engine import Engine
from services.worker.engine.generation import GenerationEngine
from services.worker.engine.kernels.kernels import BLOCK_TOKENS
from services.worker.engine.prediction import PredictionEngine
from services.worker.engine.prompts import Prompts, eos_tokens
from services.worker.engine.scheduler import SchedulerConfig
from services.worker.engine.stable import sum_in_one_order
from services.worker.multi_task.description import HEADS_FILE, Description
from services.worker.multi_task.model import load_for_serving
from services.worker.protocol import ModelSpec
from shared.domain.errors import ModelRefused
from shared.domain.prepared_tasks import vector_shape
from shared.model_files import DEFAULT_KV_TOKENS, context_of

DEFAULT_CONTEXT = 2048
GPU_STEPS = SchedulerConfig(step_tokens=4096, online_step_tokens=1024)
"""A GPU has read all weights of a large model before it has multiplied them with 200 tokens; 4,096 take 0.1 s."""
_WRONG_WEIGHTS = ("Error(s) in loading state_dict", "You set `ignore_mismatched_sizes`", "We encountered some issues")
"""How transformers says that weights do not fit the model of their config.json."""


def kv_blocks(context: int, kv_tokens: int = DEFAULT_KV_TOKENS) -> int:
    """Return how many blocks a model's KV cache has: for so many tokens, or for one sequence of full length."""
    return -(-max(kv_tokens, context) // BLOCK_TOKENS)


def model_bytes(spec: ModelSpec, kv_tokens: int = DEFAULT_KV_TOKENS) -> int:
    """Return what a model will hold in memory: its weights in the served number type, and its KV cache.

    For an adapter, what it takes beside its base.
    """
    if spec.adapter:
        return adapter_bytes(Path(spec.adapter), _width(spec.dtype))
    if spec.kind == "multi_task":
        return _heads_bytes(spec)
    config = _config(spec)
    weights = _weight_bytes(spec, config)
    if spec.kind == "encoder":
        return weights
    blocks = kv_blocks(_context(spec, config), kv_tokens)
    return weights + blocks * BLOCK_TOKENS * kv_bytes_per_token(config, _width(spec.dtype))


def _heads_bytes(spec: ModelSpec) -> int:
    """Return what a multi-task model holds: the trunk's weights, and the heads', which are small."""
    own = {path.name: path.stat().st_size for path in Path(spec.heads).glob("*.safetensors")}
    if not (Path(spec.source) / "config.json").exists():
        return sum(own.values())  # the built-in backbone
    beside = own.get(HEADS_FILE, 0) if spec.source == spec.heads else sum(own.values())
    return beside + _weight_bytes(spec, _config(spec))


def _config(spec: ModelSpec) -> dict[str, Any]:
    try:
        config: dict[str, Any] = orjson.loads((Path(spec.source) / "config.json").read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelRefused(f"Its files cannot be read: {error}") from None
    return config


def _weight_bytes(spec: ModelSpec, config: dict[str, Any]) -> int:
    try:
        stored = sum(path.stat().st_size for path in Path(spec.source).glob("*.safetensors"))
    except OSError as error:
        raise ModelRefused(f"Its files cannot be read: {error}") from None
    if stored == 0:
        raise ModelRefused("Its weights are gone.")
    stored_width = _width(str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    width = _width(spec.dtype)
    weights = math.ceil(stored / stored_width * width)
    if spec.kind not in ("encoder", "multi_task") and config.get("tie_word_embeddings", True):
        # The head is the embedding's table once more, in the form that products want.
        weights += config.get("vocab_size", 0) * (config.get("hidden_size") or config.get("n_embd") or 0) * width
    return weights


def _context(spec: ModelSpec, config: dict[str, Any]) -> int:
    """Return how many tokens a sequence may have: what was registered, or what the model was made for."""
    own = context_of(config) or DEFAULT_CONTEXT
    return min(spec.context_length or own, own)


def _width(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "float16") else 4


def load_model(spec: ModelSpec, device: str, kv_tokens: int = DEFAULT_KV_TOKENS) -> Engine:
    """Load a model onto `device` (`cpu:N` or `cuda:N`) and return its engine, with a KV cache of so many tokens.

    `CUDA_VISIBLE_DEVICES` shows this process one GPU, so that is always `cuda:0` here.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    is_gpu = device.startswith("cuda")
    if is_gpu:
        sum_in_one_order()
    try:
        return _load(spec, torch.device("cuda:0" if is_gpu else "cpu"), kv_tokens)
    except RuntimeError as error:
        if is_out_of_memory(error) or not str(error).startswith(_WRONG_WEIGHTS):
            raise
        raise ModelRefused("Its weights have not the shapes that its config.json tells of.") from error
    except (OSError, ValueError, KeyError, AttributeError, ImportError, SafetensorError) as error:
        # What transformers raises for files that are missing, cut off, of no known kind, or want code of their own.
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelRefused(f"Its files cannot be loaded: {first_line[:300]}") from error


def _load(spec: ModelSpec, torch_device: torch.device, kv_tokens: int) -> Engine:
    if spec.kind == "multi_task":
        return _prediction_engine(spec, torch_device)
    tokenizer = AutoTokenizer.from_pretrained(spec.source, local_files_only=True, trust_remote_code=False)
    auto_class = AutoModel if spec.kind == "encoder" else AutoModelForCausalLM
    model: Any
    model, found = auto_class.from_pretrained(
        spec.source,
        dtype=getattr(torch, spec.dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    _refuse_missing(found["missing_keys"], spec.kind)
    model = model.to(torch_device).eval()
    if spec.kind == "encoder":
        return EncoderEngine(model, tokenizer, _encoder_settings(spec))
    return _generation_engine(model, tokenizer, spec, kv_tokens)


def _prediction_engine(spec: ModelSpec, device: torch.device) -> PredictionEngine:
    """Return the engine of a multi-task model, whose weights are its own or an adapter on its base's."""
    directory = Path(spec.heads)
    description = Description.read(directory)
    base = Path(spec.source) if description.sharing == "lora" else None
    dtype = getattr(torch, spec.dtype)
    model = load_for_serving(directory, base, dtype, device)
    shape = vector_shape(description.base)
    if shape is not None:
        return PredictionEngine(model, None, 1, shape[0])
    tokenizer = AutoTokenizer.from_pretrained(spec.source, local_files_only=True, trust_remote_code=False)
    context = description.max_length or _context(spec, _config(spec))
    return PredictionEngine(model, tokenizer, context, 0, truncate=description.truncate)


def _refuse_missing(names: Collection[str], kind: str) -> None:
    """Raise ModelRefused when weights were not in the files: transformers fills them with random numbers."""
    # Vectors are pooled by ourselves, so an encoder may lack the layer that does it in a classifier.
    missing = sorted(name for name in names if not (kind == "encoder" and name.startswith("pooler.")))
    if missing:
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelRefused(f"Its files lack weights that its config.json tells of: {named}.")


def _generation_engine(model: Any, tokenizer: Any, spec: ModelSpec, kv_tokens: int) -> GenerationEngine:
    config = model.config.get_text_config()
    context = _context(spec, config.to_dict())
    prompts = Prompts(tokenizer, config.vocab_size, context, eos_tokens(model, tokenizer))
    blocks = kv_blocks(context, kv_tokens)
    is_gpu = model.device.type == "cuda"
    steps = GPU_STEPS if is_gpu else SchedulerConfig()
    return GenerationEngine(build_decoder(model, context, blocks), prompts, blocks, steps, plans_ahead=is_gpu)


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
