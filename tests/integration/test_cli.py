"""The command line, as a user runs it: its exit codes, its output, and a stack of its own that it starts and ends."""

import http.server
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import httpx
import psutil
import psycopg
import pytest

from tests.support.batches import chat_line, chat_lines, jsonl
from tests.support.servers import ROOT, wait_until

CLI = [sys.executable, "-m", "lamplighter.cli"]


@pytest.fixture
def cli(stack, admin_key, tmp_path):
    environment = {**os.environ, "LAMPLIGHTER_URL": stack.url, "LAMPLIGHTER_API_KEY": admin_key, "COLUMNS": "200"}

    def run(*arguments, code=0, **more):
        done = subprocess.run(
            [*CLI, *arguments], env=environment | more, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run


def test_what_was_forgotten_is_shown_by_the_day(cli, stack):
    with psycopg.connect(stack.database_url("superuser"), autocommit=True) as connection:
        put = "INSERT INTO retention_day (tenant_id, day, what, deleted, overdue, checked_at) VALUES ('system', %s, %s, %s, %s, now())"
        for day, what, deleted, overdue in (("2020-01-01", "slice", 7, 0), ("2020-01-01", "result", 0, 2)):
            connection.execute(put, (day, what, deleted, overdue))
        try:
            days = {day["id"]: day for day in json.loads(cli("retention", "--json"))}
            shown = cli("retention")
        finally:
            connection.execute("DELETE FROM retention_day WHERE day = '2020-01-01'")
    assert days["2020-01-01"]["deleted"] == {"slice": 7} and days["2020-01-01"]["overdue"] == {"slice": 0, "result": 2}
    assert [line.split() for line in shown.splitlines() if "2020-01-01" in line] == [
        ["2020-01-01", "result", "0", "2"],
        ["2020-01-01", "slice", "7", "0"],
    ]
    cli("retention", code=4, LAMPLIGHTER_API_KEY="llk_no_such_key")


def test_submit_wait_and_download(cli, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl(chat_lines(20)))
    out = cli("submit", "in.jsonl", "--endpoint", "/v1/chat/completions", "-o", "out.jsonl")
    assert "succeeded: 20 of 20 lines" in out
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 20


@pytest.mark.parametrize("output", ["nowhere/out.jsonl", "."], ids=["no directory", "a directory"])
def test_a_path_that_cannot_be_written_is_found_out_before_anything_is_sent(cli, tmp_path, output):
    (tmp_path / "in.jsonl").write_bytes(jsonl(chat_lines(2)))
    before = json.loads(cli("jobs", "--json"))
    cli("submit", "in.jsonl", "--endpoint", "/v1/chat/completions", "-o", output, code=2)
    assert json.loads(cli("jobs", "--json"))[:1] == before[:1]
    assert not (tmp_path / "nowhere").exists()


def test_a_schedule_from_a_file(cli, tmp_path):
    """Added once under a key with the file that it names, run, paused, resumed and removed."""
    (tmp_path / "in.jsonl").write_bytes(jsonl(chat_lines(3)))
    (tmp_path / "nightly.yaml").write_text(
        "name: nightly\ncron: 0 22 * * 1-5\ntz: Europe/Berlin\nkind: batch\n"
        "spec: {input_file_id: in.jsonl, endpoint: /v1/chat/completions}\n"
    )
    command = ["schedule", "add", "nightly.yaml", "--idempotency-key", f"cli-{uuid4().hex}", "--json"]
    made = json.loads(cli(*command))
    assert json.loads(cli(*command)) == made and made["spec"]["input_file_id"].startswith("file-")
    narrow = cli("schedule", COLUMNS="60")
    assert "…" not in narrow and made["id"][:8] in narrow
    assert "nightly" in cli("schedule") and "22 * * 1-5" in cli("schedule")
    run = json.loads(cli("schedule", "run", made["id"], "--json"))

    def ended():
        (found,) = json.loads(cli("schedule", "show", made["id"], "--json"))
        return found if found["job_status"] == "succeeded" else None

    assert wait_until(ended, 30)["id"] == run["id"] and "submitted" in cli("schedule", "show", made["id"])
    assert "paused" in cli("schedule", "pause", made["id"]) and "next" in cli("schedule", "resume", made["id"])
    cli("schedule", "remove", made["id"])
    cli("schedule", "show", made["id"], code=1)
    (tmp_path / "wrong.yaml").write_text("spec: {input_file_id: nowhere.jsonl}")
    cli("schedule", "add", "wrong.yaml", code=2)


def test_a_tenant_is_erased_with_a_report(cli, stack, admin_key):
    tenant = f"cli-{uuid4().hex[:8]}"
    httpx.post(f"{stack.url}/v1/tenants", json={"id": tenant}, headers={"Authorization": f"Bearer {admin_key}"})
    cli("keys", "create", "--tenant", tenant)
    cli("erase", tenant, code=1)  # nobody said yes
    report = json.loads(cli("erase", tenant, "--yes", "--wait", "--json"))
    assert report["status"] == "erased" and report["deleted"] == {"api_key": 1, "tenant": 1}
    cli("erase", tenant, "--yes", code=1)


def test_up_on_a_port_that_is_taken_says_so_and_leaves_nothing(scratch):
    """It said `ready` for whoever answered there, with a key that this one did not know."""
    data = scratch / "taken"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        command = [*CLI, "up", "--data", str(data), "--port", port, "--device", "cpu"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"Port {port}" in done.stderr and "ready" not in done.stdout
    assert not (data / "stack.json").exists() and not (data / "postgres").exists()


def test_a_file_submitted_twice_under_one_key_is_one_batch(cli, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl(chat_lines(3)))
    command = ["submit", "in.jsonl", "--endpoint", "/v1/chat/completions", "--idempotency-key", f"cli-{uuid4().hex}"]
    assert cli(*command) == cli(*command)


def test_a_batch_for_the_night_after_another(cli, tmp_path):
    """The hours that begin in two hours, of this machine's zone and of another one."""
    (tmp_path / "in.jsonl").write_bytes(jsonl(chat_lines(3)))
    command = ["submit", "in.jsonl", "--endpoint", "/v1/chat/completions"]
    start, end = (datetime.now(UTC) + timedelta(hours=hours) for hours in (2, 3))
    hours = f"{start:%H:%M}-{end:%H:%M}"
    first = cli(*command, "--window", hours, "--tz", "UTC").strip()
    second = cli(*command, "--after", first).strip()
    listed = {job["id"]: job for job in json.loads(cli("jobs", "--json", "--limit", "5"))}
    assert listed[first]["window"] == {"start": f"{start:%H:%M}", "end": f"{end:%H:%M}", "tz": "UTC"}
    assert listed[second]["after"] == [first]
    here = f"{start.astimezone():%H:%M}-{end.astimezone():%H:%M}"
    local = cli(*command, "--window", here, "--json")
    assert json.loads(local)["status"] == "validating"
    cli(*command, "--window", "night", code=2)
    cli(*command, "--window", hours, "--tz", "Nowhere/Land", code=1)
    for job in (first, json.loads(local)["id"]):
        cli("cancel", job)


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


def test_doctor_looks_at_everything_that_the_key_may_see(cli):
    """Of other tests' jobs some may be late just now: then it ends with 1, and says so."""
    found = {each["check"]: each for each in json.loads(cli("doctor", "--json", code=None))}
    checks = "Postgres Redis Workers Models Scheduler Jobs Tonight Lines Invariants Store Retention".split()
    assert list(found) == [*checks, "This CPU"]
    assert all(found[check]["ok"] for check in checks if check != "Tonight"), found
    assert "cpu:0" in found["Workers"]["detail"] and "bfloat16: " in found["This CPU"]["detail"]
    assert ("WRONG" in cli("doctor", code=None)) == (not found["Tonight"]["ok"])
    key = json.loads(cli("keys", "create", "--scope", "read", "--json"))["key"]
    table = cli("doctor", LAMPLIGHTER_API_KEY=key)
    assert "that takes an admin's key" in table and "Invariants" not in table


def test_doctor_says_that_postgres_is_away(cli):
    """It asked /readyz as any other call and took its 503 for a failure of the server."""

    class Gateway(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = {"status": "unavailable", "postgres": False, "redis": True}
            content = json.dumps(body if self.path == "/readyz" else {"error": {"message": "no"}}).encode()
            self.send_response(503)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        out = cli("doctor", code=1, LAMPLIGHTER_URL=url)
        found = {
            finding["check"]: finding for finding in json.loads(cli("doctor", "--json", code=1, LAMPLIGHTER_URL=url))
        }
        server.shutdown()
    (line,) = [line for line in out.splitlines() if "Postgres" in line]
    assert "WRONG" in line and "no job is accepted" in line
    assert not found["Postgres"]["ok"] and found["Redis"]["ok"] and "bfloat16: " in found["This CPU"]["detail"]


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
    for command in (["jobs"], ["watch", "batch_0"], ["doctor"]):
        cli(*command, code=3, LAMPLIGHTER_URL="http://127.0.0.1:9")


def tree_of(data):
    """Return every process of the stack in a data directory, and all that they have started."""
    state = json.loads((data / "stack.json").read_text())
    recorded = [psutil.Process(pid) for pid in (state["pid"], *state["processes"].values())]
    return {*recorded, *(child for process in recorded for child in process.children(recursive=True))}


def living(processes):
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def none_lives(processes):
    wait_until(lambda: not living(processes), 10, "all processes are gone")
    return True


def test_up_and_down_leave_nothing_behind(scratch):
    data = scratch / "own-stack"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LAMPLIGHTER_")}
    down = [*CLI, "down", "--data", str(data)]

    def up():
        command = [*CLI, "up", "--data", str(data), "--port", "0", "--device", "cpu", "--detach"]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)

    def models():
        url, key = json.loads((data / "stack.json").read_text())["url"], (data / "admin.key").read_text().strip()
        named = environment | {"LAMPLIGHTER_URL": url, "LAMPLIGHTER_API_KEY": key}
        return subprocess.run([*CLI, "models"], env=named, capture_output=True, text=True).stdout

    # What a machine that was switched off leaves: its numbers belong to others now. `up` took one for its supervisor.
    stranger = subprocess.Popen(["sleep", "300"])
    then = {str(stranger.pid): psutil.Process(stranger.pid).create_time() - 3600}
    state = {"pid": stranger.pid, "url": "x", "processes": {"valkey": stranger.pid}, "started": then}
    data.mkdir(mode=0o711)
    (data / "stack.json").write_text(json.dumps(state))
    first = up()
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
    assert first.returncode == 0 and first.stdout.startswith("ready http://127.0.0.1:"), first.stderr
    assert stat.S_IMODE((data / "admin.key").stat().st_mode) == 0o600
    first_life = tree_of(data)
    again = up()
    assert again.returncode == 1 and "already" in again.stderr and len(living(first_life)) == len(first_life)
    assert "echo" in models()
    # The supervisor killed, its processes orphaned: `up` ends them before its own servers take the same directories.
    psutil.Process(json.loads((data / "stack.json").read_text())["pid"]).kill()
    second = up()
    assert second.returncode == 0, second.stderr
    second_life = tree_of(data)
    assert none_lives(first_life) and "echo" in models()
    # And `down` ends what a killed supervisor left, of either life.
    psutil.Process(json.loads((data / "stack.json").read_text())["pid"]).kill()
    assert subprocess.run(down, env=environment, cwd=ROOT, timeout=120).returncode == 0
    assert none_lives(first_life | second_life)
    assert subprocess.run(down, env=environment, cwd=ROOT, timeout=60).returncode == 0


def test_a_terminated_demo_leaves_nothing_running(scratch):
    """SIGTERM ended it at once, and Postgres, gateway and workers went on."""
    directory = scratch / "demo"
    directory.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LAMPLIGHTER_DEMO_MODEL": "/nonexistent"}
    command = [sys.executable, "-m", "examples.demo.run"]
    demo = subprocess.Popen(command, env=environment, cwd=directory, stdout=subprocess.DEVNULL)
    seen = set()

    def has_ended():
        seen.update(psutil.Process(demo.pid).children(recursive=True))
        return demo.poll() is not None

    try:
        data = directory / "build" / "demo" / "stack"
        wait_until((data / "stack.json").exists, 60)
        seen |= tree_of(data)
        demo.send_signal(signal.SIGTERM)
        wait_until(has_ended, 60)
        assert len(seen) > 1 and none_lives(seen)
        assert demo.returncode != 0 and not (data / "stack.json").exists()
    finally:
        demo.kill()
        demo.wait()


SPECIFICATION = """
model: vector:2:4
tasks:
  - {name: odd, kind: classification, training_file: rows.jsonl, validation_file: held.jsonl, label_field: odd}
  - {name: size, kind: regression, training_file: rows.jsonl, validation_file: held.jsonl, label_field: size}
hyperparameters: {max_steps: 20, batch_size: 8}
"""


@pytest.fixture
def specification(tmp_path):
    rows = [{"text": [n / 40, n % 2], "odd": n % 2, "size": n} for n in range(40)]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "held.jsonl").write_bytes(jsonl(rows[:10]))
    (tmp_path / "spec.yaml").write_text(SPECIFICATION)
    return tmp_path / "spec.yaml"


def test_train_says_what_it_would_take_and_then_does_it(cli, specification):
    plan = cli("train", "spec.yaml", "--dry-run")
    assert "20 steps of 8 rows" in plan and "0 50 %, 1 50 %" in plan and "mean 19.5, deviation 11.54" in plan
    done = cli("train", "spec.yaml", "--wait", "--idempotency-key", "train-once")
    assert "served as ft:vector-2-4:" in done and "accuracy" in done and "rmse" in done
    keyed = [cli("train", "spec.yaml", "--idempotency-key", "train-once").strip() for _ in range(2)]
    assert keyed[0] == keyed[1] and keyed[0].startswith("train_")
    again = json.loads(cli("train", "spec.yaml", "--wait", "--json"))
    assert again["id"] != keyed[0]
    assert again["status"] == "succeeded" and [task["name"] for task in again["tasks"]] == ["odd", "size"]


def test_a_specification_has_times_and_numbers_as_they_are_written(tmp_path):
    from lamplighter.training_spec import read_specification

    (tmp_path / "spec.yaml").write_text(
        "window: {start: 22:00, end: 06:00, tz: UTC}\ndeadline: 2026-11-28T06:00:00Z\n"
        "hyperparameters: {learning_rate: 1e-4, n_epochs: 3, warmup_ratio: 0.1}\nseed: 010\nmodel: yes\n"
    )
    found = read_specification(tmp_path / "spec.yaml")
    assert found["window"] == {"start": "22:00", "end": "06:00", "tz": "UTC"}
    assert found["deadline"] == "2026-11-28T06:00:00Z" and found["seed"] == "010"
    assert found["hyperparameters"] == {"learning_rate": 1e-4, "n_epochs": 3, "warmup_ratio": 0.1}
    json.dumps(found)


def test_train_says_what_is_wrong(cli, specification, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(jsonl([{"text": [1, 2], "odd": 1, "size": 1}, {"text": [1], "odd": 0}]))
    refused = cli("train", "spec.yaml", "--dry-run", code=1)
    assert "line 2" in refused and "list of 2 numbers" in refused
    specification.write_text(SPECIFICATION.replace("kind: classification", "kind: poetry"))
    cli("train", "spec.yaml", code=1)
    specification.write_text(SPECIFICATION.replace("rows.jsonl", "nowhere.jsonl"))
    cli("train", "spec.yaml", code=2)
    specification.write_text("[1, 2")
    cli("train", "spec.yaml", code=2)


def test_the_plan_and_what_was_used(cli, tmp_path):
    """As tables, as JSON, and the plan as an image."""
    (tmp_path / "in.jsonl").write_bytes(jsonl(chat_lines(30, delay_ms=60_000)))
    job_id = cli("submit", "in.jsonl", "--endpoint", "/v1/chat/completions").strip()
    wait_until(lambda: job_id in cli("plan"), 20, "the plan has it")
    night = json.loads(cli("plan", "--json", "--image", "night.svg"))
    assert job_id in {job["id"] for job in night["jobs"]}
    assert (
        b"<svg" in (tmp_path / "night.svg").read_bytes()
        and job_id[-6:].encode() in (tmp_path / "night.svg").read_bytes()
    )
    cli("plan", "--image", "night.png")
    assert (tmp_path / "night.png").read_bytes().startswith(b"\x89PNG")
    cli("plan", "--image", "night.txt", code=2)
    cli("cancel", job_id)
    assert "echo" in cli("usage", "--by", "model")
    assert {"model", "job"} <= set(
        json.loads(cli("usage", "--by", "model", "--by", "job", "--json"))[-1]["results"][-1]
    )
