"""Row: 16 LoRA adapters of ranks 4 to 64 mixed in one batch, beside the base alone on the same engine.

python -m tests.benchmarks.engine_adapters [--rounds N] [--quick]    # all workloads, and all linear layers adapted too

Rounds alternate; each has prompts that neither side has seen. What is compared are tokens a second of the same jobs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.engine_workloads import QUICK_WORKLOADS, WORKLOADS, Job, Workload, make_model

SEED = 4
CONTEXT = 2048
DTYPES = ("float32", "bfloat16")
ADAPTERS = 16
RANKS = (4, 8, 16, 32, 64)
BAR = 0.80
TARGETS = {"q, v": None, "all linear": "all-linear"}
"""What is adapted: PEFT's own choice for the shape, which the bar is about, and everything but the head."""


@dataclass
class Samples:
    """Tokens a second of both sides, round by round."""

    base: list[float] = field(default_factory=list)
    adapters: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Adapters over base, of medians."""
        return statistics.median(self.adapters) / statistics.median(self.base)

    def pairs(self) -> list[dict[str, float]]:
        return [{"adapters": a, "base": b} for a, b in zip(self.adapters, self.base, strict=True)]


def write_adapters(model: Path, directory: Path, targets: str | None) -> list[str]:
    """Write adapters with random weights, the ranks taken in turn; return their directories."""
    import transformers
    from peft import LoraConfig, get_peft_model

    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    adapted = None
    names = [f"adapter-{number}" for number in range(ADAPTERS)]
    for number, name in enumerate(names):
        rank = RANKS[number % len(RANKS)]
        config = LoraConfig(r=rank, lora_alpha=16 * rank, target_modules=targets, init_lora_weights=False,
                            task_type="CAUSAL_LM")  # fmt: skip
        if adapted is None:
            adapted = get_peft_model(base, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    adapted.save_pretrained(directory)
    return [str(directory / name) for name in names]


@contextmanager
def engine_with_adapters(dtype: str, targets: str | None, *, is_quick: bool = False) -> Iterator[tuple]:
    """Yield an engine with all adapters attached, and their directories."""
    from services.worker.engine.loading import load_model
    from services.worker.protocol import ModelSpec

    with tempfile.TemporaryDirectory(prefix="lamplighter-bench-adapters-") as name:
        model = make_model("llama", Path(name) / "model", dtype, is_quick=is_quick)
        adapters = write_adapters(model, Path(name) / "adapters", targets)
        engine = load_model(ModelSpec("base", "causal_lm", str(model), dtype=dtype, context_length=CONTEXT), "cpu:0")
        for directory in adapters:
            engine.attach(directory, engine.load_adapter(directory))
        yield engine, adapters
        engine.close()


def measure(engine, adapters: list[str], workload: Workload, rounds: int) -> Samples:
    """Run rounds of the workload on the base alone and with an adapter for each request, in turn."""
    samples = Samples()
    for number in range(rounds):
        jobs = workload.jobs(SEED + number)
        base_rate, base_answers = _run(engine, jobs, [""])
        rate, answers = _run(engine, jobs, adapters)
        assert answers != base_answers, "adapters changed nothing"
        samples.base.append(base_rate)
        samples.adapters.append(rate)
    return samples


def _run(engine, jobs: list[Job], adapters: list[str]) -> tuple[float, list[str]]:
    """Return tokens a second, and the answers."""
    from services.worker.protocol import Request, SamplingParams

    started = time.perf_counter()
    for number, job in enumerate(jobs):
        params = SamplingParams(max_tokens=job.max_tokens, temperature=0, ignore_eos=True)
        adapter = adapters[number % len(adapters)]
        engine.add(Request(number, "complete", prompts=[job.prompt], params=params, adapter=adapter))
    answers: dict[int, str] = {}
    while len(answers) < len(jobs):
        for response in engine.step().responses:
            assert response.fault is None, response.fault
            answers[response.id] = response.choices[0][0]
    seconds = time.perf_counter() - started
    engine.check_integrity()
    return sum(job.max_tokens for job in jobs) / seconds, [answers[number] for number in range(len(jobs))]


def bench_adapters(table, rounds: int, *, is_quick: bool = False) -> None:
    """Add the row of the bar in both number types, and what adapting all linear layers costs."""
    workload = (QUICK_WORKLOADS if is_quick else WORKLOADS)["mixed"]
    for name, targets in TARGETS.items():
        for dtype in DTYPES:
            with engine_with_adapters(dtype, targets, is_quick=is_quick) as (engine, adapters):
                measure(engine, adapters, QUICK_WORKLOADS["mixed"], 1)
                samples = measure(engine, adapters, workload, rounds)
            is_bar = targets is None
            table.add(
                f"engine-6-{dtype}" if is_bar else f"engine-6-all-linear-{dtype}",
                f"{ADAPTERS} adapters ({name}) ÷ base only, mixed, {dtype}",
                samples.ratio,
                "",
                f"≥ {BAR:.2f}" if is_bar else "said",
                samples.ratio >= BAR or not is_bar,
                samples.pairs(),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model: tries it out and measures nothing")
    arguments = parser.parse_args()
    workloads = QUICK_WORKLOADS if arguments.quick else WORKLOADS
    for targets, value in TARGETS.items():
        for dtype in DTYPES:
            with engine_with_adapters(dtype, value, is_quick=arguments.quick) as (engine, adapters):
                measure(engine, adapters, QUICK_WORKLOADS["mixed"], 1)
                for name, workload in workloads.items():
                    samples = measure(engine, adapters, workload, arguments.rounds)
                    rates = (
                        f"{statistics.median(samples.adapters):.1f} of {statistics.median(samples.base):.1f} tokens/s"
                    )
                    print(f"{dtype}, {targets}, {name}: {samples.ratio:.3f} ({rates})", flush=True)


if __name__ == "__main__":
    main()
