"""Chooses how a model is computed, and makes sure that the choice computes what transformers does."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from services.worker.engine.architectures import fused_weights
from services.worker.engine.decoder import Decoder, FusedDecoder, Weights
from services.worker.engine.kernels.compile import NoCompilerError
from services.worker.engine.kernels.cpu import CpuKernels
from services.worker.engine.kernels.kernels import BLOCK_TOKENS, HeadShape, Kernels, Span, plan_layout
from services.worker.engine.kernels.reference import TorchKernels
from services.worker.engine.transformers_decoder import TransformersDecoder
from shared.domain.errors import ModelRefused

log = logging.getLogger(__name__)

PROBE_TOKENS = 40
TOLERANCE = {torch.float32: 1e-3}
LOW_PRECISION_TOLERANCE = 0.1
"""How far logits may be from transformers' own, relative to their length: far less than a wrong model is off."""


def build_decoder(model: Any, context: int, blocks: int) -> Decoder:
    """Return the fastest decoder for a loaded model, which is taken apart for it; raises ModelRefused."""
    probe = [
        int(token) for token in torch.arange(1, PROBE_TOKENS + 1) * 7919 % model.config.get_text_config().vocab_size
    ]
    probe = probe[:context]
    expected = _expected_logits(model, probe)
    weights = fused_weights(model, context)
    decoder: Decoder
    if weights is not None:
        kernels = pick_kernels([layer.shape for layer in weights.layers], weights.norm.weight)
        decoder = _fused_decoder(weights, kernels, context, blocks)
    else:
        decoder = TransformersDecoder(model, pick_kernels, blocks)
    _compare(decoder, probe, expected, model.dtype)
    return decoder


def _fused_decoder(weights: Weights, kernels: Kernels, context: int, blocks: int) -> Decoder:
    if weights.norm.weight.device.type != "cuda" or type(kernels) is TorchKernels:
        return FusedDecoder(weights, kernels, blocks)
    from services.worker.engine.graphs import GraphedDecoder  # which needs Triton

    return GraphedDecoder(FusedDecoder(weights, kernels, blocks + 1), context, blocks)


def pick_kernels(shapes: Sequence[HeadShape], like: torch.Tensor) -> Kernels:
    """Return the kernels for attention of all layers' shapes; `like` is a weight of one row's length."""
    if like.device.type == "cuda":
        return _gpu_kernels(shapes, like)
    if like.device.type != "cpu" or not all(CpuKernels.supports(shape, like.shape[-1], like.dtype) for shape in shapes):
        return TorchKernels()
    try:
        return CpuKernels()
    except NoCompilerError as error:
        log.warning("slow kernels: %s", error)
        return TorchKernels()


def _gpu_kernels(shapes: Sequence[HeadShape], like: torch.Tensor) -> Kernels:
    """Return the kernels in Triton, which wants a C compiler and knows no GPU that is too old or too small."""
    try:
        from services.worker.engine.kernels.gpu import GpuKernels

        GpuKernels().try_out(shapes, like.dtype, like.device)
    except Exception as error:  # noqa: BLE001  # whatever is missing, slow kernels serve
        log.warning("slow kernels: %s", error)
        return TorchKernels()
    return GpuKernels()


@torch.inference_mode()
def _expected_logits(model: Any, probe: list[int]) -> torch.Tensor:
    try:
        logits: torch.Tensor = model(torch.tensor([probe], device=model.device), use_cache=False).logits[0].float()
    except Exception as error:
        raise ModelRefused(f"transformers cannot compute it: {error}") from error
    return logits


def _compare(decoder: Decoder, probe: list[int], expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Compute a few tokens in two steps and compare; raises ModelRefused when the results are apart."""
    half = len(probe) // 2
    table = list(range(-(-len(probe) // BLOCK_TOKENS)))
    parts = []
    for start, end in ((0, half), (half, len(probe))):
        layout = plan_layout([Span(table, start, 0, end - start)])
        # Its own copy: the next step writes its logits into the same memory.
        tokens = torch.tensor(probe[start:end], device=decoder.device)
        parts.append(decoder.forward(tokens, layout, list(range(end - start))).clone())
    distance = float((torch.cat(parts) - expected).norm() / expected.norm())
    if not distance <= TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE):
        raise ModelRefused(f"Its architecture is not supported: results are {distance:.2g} from transformers'.")


def kv_bytes_per_token(config: dict[str, Any], width: int) -> int:
    """Return the KV cache's bytes a token, from a model's config.json; `width` is the number type's bytes."""
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    head_size = config.get("head_dim") or hidden // heads
    return int(2 * layers * (config.get("num_key_value_heads") or heads) * head_size * width)
