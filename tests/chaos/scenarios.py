"""The fault scenarios, each in a size of one's choice."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from services.local.ports import free_port
from services.local.stack import Stack, StackOptions
from shared.domain.slice import DEAD_AT, ENGINE_DEATH
from tests.chaos.gateway_failpoints import POINTS
from tests.chaos.harness import DEFAULTS, WORKERS, Chaos, Outcome
from tests.support.batches import chat_line, jsonl, read_lines
from tests.support.servers import ROOT, wait_until


LONGEST_MS = 900
FLUSH_LINES, SLOTS, SLICE_LINES = 4, 2, 40
"""Of the run that counts recomputed lines: all that one kill may cost (both workers with their launcher) is less than
half a slice, so that a worker which kept its answers until a slice's end would be found out."""


def _chaos(
    directory: Path,
    name: str,
    *,
    seed: int,
    lines: int,
    seconds: float,
    longest_ms: int = LONGEST_MS,
    more: dict | None = None,
) -> Chaos:
    """Return a run whose lines would take about `seconds` undisturbed, so that every kill finds work under way.

    Lines are held for up to `longest_ms`, half of that on average; a slice lasts as long as its slowest line.
    """
    at_once = max(4, round(lines / seconds * longest_ms / 1000))
    pace = {"LAMPLIGHTER_SLOTS": "1", "LAMPLIGHTER_SLICE_LINES": str(max(2, at_once // 2))}
    chaos = Chaos(directory, seed=seed, lines=lines, longest_ms=longest_ms, more=pace | (more or {}))
    chaos.outcome.name = name
    return chaos


def _paced(
    directory: Path, name: str, *, seed: int, lines: int, seconds: float, more: dict, timers: dict | None = None
) -> Chaos:
    """Return a run of about `seconds` whose engines compute one short line after the other, as a full device does.

    Slices last many flushes then, and yet no line comes near to the time that a process lives between two kills: one
    that did could not be told from poison (ADR 0005).
    """
    longest_ms = round(2 * 1000 * WORKERS * seconds / lines)
    assert longest_ms <= 400, "lines of this length would be taken for poison"
    more = {"CHAOS_LANES": "1"} | more
    chaos = Chaos(directory, seed=seed, lines=lines, longest_ms=longest_ms, more=more, timers=timers)
    chaos.outcome.name = name
    return chaos


def _repeat(chaos: Chaos, times: int, act, pause: tuple[float, float]) -> None:
    """Do `act` `times` times while work is under way; an `act` that returns False did nothing, and is done again.

    Where the work ends too soon, the outcome is not complete. Once all is done, the rest of the work hurries.
    """
    chaos.outcome.wanted = times
    done = 0
    while done < times and chaos.wait_for_work():
        if act() is not False:
            done += 1
        if done < times:
            time.sleep(chaos.random.uniform(*pause))
    chaos.hurry()


def worker_kills(directory: Path, *, seed: int, lines: int, times: int) -> Outcome:
    more = {
        "LAMPLIGHTER_SLOTS": str(SLOTS),
        "LAMPLIGHTER_SLICE_LINES": str(SLICE_LINES),
        "LAMPLIGHTER_FLUSH_LINES": str(FLUSH_LINES),
        # A flush is full before it is old, so that its size is what a kill may cost.
        "LAMPLIGHTER_FLUSH_SECONDS": "0.4",
    }
    assert FLUSH_LINES * SLOTS * WORKERS < SLICE_LINES
    chaos = _paced(directory, "worker processes killed", seed=seed, lines=lines, seconds=2.2 * times, more=more)
    with chaos.running():
        _repeat(chaos, times, chaos.kill_worker_process, (0.3, 1.8))
    return chaos.outcome


def redis_wipes(directory: Path, *, seed: int, lines: int, times: int) -> Outcome:
    chaos = _chaos(directory, "Redis killed and wiped", seed=seed, lines=lines, seconds=3.5 * times)
    with chaos.running():
        _repeat(chaos, times, chaos.kill_and_wipe_redis, (0.3, 1.5))
    return chaos.outcome


def postgres_kills(directory: Path, *, seed: int, lines: int, times: int) -> Outcome:
    chaos = _chaos(directory, "Postgres killed", seed=seed, lines=lines, seconds=4.0 * times)
    with chaos.running():
        _repeat(chaos, times, chaos.kill_postgres, (0.5, 1.5))
    return chaos.outcome


def redis_wipes_by_default(directory: Path, *, seed: int, lines: int, times: int) -> Outcome:
    """The bar in seconds is a promise about the settings that everybody has: no timer is shortened here."""
    name = "Redis killed and wiped, default settings"
    chaos = _paced(directory, name, seed=seed, lines=lines, seconds=20.0 * times, more={}, timers=DEFAULTS)
    with chaos.running():
        _repeat(chaos, times, chaos.kill_and_wipe_redis, (1.0, 3.0))
    return chaos.outcome


def postgres_kills_by_default(directory: Path, *, seed: int, lines: int, times: int) -> Outcome:
    """As above."""
    name = "Postgres killed, default settings"
    chaos = _paced(directory, name, seed=seed, lines=lines, seconds=20.0 * times, more={}, timers=DEFAULTS)
    with chaos.running():
        _repeat(chaos, times, chaos.kill_postgres, (2.0, 4.0))
    return chaos.outcome


def scheduler_kills(directory: Path, *, seed: int, lines: int, times: int) -> Outcome:
    chaos = _chaos(directory, "scheduler killed", seed=seed, lines=lines, seconds=4.5 * times)
    with chaos.running():
        _repeat(chaos, times, lambda: chaos.kill_service("scheduler"), (1.0, 3.0))
    return chaos.outcome


def zombies(directory: Path, *, seed: int, lines: int, times: int, unfenced: bool = False) -> Outcome:
    more = {"CHAOS_OBLIVIOUS": "1"} | ({"CHAOS_UNFENCED": "1"} if unfenced else {})
    name = "workers stopped beyond their lease" + (" WITHOUT the fence (control)" if unfenced else "")
    chaos = _chaos(directory, name, seed=seed, lines=lines, seconds=10.0 * times, more=more)
    with chaos.running():
        _repeat(chaos, times, chaos.stop_worker_beyond_its_lease, (0.3, 1.0))
    return chaos.outcome


@dataclass
class GatewayOutcome:
    """`unfound`: batches that a 2xx was given for and that are not there. `doubled`: keys with more than one job."""

    wanted: int = 0
    kills: Counter = field(default_factory=Counter)
    acknowledged: int = 0
    unfound: int = 0
    doubled: int = 0
    missing: int = 0
    survived: int = 0
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether the gateway died of its own hand at every point, as often as it was to, the last one being behind an
        answer that its client has read: without such ones nothing could be found to be missing.
        """
        points = {self.kills[point] for point in POINTS}
        return self.survived == 0 and points == {self.wanted // len(POINTS)} and self.acknowledged > 0

    @property
    def bad(self) -> int:
        return self.unfound + self.doubled + self.missing

    def __str__(self) -> str:
        return (
            f"gateway killed: {sum(self.kills.values())} of {self.wanted} kills at {len(self.kills)} points in"
            f" {self.seconds:.0f} s:"
            f" {self.acknowledged} acknowledged, {self.unfound} of them not found, {self.doubled} keys with two jobs,"
            f" {self.missing} without one after the retry, {self.survived} that did not die"
        )


def gateway_kills(directory: Path, *, times: int) -> GatewayOutcome:
    """Kill a gateway at every named point around COMMIT, `times` times each; then retry under the same key."""
    outcome, started = GatewayOutcome(wanted=times * len(POINTS)), time.monotonic()
    stack = Stack(StackOptions(directory / "stack", device="cpu"))
    try:
        stack.start()
        key = (stack.directory / "admin.key").read_text().strip()
        with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as healthy:
            uploaded = healthy.post(
                "/v1/files", data={"purpose": "batch"}, files={"file": ("x.jsonl", jsonl([chat_line("only")]))}
            )
            body = {
                "input_file_id": uploaded.json()["id"],
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
            }
            forks = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.gateway_failpoints"],
                env=stack.environment("gateway"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                stderr=subprocess.DEVNULL,
            )
            try:
                for round_ in range(times):
                    for point in POINTS:
                        _kill_gateway_once(outcome, forks, healthy, body, point, f"{round_}-{point}")
            finally:
                forks.stdin.close()
                forks.wait(30)
    finally:
        stack.shut_down()
    outcome.seconds = time.monotonic() - started
    return outcome


def _kill_gateway_once(outcome, forks, healthy, body, point, key) -> None:
    port = free_port()
    forks.stdin.write(f"{port} {point}\n")
    forks.stdin.flush()
    pid = int(forks.stdout.readline())
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: _answers(url), 30, "the doomed gateway is up")
    headers = {"Idempotency-Key": key}
    acknowledged = None
    try:
        response = httpx.post(f"{url}/v1/batches", json=body, headers=dict(healthy.headers) | headers, timeout=30)
        acknowledged = response.json()["id"] if response.is_success else None
    except (httpx.TransportError, ValueError):
        pass  # the point of it all
    if _is_alive(pid):
        outcome.survived += 1
        os.kill(pid, signal.SIGKILL)
    else:
        outcome.kills[point] += 1
    if acknowledged is not None:
        outcome.acknowledged += 1
        outcome.unfound += healthy.get(f"/v1/batches/{acknowledged}").status_code != 200
    retried = wait_until(lambda: _retry(healthy, body, headers), 30, "the retry is accepted")
    outcome.missing += retried is None
    found = healthy.get("/v1/jobs", params={"idempotency_key": key}).json()["data"]
    outcome.doubled += len(found) != 1


def _retry(healthy, body, headers):
    response = healthy.post("/v1/batches", json=body, headers=headers)
    return response.json()["id"] if response.is_success else None


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def _is_alive(pid: int) -> bool:
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            return False
        time.sleep(0.01)
    return True


def poison(directory: Path, *, seed: int, lines: int) -> Outcome:
    """One line kills its engine child whenever it is computed: it is dead-lettered, all others succeed."""
    chaos = Chaos(directory, seed=seed, lines=lines, longest_ms=60, more={"CHAOS_POISON": f"line-{lines // 3}"})
    chaos.outcome.name = "one poison line"
    with chaos.running():
        chaos.wait_for_work()
        wait_until(chaos.is_over, 300, "the batch ends")
        with chaos.sdk as sdk:
            (entry,) = read_lines(sdk, sdk.batches.retrieve(chaos.batch_id).error_file_id).values()
        assert entry["custom_id"] == f"line-{lines // 3}" and entry["response"] is None, entry
        assert entry["error"]["code"] == "line_failed", entry
    logs = (chaos.stack.log_directory / "launcher.log").read_text()
    restarts = chaos.outcome.kills["engine restarts"] = logs.count("child ended")
    # That many engine deaths condemn a line (ADR 0005): one that went with fewer was given up too soon.
    chaos.outcome.wanted = max(DEAD_AT // ENGINE_DEATH, restarts)
    return chaos.outcome


def hung_child(directory: Path, *, seed: int, lines: int) -> Outcome:
    """An engine child is stopped in the middle of its work: it is killed and replaced, and nothing else notices."""
    chaos = Chaos(directory, seed=seed, lines=lines, longest_ms=900, more={"LAMPLIGHTER_HANG_SECONDS": "4"})
    chaos.outcome.name, chaos.outcome.wanted = "hung engine child", 1
    with chaos.running():
        chaos.wait_for_work()
        victim = wait_until(chaos.busy_engine, 20, "an engine is at work")
        victim.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        wait_until(lambda: not _is_alive(victim.pid), 45, "the hung child is killed")
        chaos._note("hung child killed", time.monotonic() - started)
        chaos.outcome.kills["child stopped"] += 1
    return chaos.outcome


def drains(directory: Path, *, seed: int, lines: int, times: int) -> tuple[Outcome, Counter, int]:
    """Ask the launcher to leave with SIGTERM while slices run; return the outcome, attempts by outcome, and losses."""
    directory.mkdir(exist_ok=True)
    chaos = _chaos(directory, "workers drained", seed=seed, lines=lines, seconds=4.0 * times)

    def drain():
        launcher = chaos.stack.processes["launcher"].running
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(45)
        chaos.outcome.kills["SIGTERM"] += 1

    with chaos.running():
        _repeat(chaos, times, drain, (0.5, 1.0))
        chaos.finish()
        attempts = Counter(dict(chaos.query("SELECT outcome, count(*) FROM attempt GROUP BY outcome")))
        losses = chaos.query("SELECT coalesce(sum(losses), 0) FROM slice")[0][0]
    return chaos.outcome, attempts, int(losses)
