"""`make bench-surface`: the rows of the surface, on the embedded default."""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg

from tests.benchmarks.bench_board import bench_board
from tests.benchmarks.bench_metrics import bench_metrics
from tests.benchmarks.bench_spine import MIB, Memory, native_for, running_stack
from tests.benchmarks.load import Connection, Sample, chat_body, closed_loop, open_loop, percentile
from tests.benchmarks.table import Table
from tests.support.models import make_tiny_llama
from tests.support.servers import ROOT, wait_until

SCHEMA_CASES = 150
"""Of each route, and as many wrong ones: 10,000 and more in all."""
LIMIT, DELAY_MS = 32, 1000
ALONE_CALLS, ALONE_BATCHES = 20, 5
STREAMS = 8
"""How many of the LIMIT calls in flight are streams."""
BATCH_LINES, BATCH_DELAYS_MS, OPEN_BATCHES = 1000, (0, 4000), 4
"""Batches of the overload, whose lines end evenly over a slice; one more than OPEN_BATCHES fits below the tenant's limit."""
OVERLOAD_BATCHES_A_SECOND = 2.0
"""More than ten times what is served: four slots of 125 lines that take four seconds make an eighth of a batch a second."""
WARM_SECONDS = 6.0
HELD_MS = 4000
"""The longest that a queued line is held: 1,024 at once, which end evenly, make 250 lines/s, more than a device serves.
At 0 the two cores of a small machine are the limit, and the ratio is theirs: about 3 (docs/log.md)."""
NOT_MEASURED = -1.0


def key_of(stack):
    return (stack.directory / "admin.key").read_text().strip()


def bench_concurrency(table: Table, seconds: float) -> None:
    with running_stack("online") as stack:
        key = key_of(stack)
        rows = (
            ("surface-1a", 1, 0.5, "p50", 0.015),
            ("surface-1b", 32, 0.99, "p99", 0.150),
            ("surface-1c", 256, 0.99, "p99", 1.0),
        )
        asyncio.run(closed_loop(stack.port, key, 8, 2, chat_body()))  # everything is loaded and cached after this
        for identifier, concurrency, share, name, bar in rows:
            samples = asyncio.run(closed_loop(stack.port, key, concurrency, seconds, chat_body()))
            value = percentile([sample.total for sample in samples], share)
            errors = sum(sample.status != 200 for sample in samples)
            what = f"echo chat, {concurrency} at once: {name} ({len(samples) / seconds:.0f} calls/s, {errors} errors)"
            table.add(identifier, what, value * 1000, "ms", f"≤ {bar * 1000:.0f}", value <= bar and not errors)


def bench_first_token(table: Table, calls: int) -> None:
    """The first token's time through the stack and from the engine alone, in turn."""
    with tempfile.TemporaryDirectory() as directory, running_stack("ttft") as stack:
        path = make_tiny_llama(Path(directory) / "tiny")
        os.chmod(directory, 0o755)
        key = key_of(stack)
        with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key}"}) as http:
            http.post("/v1/models", json={"name": "tiny", "source": str(path)}).raise_for_status()
        command = [sys.executable, "-m", "tests.benchmarks.direct_first_token", str(path)]
        engine = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        body = chat_body("go", model="tiny", stream=True, max_tokens=8, temperature=0)
        direct, through = [], []
        for number in range(calls + 3):
            engine.stdin.write("go\n")
            engine.stdin.flush()
            alone = float(engine.stdout.readline())
            sample = asyncio.run(_one_stream(stack.port, key, body))
            if number >= 3:
                direct.append(alone)
                through.append(sample.first)
        engine.stdin.close()
        engine.wait()
    added = statistics.median(through) - statistics.median(direct)
    what = f"first token: through the stack {statistics.median(through) * 1000:.1f} ms − engine alone "
    what += f"{statistics.median(direct) * 1000:.1f} ms, medians of {calls}"
    samples = [[a * 1000, b * 1000] for a, b in zip(through, direct, strict=True)]
    table.add("surface-2", what, added * 1000, "ms", "≤ 10", added <= 0.010, samples)


async def _one_stream(port, key, body):
    connection = Connection(port, key)
    sample = await connection.post("/v1/chat/completions", body, until=b'"content":')
    connection.close()
    assert sample.status == 200, sample
    return sample


@dataclass
class Mix:
    """What came of calls of each kind within a window of `seconds`, and of the lines of batches."""

    seconds: float
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    lines: int = 0
    began: float = 0.0

    def served(self, kind: str) -> list[float]:
        """Return the times of the calls that were served within the window; one that ended after it is no goodput."""
        return [s.total for s in self.samples[kind] if s.status == 200 and 0 < s.at - self.began <= self.seconds]

    @property
    def calls_a_second(self) -> float:
        return (len(self.served("plain")) + len(self.served("streamed"))) / self.seconds

    @property
    def lines_a_second(self) -> float:
        return self.lines / self.seconds

    @property
    def statuses(self) -> dict[str, int]:
        """How often each status came, of all calls, in the window and around it."""
        found = [str(sample.status) for samples in self.samples.values() for sample in samples]
        return {status: found.count(status) for status in sorted(set(found))}


class Overload:
    """Plain calls, streams and batches on one stack whose limits are low enough to be passed by far."""

    def __init__(self, stack) -> None:
        self._port, self._key = stack.port, key_of(stack)
        self._database = psycopg.connect(stack.database_url("superuser"), autocommit=True)
        self._plain, self._streamed = chat_body(delay_ms=DELAY_MS), chat_body(delay_ms=DELAY_MS, stream=True)
        dice = random.Random(0)
        lines = [
            {
                "model": "echo",
                "messages": [{"role": "user", "content": f"{i}"}],
                "delay_ms": dice.randint(*BATCH_DELAYS_MS),
            }
            for i in range(BATCH_LINES)
        ]
        with native_for(stack) as native:
            file_id = native.submit(lines, "/v1/chat/completions")["input_file_id"]
        batch = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        self._batch = json.dumps(batch).encode()

    def close(self) -> None:
        self._database.close()

    def _number(self, statement: str) -> int:
        return self._database.execute(statement).fetchone()[0]

    def lines_done(self) -> int:
        return self._number("SELECT coalesce(sum(completed), 0) FROM slice")

    def _open_batches(self) -> int:
        return self._number("SELECT count(*) FROM job WHERE kind = 'batch' AND ended_at IS NULL")

    async def _count_lines(self, mix: Mix) -> None:
        await asyncio.sleep(max(0.0, mix.began - time.monotonic()))
        before = await asyncio.to_thread(self.lines_done)
        await asyncio.sleep(max(0.0, mix.began + mix.seconds - time.monotonic()))
        mix.lines = await asyncio.to_thread(self.lines_done) - before

    async def _keep_batches_open(self, mix: Mix) -> list[Sample]:
        connection, samples = Connection(self._port, self._key), []
        while time.monotonic() < mix.began + mix.seconds:
            if await asyncio.to_thread(self._open_batches) < OPEN_BATCHES:
                samples.append(await connection.post("/v1/batches", self._batch))
            await asyncio.sleep(0.1)
        connection.close()
        return samples

    async def alone(self, calls: int, batches: int) -> Mix:
        """Send one at a time, with nothing beside it: what unloaded means."""
        mix = Mix(0.0, began=time.monotonic())
        connection = Connection(self._port, self._key)
        bodies = {"plain": self._plain, "streamed": self._streamed}
        for kind, body in bodies.items():
            mix.samples[kind] = [await connection.post("/v1/chat/completions", body) for _ in range(calls)]
        mix.samples["batches"] = []
        for _ in range(batches):
            mix.samples["batches"].append(await connection.post("/v1/batches", self._batch))
            while await asyncio.to_thread(self._open_batches):
                await asyncio.sleep(0.1)
        connection.close()
        return mix

    async def saturate(self, seconds: float) -> Mix:
        """Offer as much as is just not refused, and always so: what comes of it is the most that there is to have."""
        mix = Mix(seconds, began=time.monotonic() + WARM_SECONDS)
        plain, streamed, batches, _ = await asyncio.gather(
            closed_loop(self._port, self._key, LIMIT - STREAMS - 1, seconds, self._plain, warm_seconds=WARM_SECONDS),
            closed_loop(self._port, self._key, STREAMS, seconds, self._streamed, warm_seconds=WARM_SECONDS),
            self._keep_batches_open(mix),
            self._count_lines(mix),
        )
        mix.samples = {"plain": plain, "streamed": streamed, "batches": batches}
        return mix

    async def overload(self, seconds: float) -> Mix:
        """Offer ten times that, whatever is answered."""
        mix = Mix(seconds, began=time.monotonic() + WARM_SECONDS)
        rate = 10 / (DELAY_MS / 1000)
        online, whole = "/v1/chat/completions", seconds + WARM_SECONDS
        plain, streamed, batches, _ = await asyncio.gather(
            open_loop(self._port, self._key, (LIMIT - STREAMS) * rate, whole, online, self._plain),
            open_loop(self._port, self._key, STREAMS * rate, whole, online, self._streamed),
            open_loop(self._port, self._key, OVERLOAD_BATCHES_A_SECOND, whole, "/v1/batches", self._batch),
            self._count_lines(mix),
        )
        mix.samples = {"plain": plain, "streamed": streamed, "batches": batches}
        return mix


def bench_overload(table: Table, seconds: float) -> None:
    """Ten times what is served: calls that are held for DELAY_MS, whole and streamed, and batches of 1,000 beside."""
    limits = {
        "LAMPLIGHTER_ONLINE_LIMIT": str(LIMIT),
        "LAMPLIGHTER_ONLINE_LIMIT_PER_TENANT": str(LIMIT),
        "LAMPLIGHTER_MAX_QUEUED_LINES_PER_TENANT": str((OPEN_BATCHES + 1) * BATCH_LINES),
    }
    with running_stack("overload", **limits) as stack, ExitStack() as closing:
        load = Overload(stack)
        closing.callback(load.close)
        alone = asyncio.run(load.alone(ALONE_CALLS, ALONE_BATCHES))
        calm = asyncio.run(load.saturate(seconds))
        # The launcher's are the worker's and its engine child's.
        names = ("gateway", "launcher", "scheduler", "valkey")
        watched = {name: Memory(stack.processes[name].running.pid) for name in names}
        for memory in watched.values():
            closing.enter_context(memory)
        busy = asyncio.run(load.overload(seconds))
        grown = {name: round((memory.highest - memory.before) / MIB, 1) for name, memory in watched.items()}
    assert set(calm.statuses) == {"200"}, f"the unloaded side was refused something: {calm.statuses}"
    assert set(alone.statuses) == {"200"}, f"a lone call was refused: {alone.statuses}"
    _overload_rows(table, alone, calm, busy, grown)


def _overload_rows(table: Table, alone: Mix, calm: Mix, busy: Mix, grown: dict[str, float]) -> None:
    sent = {kind: len(samples) for kind, samples in busy.samples.items()}
    others = sum(count for status, count in busy.statuses.items() if status not in ("200", "429"))
    what = f"10× overload for {busy.seconds:.0f} s, sent {sent}: answered {busy.statuses} (0: no answer)"
    table.add("surface-3a", what, others, "others", "= 0", others == 0, [busy.statuses])
    p99 = {
        kind: [
            percentile([s.total for s in mix.samples[kind] if s.status == 200], 0.99) * 1000 for mix in (busy, alone)
        ]
        for kind in busy.samples
    }
    added = max(loaded - unloaded for loaded, unloaded in p99.values())
    what = "p99 of accepted calls over unloaded, the worst of "
    what += ", ".join(f"{kind} {loaded:.0f} − {unloaded:.0f} ms" for kind, (loaded, unloaded) in p99.items())
    raw = [
        {
            kind: {"loaded": _milliseconds(busy.samples[kind]), "unloaded": _milliseconds(alone.samples[kind])}
            for kind in p99
        }
    ]
    table.add("surface-3b", what, added, "ms", "≤ 250", added <= 250, raw)
    rates = {
        "calls": (busy.calls_a_second, calm.calls_a_second),
        "batch lines": (busy.lines_a_second, calm.lines_a_second),
    }
    share = min(loaded / unloaded for loaded, unloaded in rates.values())
    what = "goodput ÷ saturation just below the limits, the lesser of "
    what += ", ".join(f"{kind} {loaded:.1f}/s ÷ {unloaded:.1f}/s" for kind, (loaded, unloaded) in rates.items())
    both = [{kind: {"loaded": loaded, "unloaded": unloaded} for kind, (loaded, unloaded) in rates.items()}]
    table.add("surface-3c", what, share, "", "≥ 0.95", share >= 0.95, both)
    worst = max(grown.values())
    what = f"memory growth under overload, the worst of {grown} MiB (launcher: with worker and engine)"
    table.add("surface-3d", what, worst, "MiB", "≤ 50 (flat)", worst <= 50, [grown])


def _milliseconds(samples: list[Sample]) -> list[float]:
    """Return the times of accepted calls as they were measured."""
    return [round(sample.total * 1000, 1) for sample in samples if sample.status == 200]


class BigBatch:
    """50,000 lines of one tenant, that wait or run as they are told to; a new batch where one is nearly through."""

    def __init__(self, stack, native, longest_ms: int) -> None:
        self._native, self._longest_ms, self._id = native, longest_ms, None
        self._database = psycopg.connect(stack.database_url("superuser"), autocommit=True)

    def end(self) -> None:
        """Give it up."""
        self._native.change_job(self._id, "cancel")
        self._database.close()

    def run(self) -> None:
        """Let its lines run; return once some of them are done."""
        if self._id is None or self._left() < 0.6:
            self._submit()
        else:
            self._native.change_job(self._id, "resume")
        before = self._done()
        wait_until(lambda: self._done() > before, 60, "lines of the large batch are done")

    def pause(self) -> None:
        """Stop it; return once nothing of it runs. Lines must have been left, or calls were not beside it."""
        assert self._left() > 0.1, "the batch was over too soon to say anything"
        self._native.change_job(self._id, "pause")
        wait_until(lambda: self._count("slice WHERE state = 'running'") == 0, 60, "the large batch rests")

    def _submit(self) -> None:
        if self._id is not None:
            self._native.change_job(self._id, "cancel")
        dice = random.Random(0)
        lines = [
            {
                "model": "echo",
                "messages": [{"role": "user", "content": f"{i}"}],
                "delay_ms": dice.randint(0, self._longest_ms),
            }
            for i in range(50_000)
        ]
        self._id = self._native.submit(lines, "/v1/chat/completions")["id"]
        wait_until(lambda: self._native.job(self._id)["progress"]["total"], 60, "the large batch is planned")

    def _left(self) -> float:
        progress = self._native.job(self._id)["progress"]
        return 1 - progress["done"] / progress["total"]

    def _done(self) -> int:
        return self._native.job(self._id)["progress"]["done"]

    def _count(self, rows: str) -> int:
        return self._database.execute(f"SELECT count(*) FROM {rows}").fetchone()[0]


def bench_fairness(table: Table, share: float = 1.0) -> None:
    """Single online calls of one tenant: alone, and while another has 50,000 lines queued; in turn."""
    # A round of the second takes about as long as a slice there, so that no part of a slice is seen more than another.
    rows = (
        ("surface-4a", 0, 10, 40, 0.01, "as fast as this machine goes"),
        ("surface-4b", HELD_MS, 5, 160, 0.01, "served at 250 lines/s, as a device would"),
        ("surface-4c", 0, 4, 15, 1.0, "as fast as this machine goes, a call a second"),
    )
    with running_stack("fairness") as stack, native_for(stack) as native:
        admin = key_of(stack)
        with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {admin}"}) as http:
            http.post("/v1/tenants", json={"id": "second"}).raise_for_status()
            key = http.post("/v1/keys", json={"tenant": "second"}).json()["key"]
        asyncio.run(_one_by_one(stack.port, key, 50))
        for identifier, longest_ms, rounds, calls, gap, pace in rows:
            big, samples = BigBatch(stack, native, longest_ms), []
            for _ in range(max(1, round(rounds * share))):
                idle = asyncio.run(_one_by_one(stack.port, key, calls, gap))
                big.run()
                beside = asyncio.run(_one_by_one(stack.port, key, calls, gap))
                big.pause()
                samples.append({"idle": idle, "beside": beside})
            big.end()
            quiet = percentile([ms for sample in samples for ms in sample["idle"]], 0.95)
            loud = percentile([ms for sample in samples for ms in sample["beside"]], 0.95)
            what = f"p95 of single calls beside 50,000 queued lines, {pace}: {loud:.1f} ms ÷ idle {quiet:.1f} ms"
            table.add(identifier, what, loud / quiet, "×", "≤ 2", loud <= 2 * quiet, samples)


async def _one_by_one(port, key, calls, gap_seconds=0.01) -> list[float]:
    """Return how long each of some calls took, in ms."""
    connection, times = Connection(port, key), []
    for _ in range(calls):
        sample = await connection.post("/v1/chat/completions", chat_body())
        assert sample.status == 200
        times.append(round(sample.total * 1000, 2))
        await asyncio.sleep(gap_seconds)
    connection.close()
    return times


def bench_compose(table: Table) -> None:
    """Read from a run of `make test-compose`, which this starts; without a Docker engine the row does not hold."""
    what = "docker compose up -d to the first accepted job, images built"
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        table.add("surface-5", f"{what}: there is no Docker engine here", NOT_MEASURED, "s", "≤ 60", None)
        return
    command = [sys.executable, "-m", "pytest", "-s", "tests/compose", "-k", "within_a_minute", "--timeout=1800"]
    environment = os.environ | {"LAMPLIGHTER_COMPOSE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"accepted ([0-9.]+) s after", done.stdout)
    if found is None:
        print(done.stdout[-3000:])
        table.add("surface-5", f"{what}: none was accepted", NOT_MEASURED, "s", "≤ 60", False)
        return
    seconds = float(found[1])
    table.add("surface-5", what, seconds, "s", "≤ 60", seconds <= 60 and done.returncode == 0)


def bench_schema(table: Table) -> None:
    command = [sys.executable, "-m", "pytest", "-s", "tests/integration/test_openapi.py", "-k", "generated"]
    environment = os.environ | {"LAMPLIGHTER_SCHEMA_CASES": str(SCHEMA_CASES)}
    done = subprocess.run(
        [*command, "--timeout=3000"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    counts = {
        mode: int(count) for mode, count in re.findall(r"(positive|negative): (\d+) generated requests", done.stdout)
    }
    found = re.search(r"LAMPLIGHTER_SCHEMA_SEED=(\d+)", done.stdout)
    print(done.stdout[-3000:] if done.returncode else "", end="")
    what = f"generated requests (right and wrong ones: {counts}, seed {found[1] if found else '?'}), each with a documented"
    what += " answer and none with a 5xx"
    count = sum(counts.values())
    enough = count >= 10_000 and min(counts.get("positive", 0), counts.get("negative", 0)) > 0
    table.add("surface-6", what, count, "cases", "≥ 10,000, all of them", enough and done.returncode == 0, [counts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=["online", "ttft", "fairness", "overload", "schema", "compose", "board", "metrics"]
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="length of the overload")
    arguments = parser.parse_args()
    table = Table("surface")
    parts = {
        "online": lambda: bench_concurrency(table, 10),
        "ttft": lambda: bench_first_token(table, 60),
        "fairness": lambda: bench_fairness(table),
        "overload": lambda: bench_overload(table, arguments.seconds),
        "schema": lambda: bench_schema(table),
        "compose": lambda: bench_compose(table),
        "board": lambda: bench_board(table),
        "metrics": lambda: bench_metrics(table),
    }
    started = time.monotonic()
    for name in arguments.only:
        parts[name]()
        table.write()
    table.write()
    table.show()
    print(f"{time.monotonic() - started:.0f} s")
    raise SystemExit(0 if table.holds else 1)


if __name__ == "__main__":
    main()
