"""What an engineer writes in an afternoon: `MODEL DTYPE`. A Llama in plain torch, greedy, token ids in and out.

A place in the cache for each request, query-key-value and gate-up as one matrix each, prompts packed with attention
for each one alone, decoding of all requests at once, padded to the longest. It is the floor, not a rival.
"""

import os
import sys

import torch
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM

from tests.benchmarks.peers.rounds import Answers, serve_rounds

PROMPT_TOKENS = 512
"""Of one packed pass."""


class Llama:
    def __init__(self, model) -> None:
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.epsilon = config.rms_norm_eps
        self.table, self.norm, self.head = (
            model.model.embed_tokens.weight,
            model.model.norm.weight,
            model.lm_head.weight,
        )
        self.layers = [
            (
                layer.input_layernorm.weight,
                torch.cat([getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]),
                layer.self_attn.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
                layer.mlp.down_proj.weight,
            )
            for layer in model.model.layers
        ]
        positions = torch.arange(config.max_position_embeddings)[None]
        cosines, sines = model.model.rotary_emb(self.table[None, :1], positions)
        self.cosines, self.sines = cosines[0, :, None], sines[0, :, None]

    def normed(self, x, weight):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)).to(x.dtype) * weight

    def rotated(self, x, positions):
        first, second = x.chunk(2, dim=-1)
        return x * self.cosines[positions] + torch.cat([-second, first], dim=-1) * self.sines[positions]

    def forward(self, tokens, positions, attend):
        """Return hidden states [T, width]; `attend(number, queries, keys, values)` keeps a layer's keys and values."""
        x = embedding(tokens, self.table)
        widths = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        for number, (norm, qkv, out, mlp_norm, up, down) in enumerate(self.layers):
            parts = linear(self.normed(x, norm), qkv).split(widths, dim=-1)
            queries, keys, values = (part.view(len(tokens), -1, self.size) for part in parts)
            attended = attend(number, self.rotated(queries, positions), self.rotated(keys, positions), values)
            x = x + linear(attended.reshape(len(tokens), -1), out)
            gate, inner = linear(self.normed(x, mlp_norm), up).chunk(2, dim=-1)
            x = x + linear(silu(gate) * inner, down)
        return self.normed(x, self.norm)

    def generate(self, jobs: list[dict]) -> Answers:
        lengths = torch.tensor([len(job["prompt"]) for job in jobs])
        longest = max(len(job["prompt"]) + job["max_tokens"] for job in jobs)
        size = (len(self.layers), len(jobs), longest, self.kv_heads, self.size)
        keys, values = (torch.zeros(size, dtype=self.table.dtype) for _ in range(2))
        first = torch.cat([self.prefill(jobs, group, keys, values) for group in groups(jobs)])
        answers, drawn = [[int(token)] for token in first], first
        left = torch.tensor([job["max_tokens"] - 1 for job in jobs])
        while bool((left > 0).any()):
            rows = (left > 0).nonzero()[:, 0]
            drawn[rows] = self.decode(drawn[rows], lengths[rows], rows, keys, values)
            for row in rows.tolist():
                answers[row].append(int(drawn[row]))
            lengths[rows] += 1
            left[rows] -= 1
        return answers

    def prefill(self, jobs, group, keys, values):
        counts = [len(jobs[row]["prompt"]) for row in group]
        tokens = torch.tensor([token for row in group for token in jobs[row]["prompt"]])
        positions = torch.cat([torch.arange(count) for count in counts])

        def attend(number, query, key, value):
            outs = []
            for row, *mine in zip(group, *(part.split(counts) for part in (query, key, value)), strict=True):
                keys[number, row, : len(mine[1])], values[number, row, : len(mine[2])] = mine[1:]
                q, k, v = (part.transpose(0, 1)[None] for part in mine)
                outs.append(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
            return torch.cat(outs)

        hidden = self.forward(tokens, positions, attend)
        return linear(hidden[torch.tensor(counts).cumsum(0) - 1], self.head).argmax(-1)

    def decode(self, tokens, lengths, rows, keys, values):
        most = int(lengths.max()) + 1
        mask = (torch.arange(most) <= lengths[:, None])[:, None, None]

        def attend(number, query, key, value):
            keys[number, rows, lengths], values[number, rows, lengths] = key, value
            k, v = (side[number, rows, :most].transpose(1, 2) for side in (keys, values))
            return scaled_dot_product_attention(query[:, :, None], k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]

        return linear(self.forward(tokens, lengths, attend), self.head).argmax(-1)


def groups(jobs: list[dict]) -> list[list[int]]:
    """Divide prompts, in their order, into packed passes."""
    found, room = [], 0
    for row, job in enumerate(jobs):
        if room < len(job["prompt"]):
            found.append([])
            room = PROMPT_TOKENS
        found[-1].append(row)
        room -= len(job["prompt"])
    return found


def main() -> None:
    directory, dtype = sys.argv[1:3]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_grad_enabled(False)
    llama = Llama(AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval())
    serve_rounds(llama.generate)


if __name__ == "__main__":
    main()
