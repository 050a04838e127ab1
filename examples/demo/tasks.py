"""The demo's multi-task job: four questions about a docstring, answered by one pass of MiniLM."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from lamplighter import Client
from lamplighter.cli import _follow
from rich.console import Console
from rich.table import Table

from examples.demo.docstrings import Docstring

MODULES = 8
"""The modules with the most docstrings are told apart; the others are not asked about."""
ROWS, HELD_OUT = 640, 160
TASKS: list[dict[str, Any]] = [
    {"name": "module", "kind": "classification", "label_field": "module"},
    {"name": "sort", "kind": "classification", "label_field": "sort"},
    {"name": "length", "kind": "regression", "label_field": "length"},
    {"name": "raises", "kind": "classification", "label_field": "raises"},
]
HYPERPARAMETERS = {"n_epochs": 2, "batch_size": 16, "learning_rate": 1e-4, "max_length": 64, "truncate": True}


@dataclass(frozen=True)
class Rows:
    """Rows of the four tasks; `baseline` is what answering with the commonest label, or the mean, gets."""

    training: list[dict[str, Any]]
    held_out: list[dict[str, Any]]

    def baseline(self, task: dict[str, Any]) -> float:
        """Return the accuracy, or for a regression the RMSE, of the same answer for every row."""
        field = task["label_field"]
        values = [row[field] for row in self.held_out]
        if task["kind"] == "regression":
            mean = sum(row[field] for row in self.training) / len(self.training)
            return float((sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5)
        commonest = Counter(row[field] for row in self.training).most_common(1)[0][0]
        return values.count(commonest) / len(values)


def rows_of(docstrings: list[Docstring], rows: int = ROWS, held_out: int = HELD_OUT, seed: int = 0) -> Rows:
    """Return rows of docstrings: their text, and what is asked of each."""
    tops = Counter(each.name.split(".")[0] for each in docstrings)
    known = {name for name, _ in tops.most_common(MODULES)}
    chosen = [each for each in docstrings if each.name.split(".")[0] in known and len(each.text) > 40]
    random.Random(seed).shuffle(chosen)
    made = [_row(each) for each in chosen[: rows + held_out]]
    return Rows(made[:rows], made[rows:])


def _row(each: Docstring) -> dict[str, Any]:
    sort = "class" if each.signature.startswith("class ") else "method" if "(self" in each.signature else "function"
    return {
        "text": each.text,
        "module": each.name.split(".")[0],
        "sort": sort,
        "length": len(each.text.split()) ** 0.5,
        "raises": "yes" if each.raises else "no",
    }


def train(client: Client, console: Console, docstrings: list[Docstring]) -> None:
    """Train the four tasks together, show what came of it, and run a batch of predictions."""
    rows = rows_of(docstrings)
    files = [
        client.upload(f"{name}.jsonl", _jsonl(part), "fine-tune")["id"]
        for name, part in (("tasks", rows.training), ("held-out", rows.held_out))
    ]
    tasks = [task | {"training_file": files[0], "validation_file": files[1]} for task in TASKS]
    job = client.training.create(model="minilm", tasks=tasks, hyperparameters=HYPERPARAMETERS, seed=0, suffix="four")
    _follow(client, job["id"], quiet=False)
    job = client.training.retrieve(job["id"])
    if job["status"] != "succeeded":
        raise SystemExit(f"the training ended as {job['status']}: {job['error']}")
    _show(console, job, rows)
    _predict(client, console, job["model_name"], rows.held_out)


def _show(console: Console, job: dict[str, Any], rows: Rows) -> None:
    table = Table(box=None, title=f"{len(TASKS)} tasks on one MiniLM")
    for title in ("task", "metric", "held-out rows", "always the same answer"):
        table.add_column(title)
    for task, found in zip(TASKS, job["tasks"], strict=True):
        metric = "rmse" if task["kind"] == "regression" else "accuracy"
        table.add_row(task["name"], metric, f"{found['metrics'][metric]:.3f}", f"{rows.baseline(task):.3f}")
    console.print(table)


def _predict(client: Client, console: Console, model: str, held_out: list[dict[str, Any]]) -> None:
    """Have all heads answer for the held-out rows in one batch."""
    batch = client.submit([{"model": model, "input": row["text"]} for row in held_out], "/v1/predictions")
    job = _follow(client, batch["id"], quiet=False)
    if job["status"] != "succeeded" or job["progress"]["failed"]:
        raise SystemExit(f"the predictions ended as {job['status']}: {job['error']}")
    lines = list(client.results(batch["id"]))
    console.print(f"predictions: {len(lines)} lines, {len(TASKS)} heads each")
    for line in lines[:2]:
        said = line["response"]["body"]["data"][0]["predictions"]
        shown = ", ".join(f"{name}: {one.get('label') or round(one['value'], 1)}" for name, one in said.items())
        text = held_out[int(line["custom_id"].removeprefix("request-"))]["text"].split("\n")[0]
        console.print(f"  {text[:90]}\n    → {shown}", markup=False, highlight=False)


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
