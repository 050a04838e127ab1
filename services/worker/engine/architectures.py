"""Makes a `FusedDecoder` of a transformers model, for the shapes whose parts are known here by name.

Modules are taken out of the model one layer after another, so that its weights are never there twice.
"""

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch

from services.worker.engine.decoder import Layer, Weights
from services.worker.engine.kernels.kernels import Activation, HeadNorms, HeadShape, Norm, Rotary
from services.worker.engine.linear import Linear, Part

Names = Mapping[int, str]
"""What each module of the model, by its id, is called in it: adapters speak of modules by these names."""

LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")
"""Position encodings that change with the longest sequence at hand: a token would depend on its neighbours."""


def fused_weights(model: Any, positions: int) -> Weights | None:
    """Return the model's weights joined for `FusedDecoder`, the model emptied; None for other architectures.

    `positions`: how many tokens a sequence may have.
    """
    read = _READERS.get(model.config.model_type)
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if read is None or rope in LENGTH_DEPENDENT_ROPES:
        return None
    return read(model, positions)


def _llama_like(model: Any, positions: int) -> Weights:
    """Llama, Mistral, Qwen2, Qwen3 and Gemma: RMS norms, rotary positions, a gated MLP."""
    core, config, names = model.model, model.config, _names(model)
    # Gemma stores its norms' weights less one.
    offset = 1.0 if config.model_type == "gemma" else 0.0
    rotary = _rotary(core.rotary_emb, positions, model.dtype)
    norm = _rms_norm(core.norm, offset)
    layers = _take_apart(core.layers, lambda layer: _llama_layer(layer, config, names, rotary, offset))
    activation: Activation = "silu" if config.hidden_act == "silu" else "gelu_tanh"
    head = Linear(model.lm_head.weight.detach(), model.lm_head.bias)
    return Weights(core.embed_tokens, None, rotary, layers, norm, head, activation, is_gated=True)


def _llama_layer(layer: Any, config: Any, names: Names, rotary: Rotary, offset: float) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    size: int = attention.head_dim
    head_norms = None
    if getattr(attention, "q_norm", None) is not None:
        head_norms = HeadNorms(attention.q_norm.weight.detach(), attention.k_norm.weight.detach())
    shape = HeadShape(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        size=size,
        rotated=rotary.cosines.shape[1],
        scale=attention.scaling,
        window=_window(attention, config),
        epsilon=config.rms_norm_eps,
    )
    return Layer(
        shape=shape,
        attention_norm=_rms_norm(layer.input_layernorm, offset),
        qkv=_joined(names, attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=head_norms,
        output=_joined(names, attention.o_proj),
        mlp_norm=_rms_norm(layer.post_attention_layernorm, offset),
        up=_joined(names, mlp.gate_proj, mlp.up_proj),
        down=_joined(names, mlp.down_proj),
    )


def _window(attention: Any, config: Any) -> int:
    """Return how many keys a token of this layer sees, 0 for all. Qwen sets it on the module, Mistral on the config."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or 0
    return (getattr(config, "sliding_window", None) or 0) if config.model_type == "mistral" else 0


def _gpt2(model: Any, positions: int) -> Weights:
    """Layer norms, learned positions, one matrix for queries, keys and values as it is; matrices stored transposed."""
    core, config, names = model.transformer, model.config, _names(model)
    norm = _layer_norm(core.ln_f)
    layers = _take_apart(core.h, lambda layer: _gpt2_layer(layer, config, names))
    head = Linear(model.lm_head.weight.detach())
    table = core.wpe.weight.detach()[:positions]
    return Weights(core.wte, table, None, layers, norm, head, "gelu_tanh", is_gated=False)


def _gpt2_layer(layer: Any, config: Any, names: Names) -> Layer:
    size = config.n_embd // config.n_head
    return Layer(
        shape=HeadShape(config.n_head, config.n_head, size, scale=size**-0.5),
        attention_norm=_layer_norm(layer.ln_1),
        qkv=_transposed(names, layer.attn.c_attn),
        head_norms=None,
        output=_transposed(names, layer.attn.c_proj),
        mlp_norm=_layer_norm(layer.ln_2),
        up=_transposed(names, layer.mlp.c_fc),
        down=_transposed(names, layer.mlp.c_proj),
    )


_READERS: dict[str, Callable[[Any, int], Weights]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "gemma": _llama_like,
    "gpt2": _gpt2,
}


def _take_apart(layers: Any, read: Callable[[Any], Layer]) -> list[Layer]:
    taken = []
    for number in range(len(layers)):
        taken.append(read(layers[number]))
        layers[number] = torch.nn.Identity()  # its own matrices are free from here on
    return taken


def _names(model: Any) -> Names:
    return {id(module): name for name, module in model.named_modules()}


def _joined(names: Names, *linears: Any) -> Linear:
    weight = torch.cat([linear.weight.detach() for linear in linears])
    widths = [linear.out_features for linear in linears]
    starts = [end - width for end, width in zip(accumulate(widths), widths, strict=True)]
    parts = [Part(names[id(linear)], *place) for linear, *place in zip(linears, starts, widths, strict=True)]
    if all(linear.bias is None for linear in linears):
        return Linear(weight, None, parts)
    # A part without a bias has one of zeros beside parts that have one.
    biases = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears
    ]
    return Linear(weight, torch.cat([bias.detach() for bias in biases]), parts)


def _transposed(names: Names, convolution: Any) -> Linear:
    weight = convolution.weight.detach().t().contiguous()
    return Linear(weight, convolution.bias.detach(), [Part(names[id(convolution)], 0, weight.shape[0])])


def _rms_norm(norm: Any, offset: float) -> Norm:
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return Norm(norm.weight.detach(), None, epsilon, offset)


def _layer_norm(norm: Any) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)


@torch.inference_mode()
def _rotary(module: Any, positions: int, dtype: torch.dtype) -> Rotary:
    """Return the model's own table of positions, in the number type in which the model has it, held as float32."""
    device = module.inv_freq.device
    sample = torch.zeros(1, dtype=dtype, device=device)
    cosines, sines = module(sample, torch.arange(positions, device=device)[None])
    return Rotary(cosines[0].float().contiguous(), sines[0].float().contiguous())
