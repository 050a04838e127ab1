"""What `make bench-engine` runs: shapes of models with random weights, and three workloads drawn from a seed."""

import random
from dataclasses import asdict, dataclass

VOCABULARY = 8192

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "bos_token_id": None,
}
"""SmolLM-135M's shape, but for the vocabulary."""
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 2048, "eos_token_id": 0}
SHAPES = {
    "llama": ("LlamaConfig", LLAMA),
    "qwen3": ("Qwen3Config", LLAMA | {"head_dim": 64}),
    "gpt2": ("GPT2Config", GPT2),
    "phi3": ("Phi3Config", LLAMA | {"pad_token_id": 0}),
}
"""Class and arguments of each configuration; `phi3` stands for all architectures that run through transformers' modules."""


@dataclass(frozen=True)
class Job:
    """One request: a prompt of token ids, and how many tokens to generate, greedily."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """`prompts` and `answers` are lengths from which each request's are taken in turn."""

    requests: int
    prompts: tuple[int, ...]
    answers: tuple[int, ...]

    def jobs(self, seed: int) -> list[Job]:
        """Return the requests: every prompt length with every answer length, contents and order from the seed."""
        generator = random.Random(seed)
        pairs = [
            (self.prompts[i % len(self.prompts)], self.answers[i // len(self.prompts) % len(self.answers)])
            for i in range(self.requests)
        ]
        generator.shuffle(pairs)
        return [Job([generator.randrange(3, VOCABULARY) for _ in range(p)], a) for p, a in pairs]

    def as_json(self, seed: int) -> list[dict]:
        return [asdict(job) for job in self.jobs(seed)]


WORKLOADS = {
    "mixed": Workload(48, (12, 30, 60, 120, 240), (8, 16, 32, 64, 128)),
    "long-prompts": Workload(48, (256, 384, 512), (8, 16)),
    "long-answers": Workload(48, (12, 24, 48), (96, 128, 192)),
}


def make_model(name: str, directory, dtype: str) -> None:
    """Write a model of this shape with random weights, without a tokenizer."""
    import torch
    import transformers

    class_name, arguments = SHAPES[name]
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
