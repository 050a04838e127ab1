"""Specifications of multi-task jobs as files, and their jobs as tables."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lamplighter.errors import LamplighterError
from lamplighter.training import FILE_FIELDS

MOST_LABELS_SHOWN = 8
MEGABYTE = 1e6


class SpecificationWrong(LamplighterError):
    """The file is no specification."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Numbers as JSON has them, and no times: 22:00 and 2026-11-28T06:00:00Z are texts, and 1e-4 is a number.

    YAML 1.1 makes the first 1320, the second a date that JSON does not know, and the third a text.
    """


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"^-?(0|[1-9][0-9]*)$"), list("-0123456789"))
_Loader.add_implicit_resolver(
    _NUMBERS[1], re.compile(r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?$"), list("-0123456789")
)


def read_specification(path: Path) -> dict[str, Any]:
    """Return what a YAML or JSON file asks for; files that lie beside it become paths, to be uploaded.

    Raises SpecificationWrong.
    """
    found = read_fields(path, "model and tasks")
    with_tasks_paths(found, path)
    return found


def read_fields(path: Path, examples: str) -> dict[str, Any]:
    """Return the fields of a YAML or JSON file; raises SpecificationWrong."""
    try:
        found = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecificationWrong(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise SpecificationWrong(f"{path}: a specification has fields, such as {examples}.")
    return found


def with_tasks_paths(found: dict[str, Any], specification: Path) -> None:
    """Make paths of the files that tasks name, where these are not on the server yet; raises SpecificationWrong."""
    tasks = found.get("tasks")
    if isinstance(tasks, list):
        found["tasks"] = [
            with_paths(task, FILE_FIELDS, specification, f" of task {task.get('name')!r}")
            if isinstance(task, dict)
            else task  # the server says what is wrong with it
            for task in tasks
        ]


def with_paths(fields: dict[str, Any], names: Iterable[str], specification: Path, whose: str = "") -> dict[str, Any]:
    """Return fields whose files, which lie beside the specification, are paths; raises SpecificationWrong."""
    changed = dict(fields)
    for field in names:
        name = fields.get(field)
        if isinstance(name, str) and not name.startswith("file-"):
            file = (specification.parent / name).resolve()
            if not file.is_file():
                raise SpecificationWrong(f"{specification}: {field}{whose}: no file {file}.")
            changed[field] = file
    return changed


def show_plan(console: Console, job: dict[str, Any]) -> None:
    """Print what would run: rows, label sets with their balance, tokens, time, memory."""
    plan = job["plan"]
    used = plan["hyperparameters"]
    console.print(f"{job['model']}: {job['mode']} training of {len(job['tasks'])} tasks, sharing {job['sharing']}")
    console.print(
        f"{plan['steps']} steps of {used['batch_size']} rows, {plan['tokens']} tokens, "
        f"{plan['memory_bytes'] / MEGABYTE:.0f} MB, {_time(plan['device_seconds'])}"
    )
    table = Table(box=None)
    for title in ("task", "kind", "rows", "validation", "targets"):
        table.add_column(title)
    rows = {name: source for source in plan["sources"] for name in source["tasks"]}
    for head in plan["heads"]:
        source = rows[head["name"]]
        table.add_row(head["name"], head["kind"], str(source["rows"]), str(source["validation_rows"]), _targets(head))
    console.print(table)


def _time(seconds: float | None) -> str:
    return "time unknown: nothing was trained on this base yet" if seconds is None else f"about {seconds:.0f} s"


def _targets(head: dict[str, Any]) -> str:
    labels, counts = head.get("labels", []), head.get("counts", [])
    if labels:
        ranked = sorted(zip(labels, counts, strict=True), key=lambda pair: -pair[1])
        whole = max(1, sum(counts))
        shown = [f"{label} {100 * count / whole:.0f} %" for label, count in ranked[:MOST_LABELS_SHOWN]]
        more = f" and {len(ranked) - MOST_LABELS_SHOWN} more" if len(ranked) > MOST_LABELS_SHOWN else ""
        return ", ".join(shown) + more
    if "deviation" in head or "mean" in head:
        return f"mean {head.get('mean', 0.0):.4g}, deviation {head.get('deviation', 1.0):.4g}"
    return "text" if head["kind"] in ("causal_lm", "seq2seq") else "as given"


def show_tasks(console: Console, job: dict[str, Any]) -> None:
    """Print each task's metrics, and the comparison with each alone where there is one."""
    table = Table(box=None)
    for title in ("task", "kind", "best step", "metrics"):
        table.add_column(title)
    for task in job["tasks"]:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in task["metrics"].items())
        stopped = f"{task['best_step']}, stopped" if task["stopped"] else str(task["best_step"] or "")
        table.add_row(task["name"], task["kind"], stopped, metrics)
    console.print(table)
    for row in (job.get("comparison") or {}).get("tasks", []):
        change = "" if row["change"] is None else f" ({100 * row['change']:+.1f} %)"
        console.print(f"  {row['task']}: {row['metric']} {row['together']} together, {row['alone']} alone{change}")
    if job["model_name"]:
        console.print(f"served as {job['model_name']}", highlight=False)
