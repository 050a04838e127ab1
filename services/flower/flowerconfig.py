"""Flower's configuration, read by Flower itself: its options are the names that stand here."""

import re
from typing import Any

from shared.settings import load_settings

_settings = load_settings()
_password = _settings.flower_password
if _password is None:
    raise SystemExit("LAMPLIGHTER_FLOWER_PASSWORD is not set: Flower shows nothing to strangers.")

address = _settings.flower_host
port = _settings.flower_port
basic_auth = [f"{_settings.flower_user}:{_password.get_secret_value()}"]
# Nothing can be shut down, revoked or sent from here: that is what the API with its keys is for.
read_only = True
max_workers = 2000
max_tasks = 10_000
purge_offline_workers = 3600
tasks_columns = "name,uuid,state,worker,received,started,runtime"


_board = (_settings.board_url or "").rstrip("/")


IS_SLICE = re.compile(r"[0-9a-f]{32}-s\d+-d\d+$")
"""As `shared.queueing.names.slice_task_id` makes them."""


def format_task(task: Any) -> Any:
    """Show no arguments, but where the board has the job: a task's id says which slice of which job it is."""
    task.args = task.kwargs = task.result = ""
    if _board and IS_SLICE.match(task.uuid or ""):
        task.args = f"{_board}/board/tasks/{task.uuid}"
    return task
