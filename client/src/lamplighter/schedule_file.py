"""Schedules as files: `lamplighter schedule add FILE`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamplighter.training import FILE_FIELDS, local_files, with_ids
from lamplighter.training_spec import read_fields, with_paths, with_tasks_paths

PURPOSES = {"input_file_id": "batch", "training_file": "fine-tune", "validation_file": "fine-tune"}


def read_schedule(path: Path) -> dict[str, Any]:
    """Return what a YAML or JSON file asks for, as the body of `POST /v1/schedules`; files beside it become paths.

    Raises SpecificationWrong.
    """
    found = read_fields(path, "name, cron, kind and spec")
    if isinstance(found.get("spec"), dict):
        found["spec"] = with_paths(found["spec"], PURPOSES, path)
        with_tasks_paths(found["spec"], path)
    return found


def with_uploads(body: dict[str, Any], upload: Callable[[Path, str], str]) -> dict[str, Any]:
    """Return a schedule in which every path is the id of its file; `upload` sends one for a purpose."""
    spec = body.get("spec")
    if not isinstance(spec, dict):
        return body
    sent: dict[str, Any] = {
        name: upload(value, PURPOSES.get(name, "")) if isinstance(value, Path) else value
        for name, value in spec.items()
    }
    if isinstance(sent.get("tasks"), list):
        files = {path: upload(path, PURPOSES[FILE_FIELDS[0]]) for path in local_files(sent["tasks"])}
        sent["tasks"] = with_ids(sent["tasks"], files)
    return body | {"spec": sent}
