"""Runs a batch while real processes are killed, then counts what was lost, doubled and recomputed.

The audit reads a `result` table whose primary key was dropped first: what keeps lines single is the fence alone.
"""

import os
import random
import signal
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import openai
import psutil
import psycopg

from services.local.stack import Stack, StackOptions
from shared.queueing.wake import connect_redis
from tests.support.batches import chat_line, jsonl
from tests.support.servers import ROOT, wait_until

FAST = {
    "LAMPLIGHTER_LEASE_SECONDS": "6",
    "LAMPLIGHTER_HEARTBEAT_SECONDS": "1",
    "LAMPLIGHTER_REAP_SECONDS": "0.5",
    "LAMPLIGHTER_REDISPATCH_SECONDS": "5",
    "LAMPLIGHTER_DISPATCH_SECONDS": "0.3",
    "LAMPLIGHTER_EPOCH_SECONDS": "1",
    "LAMPLIGHTER_AUDIT_SECONDS": "10",
    "LAMPLIGHTER_HANG_SECONDS": "15",
    "LAMPLIGHTER_SLOTS": "2",
    "LAMPLIGHTER_SLICE_LINES": "50",
    "LAMPLIGHTER_FLUSH_SECONDS": "0.2",
    "LAMPLIGHTER_FLUSH_LINES": "32",
    "LAMPLIGHTER_LOG_LEVEL": "WARNING",
}
"""Short timers, so that many kills fit into a run; the bars in seconds are measured without them, too."""
DEFAULTS = {"LAMPLIGHTER_LOG_LEVEL": "WARNING"}
WORKERS = 2


@dataclass
class Outcome:
    """What a chaos run came to.

    `wanted` is how many kills were to hit work under way.
    """

    name: str
    seed: int
    lines: int
    wanted: int = 0
    kills: Counter = field(default_factory=Counter)
    lost: int = 0
    twice: int = 0
    failed: int = 0
    recomputed: int = 0
    costs: dict = field(default_factory=dict)
    """Lines computed again, by the number of the kill that ended the engine which had computed them; None: by no kill."""
    flushes: dict = field(default_factory=dict)
    """How many lines each kill may cost, by its number."""
    stale_writes: int = 0
    unnamed: int = 0
    """Log lines of these that do not say of whose slice of which job they are."""
    findings: int = 0
    seconds: float = 0.0
    slowest: dict = field(default_factory=dict)

    @property
    def killed(self) -> int:
        return sum(self.kills.values())

    @property
    def worst_excess(self) -> int:
        """Lines that one kill had computed again beyond a flush of what it ended, at most; no kill, no line."""
        return max((cost - self.flushes.get(kill, 0) for kill, cost in self.costs.items()), default=0)

    @property
    def is_complete(self) -> bool:
        """Whether every kill that was asked for happened, while work was under way."""
        return self.killed == self.wanted

    @property
    def size(self) -> str:
        """The run's size, as the README's table has it."""
        return f"{self.name}: {self.killed} of {self.wanted} kills over {self.lines:,} lines"

    def __str__(self) -> str:
        kills = ", ".join(f"{count}×{what}" for what, count in sorted(self.kills.items())) or "no kill"
        slow = "".join(f", {what} ≤ {value:.1f} s" for what, value in self.slowest.items())
        return (
            f"{self.size} (seed {self.seed}; {kills}) in {self.seconds:.0f} s: {self.lost} lost,"
            f" {self.twice} twice, {self.failed} failed, {self.recomputed} recomputed, {self.stale_writes} stale writes"
            f" rejected, {self.findings} audit findings{slow}"
        )


def wipe_redis(stack: Stack) -> None:
    """Delete all that Redis has on disk, but for how it is set up."""
    for path in sorted((stack.directory / "valkey").rglob("*"), reverse=True):
        if path.name not in ("valkey.conf", "password"):
            path.rmdir() if path.is_dir() else path.unlink()


class Chaos:
    """A stack of two CPU workers with a batch on it, and the means to hurt it."""

    def __init__(
        self,
        directory: Path,
        *,
        seed: int,
        lines: int,
        longest_ms: int = 400,
        more: dict | None = None,
        timers: dict | None = None,
    ) -> None:
        self.random = random.Random(seed)
        self.outcome = Outcome("", seed, lines)
        self.tally = directory / "tally"
        self._hurry = directory / "HURRY"
        environment = (FAST if timers is None else timers) | {
            "CHAOS_TALLY": str(self.tally),
            "PYTHONPATH": str(ROOT),
        }
        environment |= more or {}
        options = StackOptions(directory / "stack", workers=str(WORKERS), device="cpu", environment=environment)
        options.modules = {"launcher": "tests.chaos.launcher"}
        self.stack = Stack(options)
        self.longest_ms = longest_ms
        self.batch_id = ""
        self._ended: dict[int, int] = {}
        """Engines' pids, and the number of the kill that ended each."""

    def hurry(self) -> None:
        """Let the rest of the batch run without delay: the kills are done."""
        self._hurry.touch()

    @contextmanager
    def running(self):
        """Start the stack and submit the batch; audit it and stop everything at the end."""
        started = time.monotonic()
        try:
            self.stack.start()
            self.drop_result_key()
            self.submit()
            yield self
            self.finish()
        finally:
            self.stack.shut_down()
            self.outcome.seconds = time.monotonic() - started

    def superuser(self) -> psycopg.Connection:
        return psycopg.connect(self.stack.database_url("superuser"), autocommit=True, connect_timeout=3)

    def drop_result_key(self) -> None:
        with self.superuser() as connection:
            connection.execute("ALTER TABLE result DROP CONSTRAINT result_pkey")
            connection.execute("CREATE INDEX result_chaos_idx ON result (created_on, job_id, line_no)")

    @property
    def sdk(self) -> openai.OpenAI:
        key = (self.stack.directory / "admin.key").read_text().strip()
        return openai.OpenAI(base_url=f"{self.stack.url}/v1", api_key=key, max_retries=8)

    def submit(self) -> None:
        lines = [
            chat_line(f"line-{i}", f"line-{i}", delay_ms=self.random.randint(20, self.longest_ms))
            for i in range(self.outcome.lines)
        ]
        with self.sdk as sdk:
            uploaded = sdk.files.create(file=("chaos.jsonl", jsonl(lines)), purpose="batch")
            batch = sdk.batches.create(
                input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        self.batch_id = batch.id

    def query(self, statement: str):
        with self.superuser() as connection:
            return connection.execute(statement).fetchall()

    def running_slices(self) -> int:
        try:
            return self.query("SELECT count(*) FROM slice WHERE state = 'running'")[0][0]
        except psycopg.OperationalError:
            return 0

    def is_over(self) -> bool:
        try:
            return self.query("SELECT count(*) FROM job WHERE ended_at IS NULL")[0][0] == 0
        except psycopg.OperationalError:
            return False

    def wait_for_work(self, seconds: float = 60) -> bool:
        """Wait until a slice runs; False when the job is over, and a kill would prove nothing."""
        wait_until(lambda: self.running_slices() or self.is_over(), seconds, "a slice runs")
        return not self.is_over()

    def workers(self) -> list[psutil.Process]:
        """Return the Celery processes that live now."""
        processes = []
        launcher = self.stack.processes["launcher"].running
        try:
            children = psutil.Process(launcher.pid).children()
        except psutil.Error:
            return []
        for process in children:
            try:
                if "tests.chaos.worker" in process.cmdline():
                    processes.append(process)
            except psutil.Error:
                continue
        return processes

    def busy_workers(self) -> list[psutil.Process]:
        """Return Celery processes that run a slice now."""
        pids = {
            row[0]
            for row in self.query(
                "SELECT DISTINCT pid FROM slice JOIN worker USING (worker_id) WHERE slice.state = 'running'"
            )
        }
        return [process for process in self.workers() if process.pid in pids]

    def busy_engine(self) -> psutil.Process | None:
        """Return the engine child of a Celery process that runs a slice now, if there is one."""
        for process in self.busy_workers():
            with suppress(psutil.Error):
                if engines := process.children():
                    return engines[0]
        return None

    def kill_worker_process(self) -> bool:
        """SIGKILL a Celery process, an engine child or the launcher, while a slice runs on it."""
        busy = self.busy_workers()
        if not busy:
            return False
        what = self.random.choices(["celery", "engine", "launcher"], weights=[5, 4, 1])[0]
        try:
            victims = self.workers() if what == "launcher" else [self.random.choice(busy)]
            engines = [child for victim in victims for child in victim.children()]
            if what == "launcher":
                if not self.kill_service("launcher"):
                    return False
            else:
                victim = victims[0] if what == "celery" else engines[0]
                if victim.status() == psutil.STATUS_ZOMBIE:
                    return False
                victim.send_signal(signal.SIGKILL)
                victim.wait(10)
                self.outcome.kills[what] += 1
        except (psutil.NoSuchProcess, IndexError):
            return False
        self._ended |= dict.fromkeys((engine.pid for engine in engines), self.outcome.killed)
        self.outcome.flushes[self.outcome.killed] = self._flush_of(what)
        return True

    def _costs(self) -> dict[int | None, int]:
        """Return how many lines each kill had computed again, by its number."""
        computed: dict[str, list[int]] = {}
        for entry in self.tally.read_text().splitlines():
            line, pid = entry.split()
            computed.setdefault(line, []).append(int(pid))
        assert len(computed) >= self.outcome.lines - self.outcome.failed, "the tally does not name every line"
        return dict(Counter(self._ended.get(pid) for pids in computed.values() for pid in pids[:-1]))

    def _flush_of(self, what: str) -> int:
        """Return how many lines a kill may have computed again: a flush of each slice that ran in what died.

        An engine's answers are kept by its worker, so its death costs only lines that were on their way there.
        """
        settings = self.stack.settings("worker")
        if what == "engine":
            return settings.slots
        return settings.slots * settings.flush_lines * (WORKERS if what == "launcher" else 1)

    def kill_service(self, name: str) -> bool:
        """SIGKILL a process of the stack; its supervisor starts it again. False when it was not there to be killed."""
        with self.stack._lock:  # or the supervisor might start it before its death is seen
            running = self.stack.processes[name].running
            if running.poll() is not None:
                return False
            os.kill(running.pid, signal.SIGKILL)
            assert running.wait(10) == -signal.SIGKILL, f"{name} ended before it was killed"
        self.outcome.kills[name] += 1
        return True

    def kill_and_wipe_redis(self) -> bool:
        """Kill Redis and delete its data while slices wait in it; note how long it took until all of these were sent
        again. False when none waited in the moment of the kill, so that it proved nothing.
        """
        wait_until(lambda: self._dispatched() or self.is_over(), 60, "slices wait in Redis")
        with self.stack._lock:  # the supervisor must not start it before it is empty
            running = self.stack.processes["valkey"].running
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
            stranded = self._dispatched()
            wipe_redis(self.stack)
        wait_until(self._redis_answers, 30, "Redis is back")
        back = time.monotonic()
        # Marked as sent while Redis was away is not sent: only a number drawn from here on says so.
        numbers = dict(self.query("SELECT slice_id, dispatch_no FROM slice"))
        if not stranded:
            return False
        wait_until(lambda: not self._still_stranded(stranded, numbers), 60, "the wiped slices are sent again")
        self.outcome.kills["redis wiped"] += 1
        self._note("re-dispatch after a wipe", time.monotonic() - back)
        return True

    def _dispatched(self) -> dict[int, int]:
        """Return the tries so far of the slices whose messages wait in Redis, by id."""
        return dict(self.query("SELECT slice_id, attempts FROM slice WHERE state = 'dispatched'"))

    def _still_stranded(self, stranded: dict[int, int], numbers: dict[int, int]) -> list[int]:
        """Return those of the slices that were neither claimed since the kill nor sent again since Redis is back."""
        rows = self.query("SELECT slice_id, attempts, dispatch_no, state FROM slice")
        return [
            slice_id
            for slice_id, attempts, dispatch_no, state in rows
            if slice_id in stranded
            and attempts == stranded[slice_id]
            and not (dispatch_no > numbers[slice_id] and state == "dispatched")
        ]

    def _redis_answers(self) -> bool:
        try:
            return bool(connect_redis(self.stack.redis_url, timeout_seconds=1).ping())
        except Exception:
            return False

    def kill_postgres(self) -> bool:
        """SIGKILL Postgres; note how long after its return the first result was recorded."""
        if not self.kill_service("postgres"):
            return False

        def recorded():
            try:
                return self.query("SELECT coalesce(sum(completed), 0) FROM slice")[0][0]
            except psycopg.OperationalError:
                return None

        wait_until(lambda: recorded() is not None, 60, "Postgres is back")
        before, started = recorded(), time.monotonic()
        wait_until(lambda: (recorded() or 0) > before, 60, "work resumes")
        self._note("work after Postgres is back", time.monotonic() - started)
        return True

    def _note(self, what: str, seconds: float) -> float:
        self.outcome.slowest[what] = max(seconds, self.outcome.slowest.get(what, 0.0))
        return seconds

    def stop_worker_beyond_its_lease(self) -> bool:
        """SIGSTOP a Celery process until its lease is taken, then let it go on and try to write."""
        busy = self.busy_workers()
        if not busy:
            return False
        victim = self.random.choice(busy)
        found = self.query(f"SELECT worker_id FROM worker WHERE pid = {victim.pid} AND state <> 'lost'")
        if not found:
            return False
        (worker_id,) = found[0]
        victim.send_signal(signal.SIGSTOP)
        try:
            held = self.query(f"SELECT slice_id FROM slice WHERE worker_id = '{worker_id}' AND state = 'running'")
            # Only a zombie whose lines another has recorded meanwhile can record them twice.
            wait_until(lambda: all(self._is_done(slice_id) for (slice_id,) in held), 60, "an heir finishes the slices")
        finally:
            victim.send_signal(signal.SIGCONT)
        # Its slice may have ended between the look and the stop: that was no stop of a worker with a lease.
        self.outcome.kills["sigstop"] += bool(held)
        return bool(held)

    def _is_done(self, slice_id: int) -> bool:
        return self.query(f"SELECT state FROM slice WHERE slice_id = {slice_id}")[0][0] == "done"

    def finish(self, seconds: float = 900) -> None:
        """Wait for the end of the batch, then audit it."""
        wait_until(self.is_over, seconds, "the batch ends")
        time.sleep(1.5)  # zombies, if there are any, write now
        job = f"'{self.batch_id.removeprefix('batch_')}'"
        rows, lines, failed = self.query(
            f"SELECT count(*), count(DISTINCT line_no), count(*) FILTER (WHERE status_code IS DISTINCT FROM 200) FROM result WHERE job_id = {job}"
        )[0]
        self.outcome.lost = self.outcome.lines - lines
        self.outcome.twice = rows - lines
        self.outcome.failed = failed
        self.outcome.findings = self.query("SELECT count(*) FROM audit_finding")[0][0]
        self.outcome.costs = self._costs()
        self.outcome.recomputed = sum(self.outcome.costs.values())
        logs = (self.stack.log_directory / "launcher.log").read_text(errors="replace")
        rejected = [line for line in logs.splitlines() if "stale write rejected" in line]
        self.outcome.stale_writes = len(rejected)
        ids = ('"tenant":"default"', f'"job_id":"{job.strip(chr(39))}"', '"slice_id":')
        self.outcome.unnamed = sum(not all(each in line for each in ids) for line in rejected)
