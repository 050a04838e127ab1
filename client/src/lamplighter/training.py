"""Multi-task training jobs, as a producer has them: `client.training.create(model=…, tasks=[…])`."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from lamplighter.policy import file_key

PATH = "/v1/training/jobs"
FILE_FIELDS = ("training_file", "validation_file")

Request = Callable[..., dict[str, Any]]


class Training:
    """Calls below /v1/training/jobs. `upload` sends a local file under a key of its own; `key_header` names a POST."""

    def __init__(
        self, request: Request, upload: Callable[[Path, str | None], str], key_header: Callable[..., dict[str, str]]
    ) -> None:
        self._request, self._upload, self._key_header = request, upload, key_header

    def create(self, *, idempotency_key: str | None = None, **spec: Any) -> dict[str, Any]:
        """Queue a job and return it; `spec` is the body. Files that are given as a `Path` are uploaded first.

        However often it is called with the same key and files, it is one job.
        """
        tasks = spec.get("tasks", [])
        sent = {
            path: self._upload(path, file_key(idempotency_key, number))
            for number, path in enumerate(local_files(tasks))
        }
        body = spec | {"tasks": with_ids(tasks, sent)}
        return self._request("POST", PATH, json=body, headers=self._key_header(idempotency_key))

    def retrieve(self, job_id: str) -> dict[str, Any]:
        """Return a job with its tasks' metrics."""
        return self._request("GET", f"{PATH}/{job_id}")

    def events(self, job_id: str, *, limit: int = 100) -> list[dict[str, Any]]:
        """Return what happened last, newest first."""
        found: list[dict[str, Any]] = self._request("GET", f"{PATH}/{job_id}/events", params={"limit": limit})["data"]
        return found

    def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """Return what can be served of a run, newest first."""
        found: list[dict[str, Any]] = self._request("GET", f"{PATH}/{job_id}/checkpoints")["data"]
        return found


class AsyncTraining:
    """`Training` for `AsyncClient`."""

    def __init__(
        self,
        request: Callable[..., Awaitable[dict[str, Any]]],
        upload: Callable[[Path, str | None], Awaitable[str]],
        key_header: Callable[..., dict[str, str]],
    ) -> None:
        self._request, self._upload, self._key_header = request, upload, key_header

    async def create(self, *, idempotency_key: str | None = None, **spec: Any) -> dict[str, Any]:
        """Queue a job and return it; `spec` is the body. Files that are given as a `Path` are uploaded first.

        However often it is called with the same key and files, it is one job.
        """
        tasks, sent = spec.get("tasks", []), {}
        for number, path in enumerate(local_files(tasks)):
            sent[path] = await self._upload(path, file_key(idempotency_key, number))
        body = spec | {"tasks": with_ids(tasks, sent)}
        return await self._request("POST", PATH, json=body, headers=self._key_header(idempotency_key))

    async def retrieve(self, job_id: str) -> dict[str, Any]:
        """Return a job with its tasks' metrics."""
        return await self._request("GET", f"{PATH}/{job_id}")

    async def events(self, job_id: str, *, limit: int = 100) -> list[dict[str, Any]]:
        """Return what happened last, newest first."""
        page = await self._request("GET", f"{PATH}/{job_id}/events", params={"limit": limit})
        found: list[dict[str, Any]] = page["data"]
        return found

    async def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """Return what can be served of a run, newest first."""
        found: list[dict[str, Any]] = (await self._request("GET", f"{PATH}/{job_id}/checkpoints"))["data"]
        return found


def local_files(tasks: list[dict[str, Any]]) -> list[Path]:
    """Return the files of tasks that are given as a `Path`, each once, in their order."""
    named = [task.get(field) for task in tasks if isinstance(task, dict) for field in FILE_FIELDS]
    return list(dict.fromkeys(name for name in named if isinstance(name, Path)))


def with_ids(tasks: list[dict[str, Any]], sent: dict[Path, str]) -> list[dict[str, Any]]:
    """Return tasks in which every `Path` is the id of its uploaded file."""
    return [
        {name: sent[value] if isinstance(value, Path) else value for name, value in task.items()}
        if isinstance(task, dict)
        else task
        for task in tasks
    ]
