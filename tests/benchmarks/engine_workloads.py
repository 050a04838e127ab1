"""What `make bench-engine` runs: shapes of models with random weights, and three workloads drawn from a seed."""

import random
from dataclasses import asdict, dataclass
from pathlib import Path

VOCABULARY = 8192
FIRST_TOKEN = 3
"""Prompts are of tokens from here on: those before it are special."""

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
    "olmo2": ("Olmo2Config", LLAMA | {"pad_token_id": 0}),
}
"""Class and arguments of each configuration; `olmo2` stands for all that run through transformers' own modules."""
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
}
"""Instead of the same fields of a shape with `--quick`, which tries the benchmark out and measures nothing."""


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
        """Return the requests: every prompt length with every answer length, contents and order from the seed.

        Two seeds share no prompt: a round whose prompts an engine has seen would measure its cache.
        """
        generator = random.Random(seed)
        pairs = [
            (self.prompts[i % len(self.prompts)], self.answers[i // len(self.prompts) % len(self.answers)])
            for i in range(self.requests)
        ]
        generator.shuffle(pairs)
        return [Job([generator.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(p)], a) for p, a in pairs]


WORKLOADS = {
    "mixed": Workload(48, (12, 30, 60, 120, 240), (8, 16, 32, 64, 128)),
    "long-prompts": Workload(48, (256, 384, 512), (8, 16)),
    "long-answers": Workload(48, (8, 16, 32), (64, 96, 128)),
}
QUICK_WORKLOADS = {
    "mixed": Workload(8, (12, 30), (4, 8)),
    "long-prompts": Workload(6, (64, 96), (2, 4)),
    "long-answers": Workload(6, (8, 16), (12, 16)),
}


def as_json(jobs: list[Job]) -> list[dict]:
    return [asdict(job) for job in jobs]


def make_config(name: str, *, is_quick: bool = False):
    """Return the transformers configuration of a shape."""
    import transformers

    class_name, arguments = SHAPES[name]
    if is_quick:
        arguments = arguments | {field: value for field, value in SMALL.items() if field in arguments}
    return getattr(transformers, class_name)(**arguments)


def make_model(name: str, directory, dtype: str, *, is_quick: bool = False) -> Path:
    """Write a model of this shape with random weights, and a tokenizer whose words are the tokens' numbers."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = make_config(name, is_quick=is_quick)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
    number_tokenizer().save_pretrained(directory)
    return Path(directory)


def number_tokenizer(vocabulary: int = VOCABULARY):
    """Return a tokenizer that writes token 17 as `17`: an answer's text says which tokens were drawn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(token): token for token in range(vocabulary)}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
