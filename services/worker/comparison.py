"""When a multi-task job and the jobs that train its tasks alone have all ended: the plot that compares them.

Whichever succeeds last draws it. The plot is made by a process of its own, so that no worker keeps a plotting library.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from shared.db import files, jobs, training
from shared.db.jobs import JobView
from shared.db.multi_task import is_over, single_job_ids, training_job_object
from shared.db.session import tenant_transaction

log = logging.getLogger(__name__)

DRAW_SECONDS = 120.0
NAME = "comparison.png"

AddResult = Callable[[str, bytes], dict[str, Any]]
"""Writes a result file's content and returns its columns (`training._Work`)."""


def draw_when_all_have_ended(engine: Engine, tenant_id: str, job_id: UUID, add_result: AddResult) -> None:
    """Draw the comparison that a job is a part of, if it is one and everything in it has ended.

    What goes wrong is logged: the figures stand in the job, and its training has succeeded.
    """
    try:
        with tenant_transaction(engine, tenant_id) as connection:
            found = _comparison(connection, job_id)
        if found is not None:
            _draw(engine, *found, add_result)
    except (OSError, SQLAlchemyError, subprocess.SubprocessError) as error:
        log.warning("the comparison was not drawn", extra={"job_id": job_id, "error": str(error)[:200]})


def _draw(engine: Engine, job: JobView, rows: list[dict[str, Any]], add_result: AddResult) -> None:
    drawn = subprocess.run(
        [sys.executable, "-m", "services.worker.comparison_plot"],
        input=json.dumps(rows).encode(),
        capture_output=True,
        timeout=DRAW_SECONDS,
        check=True,
    )
    columns = add_result(NAME, drawn.stdout)
    with tenant_transaction(engine, job.tenant_id) as connection:
        # Two that end in one moment both come here.
        if training.note_comparison(connection, job.job_id, columns["file_id"]):
            files.add(connection, **columns)


def _comparison(connection: Connection, job_id: UUID) -> tuple[JobView, list[dict[str, Any]]] | None:
    """Return the job that others are compared with and the rows of its comparison, once all are known."""
    job = jobs.get(connection, job_id)
    if "compared_with" in job.spec:
        job = jobs.get(connection, UUID(hex=job.spec["compared_with"]))
    ids = single_job_ids(job)
    known = jobs.of_ids(connection, list(ids.values()))
    singles = {task: known[single] for task, single in ids.items()}
    if not singles or not all(is_over(each) for each in (job, *singles.values())):
        return None
    rows = [row for row in training_job_object(job, singles)["comparison"]["tasks"] if row["change"] is not None]
    return (job, rows) if rows else None
