"""llama.cpp through its low-level batch API, all sequences in one context: `MODEL DTYPE THREADS BATCH UBATCH`.

The model is a Llama directory of transformers; it is written as GGUF beside itself first. Greedy, as the other peers.
"""

import sys
from pathlib import Path

import numpy as np

from tests.benchmarks.peers.rounds import serve_rounds

MOST_SEQUENCES = 64
CONTEXT = 48 * 640


def write_gguf(directory: Path, dtype: str) -> Path:
    """Return the GGUF file of a Llama, made now if there is none. Queries and keys are permuted as llama.cpp wants."""
    import gguf
    import torch
    from transformers import LlamaForCausalLM

    path = directory / f"{dtype}.gguf"
    if path.exists():
        return path
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    kind = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}[dtype]
    for name, tensor in _named(model, config):
        array = tensor.detach().float().contiguous().numpy()
        is_matrix = array.ndim == 2
        quantized = gguf.quants.quantize(array, kind) if is_matrix else array
        writer.add_tensor(name, quantized, raw_dtype=kind if is_matrix else gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _named(model, config):
    def permuted(weight, heads):
        out, width = weight.shape
        return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)

    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight
        yield f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight
        yield f"blk.{i}.attn_q.weight", permuted(attention.q_proj.weight, config.num_attention_heads)
        yield f"blk.{i}.attn_k.weight", permuted(attention.k_proj.weight, config.num_key_value_heads)
        yield f"blk.{i}.attn_v.weight", attention.v_proj.weight
        yield f"blk.{i}.attn_output.weight", attention.o_proj.weight
        yield f"blk.{i}.ffn_gate.weight", mlp.gate_proj.weight
        yield f"blk.{i}.ffn_up.weight", mlp.up_proj.weight
        yield f"blk.{i}.ffn_down.weight", mlp.down_proj.weight


class Batched:
    """Every step: a token of each running sequence, then as much of the waiting prompts as the batch has room for."""

    def __init__(self, path: Path, threads: int, batch: int, ubatch: int, *, flash: bool) -> None:
        import llama_cpp

        self._api = llama_cpp
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_SILENT, None)
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, batch, ubatch, MOST_SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        params.flash_attn_type = 1 if flash else 0
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch_tokens = batch
        self._batch = llama_cpp.llama_batch_init(batch, 0, 1)

    def run(self, jobs: list[dict]) -> int:
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        waiting = [[number, job["prompt"], 0, job["max_tokens"]] for number, job in enumerate(jobs)]
        running: dict[int, list[int]] = {}  # sequence -> [last token, position, tokens left]
        made = 0
        while waiting or running:
            wanted = self._fill(waiting, running)
            if api.llama_decode(self._context, self._batch) != 0:
                raise RuntimeError("llama_decode failed")
            for row, sequence in wanted:
                token = self._likeliest(row)
                state = running[sequence]
                state[0], state[2] = token, state[2] - 1
                made += 1
                if state[2] == 0:
                    del running[sequence]
                    api.llama_memory_seq_rm(api.llama_get_memory(self._context), sequence, -1, -1)
        return made

    def _fill(self, waiting, running) -> list[tuple[int, int]]:
        wanted, self._batch.n_tokens = [], 0
        for sequence, state in running.items():
            wanted.append((self._put(state[0], state[1], sequence, logits=True), sequence))
            state[1] += 1
        while waiting and self._batch.n_tokens < self._batch_tokens:
            entry = waiting[0]
            sequence, prompt, done, limit = entry
            count = min(len(prompt) - done, self._batch_tokens - self._batch.n_tokens)
            for position in range(done, done + count):
                is_last = position == len(prompt) - 1
                row = self._put(prompt[position], position, sequence, logits=is_last)
                if is_last:
                    wanted.append((row, sequence))
                    running[sequence] = [0, len(prompt), limit]
            entry[2] += count
            if entry[2] == len(prompt):
                waiting.pop(0)
        return wanted

    def _put(self, token: int, position: int, sequence: int, *, logits: bool) -> int:
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row], batch.pos[row], batch.n_seq_id[row], batch.seq_id[row][0] = token, position, 1, sequence
        batch.logits[row] = logits
        batch.n_tokens += 1
        return row

    def _likeliest(self, row: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def _silent_logger():
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


_SILENT = _silent_logger()


def main() -> None:
    directory, dtype, threads, batch, ubatch, flash = sys.argv[1:7]
    path = write_gguf(Path(directory), dtype)
    serve_rounds(Batched(path, int(threads), int(batch), int(ubatch), flash=flash == "flash").run)


if __name__ == "__main__":
    main()
