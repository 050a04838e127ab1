"""Writes a transformers model of Llama's, Qwen3's or GPT-2's shape as GGUF, for llama.cpp."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM

KINDS = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}
Named = Iterator[tuple[str, torch.Tensor]]


def write_gguf(directory: Path, dtype: str) -> Path:
    """Return the GGUF file of a model directory, made now if there is none. Matrices are of `dtype`, vectors float32."""
    path = directory / f"{dtype}.gguf"
    if path.exists():
        return path
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config, kind = model.config, KINDS[dtype]
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    if config.model_type == "gpt2":
        _describe_gpt2(writer, config)
        tensors = _gpt2_tensors(model)
    else:
        _describe_llama_like(writer, config)
        tensors = _llama_like_tensors(model)
    for name, tensor in tensors:
        array = tensor.detach().float().contiguous().numpy()
        is_matrix = array.ndim == 2 and name != "position_embd.weight"  # which is added, not multiplied
        stored = gguf.quants.quantize(array, kind) if is_matrix else array
        writer.add_tensor(name, stored, raw_dtype=kind if is_matrix else gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe_llama_like(writer: gguf.GGUFWriter, config) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)


def _llama_like_tensors(model) -> Named:
    config = model.config

    def ordered(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """Return queries or keys as llama.cpp wants them: a Llama's rotated pairs lie beside each other there."""
        if config.model_type != "llama":
            return weight
        out, width = weight.shape
        return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)

    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight
        yield f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight
        yield f"blk.{i}.attn_q.weight", ordered(attention.q_proj.weight, config.num_attention_heads)
        yield f"blk.{i}.attn_k.weight", ordered(attention.k_proj.weight, config.num_key_value_heads)
        yield f"blk.{i}.attn_v.weight", attention.v_proj.weight
        yield f"blk.{i}.attn_output.weight", attention.o_proj.weight
        yield f"blk.{i}.ffn_gate.weight", mlp.gate_proj.weight
        yield f"blk.{i}.ffn_up.weight", mlp.up_proj.weight
        yield f"blk.{i}.ffn_down.weight", mlp.down_proj.weight
        if config.model_type == "qwen3":
            yield f"blk.{i}.attn_q_norm.weight", attention.q_norm.weight
            yield f"blk.{i}.attn_k_norm.weight", attention.k_norm.weight


def _describe_gpt2(writer: gguf.GGUFWriter, config) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _gpt2_tensors(model) -> Named:
    core = model.transformer
    yield "token_embd.weight", core.wte.weight
    yield "position_embd.weight", core.wpe.weight
    yield "output.weight", model.lm_head.weight
    modules = [("output_norm", core.ln_f)]
    for i, layer in enumerate(core.h):
        modules += [
            (f"blk.{i}.attn_norm", layer.ln_1),
            (f"blk.{i}.attn_qkv", layer.attn.c_attn),
            (f"blk.{i}.attn_output", layer.attn.c_proj),
            (f"blk.{i}.ffn_norm", layer.ln_2),
            (f"blk.{i}.ffn_up", layer.mlp.c_fc),
            (f"blk.{i}.ffn_down", layer.mlp.c_proj),
        ]
    for name, module in modules:
        yield f"{name}.weight", module.weight.t() if module.weight.ndim == 2 else module.weight
        yield f"{name}.bias", module.bias
