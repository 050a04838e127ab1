"""Rows 1: our engine beside transformers' continuous batching, a thread pool around `generate()`, and llama.cpp.

Sides alternate; every round has prompts that no side has seen, and each side's tokens are counted answer by answer.
"""

import importlib.util
import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.benchmarks.engine_limit import gemm_limit, product_rate, products_of
from tests.benchmarks.engine_sides import CORES, Round, Side, side
from tests.benchmarks.engine_workloads import QUICK_WORKLOADS, WORKLOADS, Job, Workload, make_model
from tests.benchmarks.table import Table

SEED = 4
DTYPES = ("float32", "bfloat16")
BARS = {
    "float32": {"continuous": 2.5, "threads": 6.0, "llama.cpp": 1.1},
    "bfloat16": {"continuous": 3.0, "llama.cpp": 1.4},
}
OTHER_BARS = {dtype: {"continuous": 1.5} for dtype in DTYPES}
"""For architectures that run through transformers' own modules."""
ONCE = ("threads", "alone", "static", "sorted")
"""What takes minutes for a round has the first one only, all of it."""
SAID = {"float32": ("alone", "static", "sorted", "prototype"), "bfloat16": ("sorted", "prototype")}
"""Ways that have no bar: they are measured on the first shape's mixed workload, to say where the field stands."""
SAME_TOKENS = {"float32": 0.95, "bfloat16": 0.5}
"""Share of requests whose first token all sides draw alike: random weights leave many near ties, in bfloat16 above all."""
NOT_INSTALLED = -1.0


@dataclass(frozen=True)
class Plan:
    """What is measured of a shape: workloads with the rounds of each."""

    letter: str
    shape: str
    dtype: str
    rounds: dict[str, int]
    bars: dict[str, float]


@dataclass
class Samples:
    """What each side made of the rounds of a workload: tokens a second, in order."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    same_first: list[float] = field(default_factory=list)

    def median(self, name: str) -> float:
        return statistics.median(self.rates[name])

    def pairs(self, peer: str) -> list[dict[str, float]]:
        return [{"ours": a, peer: b} for a, b in zip(self.rates["ours"], self.rates[peer], strict=peer not in ONCE)]


def plans(rounds: int) -> list[Plan]:
    """Return what the whole run measures; `rounds` are those of the issue's own workload on the issue's own shape."""
    whole = {"mixed": rounds, "long-prompts": max(1, rounds - 1), "long-answers": max(1, rounds - 1)}
    shapes = [("llama", whole, BARS), ("qwen3", whole, BARS), ("gpt2", whole, BARS),
              ("olmo2", {"mixed": max(1, rounds - 1)}, OTHER_BARS)]  # fmt: skip
    letters = iter("abcdefgh")
    return [
        Plan(next(letters), shape, dtype, counts, bars[dtype]) for shape, counts, bars in shapes for dtype in DTYPES
    ]


def bench_speed(table: Table, rounds: int, *, shapes: list[str], is_quick: bool) -> None:
    """Measure every plan whose shape is among `shapes`; llama.cpp with the settings that suit each number type best."""
    settings: dict[str, dict] = {}
    for plan in plans(rounds):
        if plan.shape not in shapes:
            continue
        with tempfile.TemporaryDirectory(prefix="lamplighter-bench-speed-") as directory:
            model = make_model(plan.shape, directory, plan.dtype, is_quick=is_quick)
            if "llama.cpp" in plan.bars and has_llama_cpp() and plan.dtype not in settings:
                settings[plan.dtype] = best_llama_cpp(model, plan.dtype, is_quick=is_quick)
            _bench_plan(table, plan, model, settings.get(plan.dtype), is_quick=is_quick)


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def _bench_plan(table: Table, plan: Plan, model: Path, settings: dict | None, *, is_quick: bool) -> None:
    workloads = QUICK_WORKLOADS if is_quick else WORKLOADS
    products = products_of(plan.shape, is_quick=is_quick)
    with ExitStack() as stack:
        commands = _commands(plan, model, settings)
        sides = {name: stack.enter_context(side(*command)) for name, command in commands.items()}
        others = SAID[plan.dtype] if plan.shape == "llama" else ()
        said = {name: stack.enter_context(side(*_said(name, model, plan.dtype))) for name in others}
        # Code is loaded and threads are started in the first pass of each.
        for running in (*sides.values(), *said.values()):
            running.run([Job(list(range(5, 25)), 4)])
        for name, rounds in plan.rounds.items():
            is_first = (plan.shape, name) == ("llama", "mixed")
            samples = measure({**sides, **(said if is_first else {})}, workloads[name], rounds)
            operations = product_rate(products.largest, plan.dtype, CORES)
            limit = gemm_limit(products, workloads[name].jobs(SEED), operations)
            _add_rows(table, plan, name, samples, limit)


def _commands(plan: Plan, model: Path, settings: dict | None) -> dict[str, tuple[str, ...]]:
    commands = {
        "ours": ("tests.benchmarks.engine_ours", str(model), plan.dtype),
        "continuous": _transformers("continuous", model, plan.dtype),
    }
    if "threads" in plan.bars:
        commands["threads"] = _transformers("threads", model, plan.dtype)
    if settings is not None and "llama.cpp" in plan.bars:
        commands["llama.cpp"] = _llama_cpp_command(model, plan.dtype, settings)
    return commands


def _transformers(kind: str, model: Path, dtype: str) -> tuple[str, ...]:
    return ("tests.benchmarks.peers.transformers_engines", kind, str(model), dtype)


def _said(name: str, model: Path, dtype: str) -> tuple[str, ...]:
    if name == "prototype":
        return ("tests.benchmarks.peers.torch_prototype", str(model), dtype)
    return _transformers(name, model, dtype)


def _llama_cpp_command(model: Path, dtype: str, settings: dict) -> tuple[str, ...]:
    return ("tests.benchmarks.peers.llama_cpp_batched", str(model), dtype, json.dumps(settings))


def measure(sides: dict[str, Side], workload: Workload, rounds: int) -> Samples:
    """Run the workload on all sides in turn, in every round with other prompts."""
    samples = Samples({name: [] for name in sides})
    for number in range(rounds):
        jobs = workload.jobs(SEED + number)
        made: dict[str, Round] = {}
        for name, running in sides.items():
            if number == 0 or name not in ONCE:
                made[name] = running.run(jobs)
                samples.rates[name].append(made[name].rate)
        samples.same_first.append(_same_first(made))
    return samples


def _same_first(made: dict[str, Round]) -> float:
    """Return the share of jobs to which all sides of every round gave the same first token."""
    firsts = [[answer[0] for answer in round_.answers] for name, round_ in made.items() if name not in ONCE]
    same = [len(set(tokens)) == 1 for tokens in zip(*firsts, strict=True)]
    return sum(same) / len(same)


def best_llama_cpp(model: Path, dtype: str, *, is_quick: bool) -> dict:
    """Return llama.cpp's fastest settings on the mixed workload with answers of half the length.

    First how it attends, then how much it takes at once and with how many threads: each given the best before.
    """
    from tests.benchmarks.peers.llama_cpp_batched import Settings

    workload = (QUICK_WORKLOADS if is_quick else WORKLOADS)["mixed"]
    jobs = [Job(job.prompt, max(1, job.max_tokens // 2)) for job in workload.jobs(SEED)]
    best = asdict(Settings(CORES, 512, 512, flash=True, unified=True))
    winner, best_rate = best, 0.0
    attention = [{"flash": flash, "unified": unified} for flash in (True, False) for unified in (True, False)]
    sizes = [{"batch": 2048, "ubatch": 512}, {"batch": 2048, "ubatch": 2048}, {"batch": 256, "ubatch": 256}]
    for stage in (attention, sizes, [{"threads": max(1, CORES // 2)}]):
        for change in stage:
            tried = best | change
            with side(*_llama_cpp_command(model, dtype, tried)) as running:
                rate = running.run(jobs).rate
            print(f"    llama.cpp {dtype} {tried}: {rate:.1f} tokens/s", flush=True)
            if rate > best_rate:
                winner, best_rate = tried, rate
        best = winner
    return best


def _add_rows(table: Table, plan: Plan, workload: str, samples: Samples, limit: float) -> None:
    name, what = f"engine-1{plan.letter}-{workload}", f"{plan.shape}, {workload}, {plan.dtype}"
    ours = samples.median("ours")
    table.add(f"{name}-rate", what, ours, "tokens/s", "said", True, samples.rates["ours"])
    for peer, bar in plan.bars.items():
        if peer not in samples.rates:
            table.add(f"{name}-{peer}", f"{what} ÷ {peer} (not installed)", NOT_INSTALLED, "", f"≥ {bar}", False)
            continue
        ratio = ours / samples.median(peer)
        table.add(f"{name}-{peer}", f"{what} ÷ {peer}", ratio, "", f"≥ {bar}", ratio >= bar, samples.pairs(peer))
    for peer in SAID[plan.dtype]:
        if peer in samples.rates:
            rate = samples.median(peer)
            table.add(f"{name}-{peer}", f"{what}: {peer}", rate, "tokens/s", "said", True, samples.pairs(peer))
    share = ours / limit
    table.add(f"{name}-limit", f"{what} ÷ GEMM limit of {limit:.0f} tokens/s", share, "", "said", True, [ours, limit])
    same, least = min(samples.same_first), SAME_TOKENS[plan.dtype]
    what = f"{what}: requests whose first token is the same on every side"
    table.add(f"{name}-same", what, same, "", f"≥ {least}", same >= least, samples.same_first)
