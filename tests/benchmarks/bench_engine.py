"""`make bench-engine`: our generation engine beside what users have, and what its promises cost.

Peers need the extra `bench` (llama.cpp is compiled while it is installed); a row whose peer is missing does not hold.
Sides of a ratio run alternately, each in a process of its own that has loaded its model before; ratios are of medians.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.benchmarks.engine_workloads import LLAMA, VOCABULARY, WORKLOADS, make_model
from tests.benchmarks.table import Table
from tests.support.servers import ROOT

SEED = 4
CORES = os.cpu_count() or 1
DTYPES = ("float32", "bfloat16")
BARS = {
    "float32": {"continuous": 2.5, "threads": 6.0, "llama.cpp": 1.1},
    "bfloat16": {"continuous": 3.0, "llama.cpp": 1.4},
}
SWEEP = [(batch, ubatch, flash) for batch, ubatch in ((512, 512), (2048, 512)) for flash in ("flash", "plain")]
"""Settings of llama.cpp: tokens of a batch, of a micro-batch, and whether its fused attention is used."""


class Side:
    """A process that serves rounds of jobs (`tests.benchmarks.peers.rounds`)."""

    def __init__(self, *command: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(CORES), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{command} did not start")

    def rate(self, jobs: list[dict]) -> float:
        """Run the jobs; return generated tokens a second."""
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert answer["tokens"] == sum(job["max_tokens"] for job in jobs), "a side did not generate what was asked"
        return answer["rate"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def side(*command: str):
    running = Side(*command)
    try:
        yield running
    finally:
        running.close()


def alternate(sides: dict[str, Side], jobs: list[dict], rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, running in sides.items():
            rates[name].append(running.rate(jobs))
    return rates


def best_llama_cpp(model: str, dtype: str, jobs: list[dict]) -> tuple[str, ...]:
    """Return the command of llama.cpp's fastest settings on these jobs, of a small sweep."""
    rates = {}
    for batch, ubatch, flash in SWEEP:
        command = ("tests.benchmarks.peers.llama_cpp_batched", model, dtype, str(CORES), str(batch), str(ubatch), flash)
        with side(*command) as running:
            rates[command] = running.rate(jobs)
            print(f"    llama.cpp {dtype} {batch}/{ubatch} {flash}: {rates[command]:.1f} tokens/s", flush=True)
    return max(rates, key=rates.get)


def gemm_limit(dtype: str) -> float:
    """Return the tokens/s at which the mixed workload's products alone would run, at this machine's rate for them."""
    import torch

    torch.set_num_threads(CORES)
    width, inner, kv, layers = LLAMA["hidden_size"], LLAMA["intermediate_size"], 192, LLAMA["num_hidden_layers"]
    rate = max(_product_rate(torch, dtype, width, inner) for _ in range(5))
    weights = layers * (2 * width * width + 2 * width * kv + 3 * width * inner)
    jobs = WORKLOADS["mixed"].jobs(SEED)
    rows = sum(len(job.prompt) + job.max_tokens - 1 for job in jobs)
    drawn = sum(job.max_tokens for job in jobs)
    return drawn / (2 * (rows * weights + drawn * width * VOCABULARY) / rate)


def _product_rate(torch, dtype: str, width: int, inner: int, rows: int = 512) -> float:
    """Return operations a second of packed products of the MLP's shape."""
    from services.worker.engine.linear import Linear

    linear = Linear(torch.randn(2 * inner, width).to(getattr(torch, dtype)))
    x = torch.randn(rows, width).to(getattr(torch, dtype))
    with torch.inference_mode():
        linear(x)
        started = time.perf_counter()
        for _ in range(20):
            linear(x)
    return 20 * 2 * rows * width * 2 * inner / (time.perf_counter() - started)


def bench_speed(table: Table, directory: Path, rounds: int) -> None:
    """Rows 1: three workloads, two number types, against each peer."""
    has_llama_cpp = importlib.util.find_spec("llama_cpp") is not None
    for dtype in DTYPES:
        model = str(directory / f"llama-{dtype}")
        make_model("llama", model, dtype)
        with ExitStack() as stack:
            commands = {
                "ours": ("tests.benchmarks.direct_engine", model, dtype),
                "continuous": ("tests.benchmarks.peers.transformers_engines", "continuous", model, dtype),
            }
            if "threads" in BARS[dtype]:
                commands["threads"] = ("tests.benchmarks.peers.transformers_engines", "threads", model, dtype)
            if has_llama_cpp:
                commands["llama.cpp"] = best_llama_cpp(model, dtype, WORKLOADS["mixed"].as_json(SEED))
            sides = {name: stack.enter_context(side(*command)) for name, command in commands.items()}
            for workload, shape in WORKLOADS.items():
                rates = alternate(sides, shape.as_json(SEED), rounds)
                _add_ratios(table, workload, dtype, rates)
        limit = gemm_limit(dtype)
        ours = next(r for r in reversed(table.rows) if r["id"] == f"engine-1-mixed-{dtype}-rate")["value"]
        table.add(
            f"engine-1-limit-{dtype}", f"share of the products' own speed, mixed, {dtype}", ours / limit, "", "said", True,
            [ours, limit],
        )  # fmt: skip


def _add_ratios(table: Table, workload: str, dtype: str, rates: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    name = f"engine-1-{workload}-{dtype}"
    table.add(f"{name}-rate", f"{workload}, {dtype}", medians["ours"], "tokens/s", "said", True, rates["ours"])
    for peer, bar in BARS[dtype].items():
        if peer not in medians:
            table.add(f"{name}-{peer}", f"{workload}, {dtype} ÷ {peer} (not installed)", 0.0, "", f"≥ {bar}", False)
            continue
        ratio = medians["ours"] / medians[peer]
        samples = [{"ours": a, peer: b} for a, b in zip(rates["ours"], rates[peer], strict=True)]
        table.add(f"{name}-{peer}", f"{workload}, {dtype} ÷ {peer}", ratio, "", f"≥ {bar}", ratio >= bar, samples)


def make_engine(directory: Path):
    import torch

    from services.worker.engine.loading import load_model
    from services.worker.protocol import ModelSpec
    from tests.support.models import tiny_tokenizer

    torch.set_num_threads(CORES)
    tiny_tokenizer().save_pretrained(directory)
    return load_model(ModelSpec("bench", "causal_lm", str(directory), dtype="float32", context_length=2048), "cpu:0")


def drive(engine, requests) -> tuple[float, int]:
    """Answer the requests; return (seconds, tokens)."""
    started, tokens, done = time.perf_counter(), 0, 0
    for request in requests:
        engine.add(request)
    while done < len(requests):
        for response in engine.step().responses:
            assert response.fault is None, response.fault
            done, tokens = done + 1, tokens + response.completion_tokens
    return time.perf_counter() - started, tokens


def bench_prefix(table: Table, engine) -> None:
    """Row: 64 requests with one system prompt of 512 tokens, and the same of another tenant."""
    from services.worker.protocol import Request, SamplingParams

    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    system = [3 + i * 7 % 8000 for i in range(512)]

    def requests(namespace):
        prompts = [[*system, *(3 + (i * 31 + k) % 8000 for k in range(16))] for i in range(64)]
        return [Request(i, "complete", prompts=[p], params=params, namespace=namespace) for i, p in enumerate(prompts)]

    computed = []
    for namespace in ("one", "two"):
        before = engine.scheduler.prompt_tokens_computed
        drive(engine, requests(namespace))
        computed.append(engine.scheduler.prompt_tokens_computed - before)
    unique = 512 + 64 * 16
    table.add("engine-5", "prompt tokens computed ÷ unique ones", computed[0] / unique, "", "≤ 1.1",
              computed[0] <= 1.1 * unique, computed)  # fmt: skip
    table.add("engine-5-tenants", "the same prompts of another tenant ÷ unique ones", computed[1] / unique, "", "≥ 1",
              computed[1] >= unique, computed)  # fmt: skip


def bench_overhead(table: Table, engine, rounds: int) -> None:
    """Row: time of a step outside the forward pass, 48 sequences."""
    from services.worker.protocol import Request, SamplingParams

    forward, spent = engine._decoder.forward, []

    def timed(*arguments):
        started = time.perf_counter()
        out = forward(*arguments)
        spent.append(time.perf_counter() - started)
        return out

    engine._decoder.forward = timed
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    shares = []
    for r in range(rounds):
        spent.clear()
        requests = [
            Request(i, "complete", prompts=[[3 + (i * 97 + r * 11 + k) % 8000 for k in range(24)]], params=params)
            for i in range(48)
        ]
        seconds, _ = drive(engine, requests)
        shares.append(1 - sum(spent) / seconds)
    engine._decoder.forward = forward
    share = statistics.median(shares)
    table.add(
        "engine-8", "step time outside the forward pass, 48 sequences", share, "", "≤ 0.10", share <= 0.10, shares
    )


def bench_structured(table: Table, engine, rounds: int) -> None:
    """Row: tokens/s of answers that follow a schema, over free ones of the same lengths."""
    from services.worker.protocol import Request, SamplingParams

    schema = json.dumps({"type": "string", "pattern": "^[a-z ]{62}$"})
    rates: dict[str, list[float]] = {"free": [], "schema": []}
    for r in range(rounds):
        for name in rates:
            params = SamplingParams(max_tokens=64, temperature=1.0, seed=r, ignore_eos=True,
                                    schema=schema if name == "schema" else None)  # fmt: skip
            prompts = [[3 + (i * 97 + r * 13 + k) % 250 for k in range(24)] for i in range(48)]
            seconds, tokens = drive(
                engine, [Request(i, "complete", prompts=[p], params=params) for i, p in enumerate(prompts)]
            )
            assert tokens == 48 * 64, "both sides generate the same"
            rates[name].append(tokens / seconds)
    ratio = statistics.median(rates["schema"]) / statistics.median(rates["free"])
    samples = [{"schema": a, "free": b} for a, b in zip(rates["schema"], rates["free"], strict=True)]
    table.add("engine-9", "tokens/s with a schema ÷ without", ratio, "", "≥ 0.85", ratio >= 0.85, samples)


NOT_YET = {
    "engine-1-other": "Qwen and GPT-2 shapes, other architectures",
    "engine-4": "online calls beside a batch of 5,000 lines",
    "engine-6": "16 LoRA adapters in one batch ÷ base only",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="speed, or engine for the rows without peers")
    arguments = parser.parse_args()
    table = Table("engine", "make bench-engine")
    with tempfile.TemporaryDirectory(prefix="lamplighter-bench-engine-") as name:
        directory = Path(name)
        if arguments.only != "engine":
            bench_speed(table, directory, arguments.rounds)
        if arguments.only != "speed":
            make_model("llama", directory / "engine", "float32")
            engine = make_engine(directory / "engine")
            bench_prefix(table, engine)
            bench_overhead(table, engine, arguments.rounds)
            bench_structured(table, engine, arguments.rounds)
            engine.check_integrity()
    for identifier, what in NOT_YET.items():
        table.add(identifier, f"{what} (not built or not measured yet)", 0.0, "", "see the issue", False)
    table.write()
    return 0 if table.holds else 1


if __name__ == "__main__":
    sys.exit(main())
