"""`make bench-gpu`: generation on a GPU; table in build/bench/gpu-generation.json.

A Llama of 8B's shape with random bfloat16 weights, 256 requests at once, 512 tokens in and 512 out, beside transformers'
continuous batching; and the limit that the memory's bandwidth sets, measured in the same run. On a machine without a
GPU it runs on the CPU at a small size, which tries the script out and measures nothing that has a bar.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from tests.benchmarks.engine_sides import Side, side
from tests.benchmarks.engine_workloads import FIRST_TOKEN, Job, number_tokenizer
from tests.benchmarks.table import Table

COPIED_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
TRIALS = 5
BARS = {"continuous": 1.5, "bandwidth": 0.5}


@dataclass(frozen=True)
class Setting:
    """A model's shape, and `requests` prompts of `prompt` tokens that get `answer` tokens each."""

    shape: dict
    requests: int
    prompt: int
    answer: int

    def jobs(self, seed: int) -> list[Job]:
        """Return the requests of a round; two rounds share no prompt."""
        generator = torch.Generator().manual_seed(seed)
        size = (self.requests, self.prompt)
        prompts = torch.randint(FIRST_TOKEN, self.shape["vocab_size"], size, generator=generator)
        return [Job(prompt, self.answer) for prompt in prompts.tolist()]


LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": None,
}
SMALL = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SETTINGS = {"cuda": Setting(LLAMA_8B, 256, 512, 512), "cpu": Setting(SMALL, 8, 32, 16)}


def make_model(setting: Setting, directory: str, device: str) -> int:
    """Write a model with random bfloat16 weights, drawn on the device; return the bytes that a token's pass reads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**setting.shape)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    number_tokenizer(setting.shape["vocab_size"]).save_pretrained(directory)
    looked_up = model.get_input_embeddings().weight
    return sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight is not looked_up)


def bandwidth(device: str) -> float:
    """Return bytes a second that the memory reads and writes in a copy, the best of a few trials."""
    source = torch.ones(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def trial() -> float:
        wait_for(device)
        started = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        return 2 * len(source) / (time.perf_counter() - started)

    trial()
    return max(trial() for _ in range(TRIALS))


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bandwidth_limit(setting: Setting, weight_bytes: int, bytes_a_second: float) -> float:
    """Return tokens a second, were there nothing but each step's reading of all weights and of all keys and values."""
    shape = setting.shape
    head = shape["hidden_size"] // shape["num_attention_heads"]
    token_bytes = 2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head
    lengths = range(setting.prompt, setting.prompt + setting.answer)
    read = sum(weight_bytes + setting.requests * length * token_bytes for length in lengths)
    return setting.requests * setting.answer / (read / bytes_a_second)


def run_sides(setting: Setting, model: Path, device: str, rounds: int) -> dict[str, list[float]]:
    """Return tokens a second of each side, round by round. They take turns, as both fill the GPU's memory."""
    kv_tokens = setting.requests * (setting.prompt + setting.answer)
    commands = {
        "ours": ("tests.benchmarks.engine_ours", str(model), "bfloat16", f"{device}:0", str(kv_tokens)),
        "continuous": (
            "tests.benchmarks.peers.transformers_engines",
            "continuous",
            str(model),
            "bfloat16",
            device,
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            with side(*command) as running:
                warm_up(running)
                rates[name].append(running.run(setting.jobs(number)).rate)
                print(f"    {name}: {rates[name][-1]:.1f} tokens/s", flush=True)
    return rates


def warm_up(running: Side) -> None:
    running.run([Job(list(range(5, 25)), 4)] * 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting, table = SETTINGS[device], Table("gpu-generation")
    with tempfile.TemporaryDirectory(prefix="lamplighter-bench-gpu-") as directory:
        weight_bytes = make_model(setting, directory, device)
        rate = bandwidth(device)
        if device == "cuda":
            torch.cuda.empty_cache()
        rates = run_sides(setting, Path(directory), device, arguments.rounds)
    ours, peer = (statistics.median(rates[name]) for name in ("ours", "continuous"))
    limit = bandwidth_limit(setting, weight_bytes, rate)
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU, small: no figure of a GPU"
    what = f"{setting.requests} requests, {setting.prompt} in, {setting.answer} out, on {name}"
    pairs = [{"ours": a, "continuous": b} for a, b in zip(rates["ours"], rates["continuous"], strict=True)]
    table.add("gpu-1", what, ours, "tokens/s", "said", None, rates["ours"])
    for number, (against, value, samples) in enumerate(
        (("continuous", ours / peer, pairs), ("bandwidth", ours / limit, [ours, limit])), 2
    ):
        bar = BARS[against]
        holds = value >= bar if device == "cuda" else None
        table.add(f"gpu-{number}", f"{what} ÷ {against}", value, "", f"≥ {bar}", holds, samples)
    table.write()
    table.show()
    return 0 if table.holds else 1


if __name__ == "__main__":
    sys.exit(main())
