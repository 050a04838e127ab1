"""Multi-task training jobs, as a producer has them: `client.training.create(model=…, tasks=[…])`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE_FIELDS = ("training_file", "validation_file")

Request = Callable[..., dict[str, Any]]


class Training:
    """Calls below /v1/training/jobs. `upload` sends a local file; `key_header` names a POST."""

    def __init__(
        self, request: Request, upload: Callable[[Path], str], key_header: Callable[..., dict[str, str]]
    ) -> None:
        self._request, self._upload, self._key_header = request, upload, key_header

    def create(self, *, idempotency_key: str | None = None, **spec: Any) -> dict[str, Any]:
        """Queue a job and return it; `spec` is the body. Files that are given as a `Path` are uploaded first."""
        body = spec | {"tasks": with_uploads(spec.get("tasks", []), self._upload)}
        return self._request("POST", "/v1/training/jobs", json=body, headers=self._key_header(idempotency_key))

    def retrieve(self, job_id: str) -> dict[str, Any]:
        """Return a job with its tasks' metrics."""
        return self._request("GET", f"/v1/training/jobs/{job_id}")

    def events(self, job_id: str, *, limit: int = 100) -> list[dict[str, Any]]:
        """Return what happened last, newest first."""
        found: list[dict[str, Any]] = self._request(
            "GET", f"/v1/training/jobs/{job_id}/events", params={"limit": limit}
        )["data"]
        return found

    def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """Return what can be served of a run, newest first."""
        found: list[dict[str, Any]] = self._request("GET", f"/v1/training/jobs/{job_id}/checkpoints")["data"]
        return found


def with_uploads(tasks: list[dict[str, Any]], upload: Callable[[Path], str]) -> list[dict[str, Any]]:
    """Return tasks in which every `Path` is the id of its uploaded file; each file is sent once."""
    sent: dict[Path, str] = {}
    named = []
    for task in tasks:
        changed = dict(task)
        for field in FILE_FIELDS:
            path = task.get(field)
            if isinstance(path, Path):
                if path not in sent:
                    sent[path] = upload(path)
                changed[field] = sent[path]
        named.append(changed)
    return named
