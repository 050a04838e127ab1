"""Rows of `bench-finetune` through the whole stack: how soon a new model is served, and that one learns."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from examples.demo.docstrings import collect
from examples.demo.tuning import FOR_A_SMALL_MODEL, LEAST_FALL, Tuned, fine_tune
from tests.benchmarks.bench_spine import native_for, running_stack, sdk_for
from tests.benchmarks.engine_workloads import LLAMA
from tests.benchmarks.table import Table
from tests.support.models import make_tiny_llama
from tests.support.servers import ROOT

POLL_SECONDS = 0.01
EXAMPLES = 16


def bench_serving(table: Table, directory: Path, rounds: int) -> None:
    """Row 5: from `succeeded` to the first token of the new model, while its base is warm."""
    base = make_tiny_llama(directory / "served", **LLAMA | {"initializer_range": 0.02})
    seconds = []
    with running_stack("finetune") as stack, sdk_for(stack) as sdk, native_for(stack) as native:
        native.request("POST", "/v1/models", json={"name": "base", "source": str(base)})
        lines = [
            {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} {n}"}]}
            for n in range(EXAMPLES)
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        training = sdk.files.create(file=("train.jsonl", content), purpose="fine-tune").id
        hyperparameters = {"n_epochs": 1, "batch_size": EXAMPLES // 2}
        for number in range(rounds + 1):  # the first round warms up
            _first_token(sdk, "base")
            job = sdk.fine_tuning.jobs.create(
                model="base",
                training_file=training,
                seed=number,
                method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            )
            while (job := sdk.fine_tuning.jobs.retrieve(job.id)).status != "succeeded":
                assert job.status not in ("failed", "cancelled"), job.error
                time.sleep(POLL_SECONDS)
            started = time.perf_counter()
            _first_token(sdk, job.fine_tuned_model)
            seconds.append(time.perf_counter() - started)
    worst = max(seconds[1:])
    what = f"`succeeded` to the first token of the new model, base warm; the longest of {rounds}"
    table.add("finetune-5", what, worst, "s", "≤ 1 s", worst <= 1, seconds[1:])


def _first_token(sdk, model: str) -> None:
    stream = sdk.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "say 3"}], max_tokens=8, stream=True, temperature=0
    )
    with stream:
        assert next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content is not None)


def bench_learning(table: Table) -> None:
    """Row 6: the demo's own job; the validation loss of its task."""
    with tempfile.TemporaryDirectory(prefix="lamplighter-bench-learns-") as directory:
        base = Path(directory) / "base"
        subprocess.run([sys.executable, "-m", "examples.demo.train_small_model", str(base)], check=True, cwd=ROOT)
        with running_stack("learns") as stack, sdk_for(stack) as sdk, native_for(stack) as native:
            native.request("POST", "/v1/models", json={"name": "chat", "source": str(base)})
            tuned: Tuned = fine_tune(sdk, "chat", collect(), FOR_A_SMALL_MODEL)
    fall = 100 * tuned.fall
    differ = statistics.mean(before != after for before, after in tuned.answers)
    what = (
        f"signature → first line: validation loss {tuned.loss_before:.2f} → {tuned.loss_after:.2f}, "
        f"{differ:.0%} of answers differ"
    )
    bar = 100 * LEAST_FALL
    table.add("finetune-6", what, fall, "%", f"≥ {bar:.0f} %", fall >= bar and differ > 0.5)
