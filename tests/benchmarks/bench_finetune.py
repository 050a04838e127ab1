"""`make bench-finetune`: right, exact after kills, fast beside transformers' Trainer, served at once, and it learns.

Sides of a ratio run alternately, each in a process of its own that has loaded its model and trained before; ratios are
of medians. `--short`: smaller models and fewer rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from services.worker.protocol import CheckpointPolicy, Finished, Progress, Started
from services.worker.trainer_child import trainer_template
from tests.benchmarks.engine_sides import CORES, Process
from tests.benchmarks.engine_workloads import LLAMA
from tests.benchmarks.finetune_stack import bench_learning, bench_serving
from tests.benchmarks.preprocessing import bench_preprocessing
from tests.benchmarks.table import Table
from tests.support.models import make_tiny_llama
from tests.support.trainer_runs import (
    TrainerChild,
    checkpoints_of,
    metrics_of,
    random_examples,
    spec,
    train_together,
    weights_of,
    write_prepared,
)

VOCABULARY = LLAMA["vocab_size"]
EQUAL_TOKENS = 128
LOG_NORMAL = {"median": 64, "sigma": 1.0, "cap": 1024}


@dataclass(frozen=True)
class Scale:
    """How much a run does: layers of the models that are timed, examples of an epoch, rounds, kills."""

    layers: int
    examples: int
    equal_steps: int
    rounds: int
    kills: int


FULL = Scale(layers=6, examples=768, equal_steps=24, rounds=5, kills=20)
SHORT = Scale(layers=2, examples=512, equal_steps=12, rounds=3, kills=5)


class Side(Process):
    """A process that trains a fixed number of steps for every line it is given."""

    def rate(self) -> float:
        """Train once; return real tokens a second."""
        return self.ask("")["rate"]


@contextmanager
def side(module: str, *arguments: str):
    running = Side(module, *arguments)
    try:
        yield running
    finally:
        running.close()


def equal_lengths(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, VOCABULARY, EQUAL_TOKENS) for _ in range(count)]


def log_normal_lengths(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    drawn = LOG_NORMAL["median"] * np.exp(LOG_NORMAL["sigma"] * generator.standard_normal(count))
    lengths = np.clip(drawn.astype(int), 2, LOG_NORMAL["cap"])
    return [generator.integers(3, VOCABULARY, length) for length in lengths]


def bench_correctness(table: Table, directory: Path) -> None:
    """Rows 1: against a plain loop, in float64 and float32, LoRA and full."""
    from services.worker.trainer.data import PreparedData
    from tests.support.trainer_oracle import (
        asked,
        largest_difference,
        our_run,
        plain_run,
        share_of_movement,
    )

    base = make_tiny_llama(directory / "tiny", initializer_range=0.1)
    data = PreparedData(write_prepared(directory / "tiny-data", *random_examples(60)))
    rows = iter("abcd")
    for full in (False, True):
        method = "full" if full else "LoRA"
        hyperparameters = asked(full=full, dtype="float64")
        ours, _, _ = our_run(base, data, hyperparameters)
        _, theirs, _ = plain_run(base, data, hyperparameters)
        apart = largest_difference(ours, theirs)
        what = f"{method}, float64: largest difference of a weight from a plain loop's"
        table.add(f"finetune-1{next(rows)}", what, apart, "", "≤ 1e-8", apart <= 1e-8)
        ours, _, _ = our_run(base, data, asked(full=full))
        first, theirs, _ = plain_run(base, data, asked(full=full))
        share = 100 * share_of_movement(ours, theirs, first)
        what = f"{method}, float32: difference as a share of how far the weights moved"
        table.add(f"finetune-1{next(rows)}", what, share, "%", "≤ 0.5 %", share <= 0.5)


def bench_ranks(table: Table, directory: Path) -> None:
    """Rows 1e to 1i: two processes that train one job against one, in every way to divide it."""
    base = make_tiny_llama(directory / "ranks", initializer_range=0.1)
    data = write_prepared(directory / "ranks-data", *random_examples(21))
    run = {"batch_size": 5, "max_steps": 12, "learning_rate": 1e-3, "dtype": "float64"}
    with ExitStack() as stack:
        first, second = TrainerChild(), TrainerChild()
        stack.callback(first.close)
        stack.callback(second.close)
        rows = iter("efghi")
        for full, sharding in ((False, "none"), (True, "none"), (False, "fsdp"), (True, "fsdp"), (True, "tensor")):
            places = [directory / f"{name}-{full}-{sharding}" for name in ("one", "two")]
            first.train(spec(base, data, places[0], full=full, **run))
            assert isinstance(first.finish(), Finished)
            train_together(first, second, spec(base, data, places[1], full=full, **run), sharding=sharding)
            assert isinstance(first.finish(), Finished)
            assert isinstance(second.finish(), Finished)
            one, two = (weights_of(place / "model") for place in places)
            apart = max(float((one[name] - two[name]).abs().max()) for name in one)
            how = {"none": "data", "fsdp": "data and fsdp", "tensor": "tensor"}[sharding]
            what = (
                f"two processes ({how}), {'full' if full else 'LoRA'}, float64: largest difference from one's weights"
            )
            table.add(f"finetune-1{next(rows)}", what, apart, "", "≤ 1e-8", apart <= 1e-8)


def bench_resume(table: Table, directory: Path, kills: int) -> None:
    """Rows 2: a run that is killed again and again, against one that nobody disturbs."""
    base = make_tiny_llama(directory / "resumed", hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    data = write_prepared(directory / "resumed-data", *random_examples(80))
    validation = str(write_prepared(directory / "resumed-validation", *random_examples(8, seed=9)))
    steps = max(20, 2 * kills)
    run = {"max_steps": steps, "lora_dropout": 0.1, "eval_steps": 6, "validation": validation, "learning_rate": 1e-3}
    undisturbed = TrainerChild(threads=CORES)
    undisturbed.train(spec(base, data, directory / "undisturbed", **run))
    assert isinstance(undisturbed.finish(), Finished)
    undisturbed.close()
    for identifier, count in (("finetune-2a", 1), ("finetune-2b", kills)):
        said = _killed_run(base, data, directory / identifier, run, count)
        expected = weights_of(directory / "undisturbed" / "model")
        weights = weights_of(directory / identifier / "model")
        different = sum(not np.array_equal(weights[name], expected[name]) for name in expected)
        different += metrics_of(said) != metrics_of(undisturbed.said)
        what = f"weights and metrics that differ after {count} SIGKILL in a run of {steps} steps"
        table.add(identifier, what, different, "", "0", different == 0)
    again = (_computed(said) - steps) / kills
    table.add(
        "finetune-2c", "steps done again for each kill; a checkpoint each step", again, "steps", "≤ 1", again <= 1
    )


def _computed(said: list) -> int:
    """Return how many steps were computed: a trainer that goes on also tells again what may not be recorded."""
    computed, following = 0, 1
    for message in said:
        if isinstance(message, Started):
            following = message.step + 1
        elif isinstance(message, Progress) and message.step == following:
            computed, following = computed + 1, following + 1
    return computed


def _killed_run(base: Path, data: Path, output: Path, run: dict, kills: int) -> list:
    child = TrainerChild(threads=CORES)
    policy = CheckpointPolicy(every_steps=1)
    for number in range(kills):
        child.train(spec(base, data, output, token=f"lease-{number}", checkpoints=policy, **run))
        target = child.next(Started).step + (7 if kills == 1 else 1)
        while child.next(Progress).step < target:
            pass
        time.sleep(0.004 * number)
        child.kill()
        assert child.next(Finished) is None, "it ended before it was killed"
    child.train(spec(base, data, output, token="last", checkpoints=policy, **run))
    assert isinstance(child.finish(), Finished) and child.restarts == kills
    said = child.said
    child.close()
    return said


def bench_speed(table: Table, directory: Path, scale: Scale) -> None:
    """Rows 3: tokens a second beside transformers' Trainer, of like and of log-normal lengths."""
    model = str(
        make_tiny_llama(directory / "timed", **LLAMA | {"num_hidden_layers": scale.layers, "initializer_range": 0.02})
    )
    equal = write_prepared(directory / "equal", equal_lengths(256), vocabulary=VOCABULARY)
    spread = write_prepared(directory / "spread", log_normal_lengths(scale.examples), vocabulary=VOCABULARY)
    cases = [
        ("finetune-3a", "LoRA float32, examples of 128 tokens", equal, "lora", "float32", 1.0),
        ("finetune-3a-full", "full float32, examples of 128 tokens", equal, "full", "float32", 1.0),
        ("finetune-3a-bfloat16", "LoRA bfloat16, examples of 128 tokens", equal, "lora", "bfloat16", 1.0),
        ("finetune-3b", "LoRA float32, log-normal lengths", spread, "lora", "float32", 1.3),
        ("finetune-3b-full", "full float32, log-normal lengths", spread, "full", "float32", 1.3),
    ]
    for identifier, what, data, method, dtype, bar in cases:
        steps = scale.equal_steps if data == equal else scale.examples // 8
        arguments = (model, str(data), method, dtype, str(steps))
        with ExitStack() as stack:
            ours = stack.enter_context(side("tests.benchmarks.trainer_ours", *arguments))
            theirs = stack.enter_context(side("tests.benchmarks.peers.trainer_loop", *arguments))
            rates = alternate(ours, theirs, scale.rounds)
        ratio = statistics.median(rates["ours"]) / statistics.median(rates["theirs"])
        title = f"tokens/s ÷ transformers' Trainer, {what}"
        table.add(identifier, title, ratio, "×", f"≥ {bar}×", ratio >= bar, [rates])


def alternate(ours: Side, theirs: Side, rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds + 1):
        pair = {"ours": ours.rate(), "theirs": theirs.rate()}
        print(f"    {pair['ours']:.0f} and {pair['theirs']:.0f} tokens/s", flush=True)
        for name, rate in pair.items():
            if number:  # the first round warms up
                rates[name].append(rate)
    return rates


def bench_child(table: Table, directory: Path) -> None:
    """Rows 3: how soon a child takes its first step, and how soon a pause holds it."""
    base = make_tiny_llama(directory / "smol", **LLAMA | {"initializer_range": 0.02})
    data = write_prepared(directory / "smol-data", equal_lengths(32), vocabulary=VOCABULARY)
    for row, what, seconds in zip(
        ("", "-next"), ("a worker's first child", "the next"), _starts(base, data, directory), strict=True
    ):
        median = statistics.median(seconds)
        title = f"start of {what} to the beginning of its first step, 135M Llama, files in memory"
        table.add(f"finetune-3c{row}", title, median, "s", "≤ 10 s", median <= 10, seconds)
    size = _template_bytes() / 2**20
    table.add("finetune-3c-memory", "what a template of trainers holds in memory", size, "MiB", "said", True)
    child = TrainerChild(threads=CORES)
    child.train(spec(base, data, directory / "paused", batch_size=2, max_steps=10_000))
    more = []
    for _ in range(5):
        child.next(Progress)
        told = len(metrics_of(child.said))
        child.pause()
        while child.status is None or child.status.in_flight:
            time.sleep(0.05)
        more.append(len(metrics_of(child.said)) - told)
        child.resume()
        while not child.status.in_flight:
            time.sleep(0.05)
    assert not checkpoints_of(child.said)  # writing one would have made a step long; closing writes one
    child.close()
    what = "steps that end after a pause is sent in the middle of one"
    table.add("finetune-3d", what, max(more), "steps", "≤ 1", max(more) <= 1, more)


def _template_bytes() -> int:
    """Return what a template of trainers holds in memory once it has loaded."""
    template = trainer_template("cpu:0", {"OMP_NUM_THREADS": str(CORES)})
    process, channel = template.start()
    channel.close()
    process.wait()
    size = psutil.Process(template.pid).memory_info().rss
    template.close()
    return size


def _starts(base: Path, data: Path, directory: Path, rounds: int = 3) -> tuple[list[float], list[float]]:
    """Return seconds to the first step of children that wait for their template, and of those that find it loaded."""
    seconds: tuple[list[float], list[float]] = [], []
    for number in range(rounds):
        template = trainer_template("cpu:0", {"OMP_NUM_THREADS": str(CORES)})
        for which, taken in enumerate(seconds):
            child = TrainerChild(template=template)
            began = time.monotonic()
            child.train(spec(base, data, directory / f"started-{number}-{which}", batch_size=2, max_steps=2))
            first = child.next(Progress)
            taken.append(time.monotonic() - began - first.seconds)
            child.close()
        template.close()
    return seconds


PARTS = ("correctness", "ranks", "resume", "child", "speed", "preprocessing", "serving", "learning")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", choices=PARTS, action="append")
    arguments = parser.parse_args()
    scale = SHORT if arguments.short else FULL
    parts = arguments.only or PARTS
    table = Table("finetune")
    with tempfile.TemporaryDirectory(prefix="bench-finetune-") as name:
        directory = Path(name)
        directory.chmod(0o711)  # the embedded Postgres has an account of its own
        run = {
            "correctness": lambda: bench_correctness(table, directory),
            "ranks": lambda: bench_ranks(table, directory),
            "resume": lambda: bench_resume(table, directory, scale.kills),
            "child": lambda: bench_child(table, directory),
            "speed": lambda: bench_speed(table, directory, scale),
            "preprocessing": lambda: bench_preprocessing(table, short=arguments.short),
            "serving": lambda: bench_serving(table, directory, scale.rounds),
            "learning": lambda: bench_learning(table),
        }
        for part in PARTS:
            if part in parts:
                run[part]()
                table.write()
    table.write()
    table.show()
    return 0 if table.holds else 1


if __name__ == "__main__":
    sys.exit(main())
