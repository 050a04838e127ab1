"""The command line, as a user runs it: its exit codes, its output, and a stack of its own that it starts and ends."""

import json
import os
import stat
import subprocess
import sys
import time

import psutil
import pytest

from tests.support.batches import chat_line, chat_lines, jsonl
from tests.support.servers import ROOT

CLI = [sys.executable, "-m", "lamplighter.cli"]


@pytest.fixture
def cli(stack, admin_key, tmp_path):
    environment = {**os.environ, "LAMPLIGHTER_URL": stack.url, "LAMPLIGHTER_API_KEY": admin_key, "COLUMNS": "200"}

    def run(*arguments, code=0, **more):
        done = subprocess.run(
            [*CLI, *arguments], env=environment | more, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run


def test_submit_wait_and_download(cli, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl(chat_lines(20)))
    out = cli("submit", "in.jsonl", "--endpoint", "/v1/chat/completions", "-o", "out.jsonl")
    assert "succeeded: 20 of 20 lines" in out
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 20


def test_a_failed_job_is_exit_code_1_and_says_why(cli, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"no json\n")
    out = cli("submit", "in.jsonl", "--endpoint", "/v1/chat/completions", "--wait", code=1)
    assert "failed" in out and "line 1" in out


def test_failed_lines_come_beside_the_output(cli, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat_line("a"), chat_line("b", temperature=9)]))
    cli("submit", "in.jsonl", "--endpoint", "/v1/chat/completions", "-o", "out.jsonl")
    assert b'"custom_id":"b"' in (tmp_path / "out.jsonl.errors").read_bytes()


def test_jobs_watch_and_cancel(cli, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl(chat_lines(50, delay_ms=60_000)))
    job_id = cli("submit", "in.jsonl", "--endpoint", "/v1/chat/completions", "--priority", "7").strip()
    listed = json.loads(cli("jobs", "--json", "--limit", "5"))
    assert listed[0]["id"] == job_id and listed[0]["priority"] == 7
    assert job_id in cli("jobs")
    assert json.loads(cli("cancel", job_id, "--json"))["status"] == "cancelling"
    assert json.loads(cli("watch", job_id, "--json", code=1))["status"] == "cancelled"


def test_keys_models_and_doctor(cli, tiny_llama):
    key = json.loads(cli("keys", "create", "--scope", "read", "--json"))
    assert "echo" in cli("models", LAMPLIGHTER_API_KEY=key["key"])
    cli("keys", "create", code=4, LAMPLIGHTER_API_KEY=key["key"])
    cli("keys", "revoke", key["id"])
    cli("models", code=4, LAMPLIGHTER_API_KEY=key["key"])
    assert key["id"] in cli("keys", "list") and key["key"] not in cli("keys", "list")
    assert "causal_lm, float32" in cli("models", "add", "tiny-cli", str(tiny_llama))
    cli("models", "add", "tiny-cli", str(tiny_llama), code=1)
    assert "cpu:0" in cli("doctor")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["watch", "batch_0"], 1),
        (["submit", "missing.jsonl", "--endpoint", "/x"], 2),
        (["dance"], 2),
        (["up", "--device", "tpu"], 2),
    ],
)
def test_exit_codes(cli, arguments, code):
    cli(*arguments, code=code)


def test_no_server_is_exit_code_3(cli):
    cli("jobs", code=3, LAMPLIGHTER_URL="http://127.0.0.1:9")


def test_up_and_down_leave_nothing_behind(scratch):
    data = scratch / "own-stack"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LAMPLIGHTER_")}
    command = [*CLI, "up", "--data", str(data), "--port", "0", "--device", "cpu", "--detach"]
    up = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert up.returncode == 0 and up.stdout.startswith("ready http://127.0.0.1:"), up.stderr
    assert stat.S_IMODE((data / "admin.key").stat().st_mode) == 0o600
    state = json.loads((data / "stack.json").read_text())
    pids = [state["pid"], *state["processes"].values()]
    tree = {child for pid in pids for child in psutil.Process(pid).children(recursive=True)} | {
        psutil.Process(pid) for pid in pids
    }
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1 and "already" in again.stderr
    key = (data / "admin.key").read_text().strip()
    listed = subprocess.run(
        [*CLI, "models"],
        env=environment | {"LAMPLIGHTER_URL": state["url"], "LAMPLIGHTER_API_KEY": key},
        capture_output=True,
        text=True,
    )
    assert "echo" in listed.stdout
    # The supervisor killed, its processes orphaned: `down` still ends them all.
    psutil.Process(state["pid"]).kill()
    down = [*CLI, "down", "--data", str(data)]
    assert subprocess.run(down, env=environment, cwd=ROOT, timeout=120).returncode == 0
    deadline = time.monotonic() + 10
    while (
        any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in tree)
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert not [process for process in tree if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert subprocess.run(down, env=environment, cwd=ROOT, timeout=60).returncode == 0
