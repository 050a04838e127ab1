"""`make bench-surface`: the rows of the surface, on the embedded default."""

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from tests.benchmarks.bench_spine import MIB, Memory, native_for, running_stack
from tests.benchmarks.load import chat_body, closed_loop, open_loop, percentile
from tests.benchmarks.table import Table
from tests.support.models import make_tiny_llama
from tests.support.servers import ROOT, wait_until

SCHEMA_CASES = 190
LIMIT, DELAY_MS = 32, 1000
HELD_MS = 4000
"""How long a queued line is held: 1,024 at once make 250 lines/s, more than a device serves. At 0 the two cores of a
small machine are the limit, and the ratio is theirs: about 3 (docs/log.md)."""


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
    from tests.benchmarks.load import Connection

    connection = Connection(port, key)
    sample = await connection.post("/v1/chat/completions", body, until=b'"content":')
    connection.close()
    assert sample.status == 200, sample
    return sample


def bench_overload(table: Table, seconds: float) -> None:
    """Ten times what the worker takes: its limit of calls, each held for DELAY_MS, with batches of 1,000 beside."""
    limits = {
        "LAMPLIGHTER_ONLINE_LIMIT": str(LIMIT),
        "LAMPLIGHTER_ONLINE_LIMIT_PER_TENANT": str(LIMIT),
        "LAMPLIGHTER_MAX_QUEUED_LINES_PER_TENANT": "5000",
    }
    body = chat_body(delay_ms=DELAY_MS)
    with running_stack("overload", **limits) as stack:
        key = key_of(stack)
        calm = asyncio.run(closed_loop(stack.port, key, LIMIT, max(5.0, seconds / 6), body))
        most = len(calm) / max(5.0, seconds / 6)
        calm_p99 = percentile([sample.total for sample in calm], 0.99)
        with native_for(stack) as native:
            lines = [
                {"model": "echo", "messages": [{"role": "user", "content": f"{i}"}], "delay_ms": 100}
                for i in range(1000)
            ]
            file_id = native.submit(lines, "/v1/chat/completions")["input_file_id"]
        pid = stack.processes["gateway"].running.pid
        with Memory(pid) as memory:
            online, batches = asyncio.run(
                _overload(stack.port, key, 10 * LIMIT / (DELAY_MS / 1000), seconds, body, file_id)
            )
            grown = (memory.highest - memory.before) / MIB
    statuses = {sample.status for sample in [*online, *batches]}
    accepted = [sample for sample in online if sample.status == 200]
    p99 = percentile([sample.total for sample in accepted], 0.99)
    goodput = len(accepted) / seconds
    what = f"10× overload for {seconds:.0f} s, {len(online)} calls and {len(batches)} batches of 1,000: statuses {statuses}"
    table.add("surface-3a", what, len(statuses - {200, 429}), "others", "= 0", statuses <= {200, 429})
    what = f"p99 of accepted calls {p99 * 1000:.0f} ms − unloaded {calm_p99 * 1000:.0f} ms"
    table.add("surface-3b", what, (p99 - calm_p99) * 1000, "ms", "≤ 250", p99 - calm_p99 <= 0.250)
    what = f"goodput {goodput:.1f}/s ÷ unloaded maximum {most:.1f}/s"
    table.add("surface-3c", what, goodput / most, "", "≥ 0.95", goodput >= 0.95 * most)
    table.add("surface-3d", "gateway memory growth under overload", grown, "MiB", "≤ 50 (flat)", grown <= 50)


async def _overload(port, key, rate, seconds, body, file_id):
    batch = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    import json

    return await asyncio.gather(
        open_loop(port, key, rate, seconds, "/v1/chat/completions", body),
        open_loop(port, key, 2, seconds, "/v1/batches", json.dumps(batch).encode()),
    )


def bench_fairness(table: Table, calls: int) -> None:
    """Single online calls of one tenant: alone, and while another has 50,000 lines queued; in turn."""
    with running_stack("fairness") as stack:
        admin = key_of(stack)
        with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {admin}"}) as http:
            http.post("/v1/tenants", json={"id": "second"}).raise_for_status()
            key = http.post("/v1/keys", json={"tenant": "second"}).json()["key"]
        asyncio.run(_one_by_one(stack.port, key, 50))
        idle = asyncio.run(_one_by_one(stack.port, key, calls))
        lines = [
            {"model": "echo", "messages": [{"role": "user", "content": f"{i}"}], "delay_ms": HELD_MS}
            for i in range(50_000)
        ]
        with native_for(stack) as native:
            batch = native.submit(lines, "/v1/chat/completions")
            wait_until(lambda: native.job(batch["id"])["progress"]["done"] > 0, 60)
            beside = asyncio.run(_one_by_one(stack.port, key, calls))
            progress = native.job(batch["id"])["progress"]
        assert progress["done"] < progress["total"], "the batch was over too soon to say anything"
    quiet, loud = percentile(idle, 0.95), percentile(beside, 0.95)
    what = f"p95 of single calls beside 50,000 queued lines (250/s served): {loud * 1000:.1f} ms ÷ idle {quiet * 1000:.1f} ms"
    table.add("surface-4", what, loud / quiet, "×", "≤ 2", loud <= 2 * quiet, [quiet * 1000, loud * 1000])


async def _one_by_one(port, key, calls):
    from tests.benchmarks.load import Connection

    connection, times = Connection(port, key), []
    for _ in range(calls):
        sample = await connection.post("/v1/chat/completions", chat_body())
        assert sample.status == 200
        times.append(sample.total)
        await asyncio.sleep(0.01)
    connection.close()
    return times


def bench_compose(table: Table) -> None:
    """Read from a run of `make test-compose`, which this starts where there is a Docker engine."""
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode != 0:
        print("  surface-5: there is no Docker engine here; not measured")
        return
    command = [sys.executable, "-m", "pytest", "-s", "tests/compose", "-k", "within_a_minute", "--timeout=1800"]
    environment = os.environ | {"LAMPLIGHTER_COMPOSE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"ready ([0-9.]+) s after", done.stdout)
    seconds = float(found[1]) if found else float("inf")
    table.add("surface-5", "docker compose up -d to ready, images built", seconds, "s", "≤ 60", seconds <= 60)


def bench_schema(table: Table) -> None:
    command = [sys.executable, "-m", "pytest", "-s", "tests/integration/test_openapi.py", "--timeout=1800"]
    environment = os.environ | {"LAMPLIGHTER_SCHEMA_CASES": str(SCHEMA_CASES)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"(\d+) generated requests answered", done.stdout)
    count = int(found[1]) if found else 0
    print(done.stdout[-3000:] if done.returncode else "", end="")
    what = "generated requests, each with a documented answer and none with a 5xx"
    table.add("surface-6", what, count, "cases", "≥ 5,000, all of them", count >= 5000 and done.returncode == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["online", "ttft", "fairness", "overload", "schema", "compose"])
    parser.add_argument("--seconds", type=float, default=120.0, help="length of the overload")
    arguments = parser.parse_args()
    table = Table("surface", "make bench-surface")
    parts = {
        "online": lambda: bench_concurrency(table, 10),
        "ttft": lambda: bench_first_token(table, 60),
        "fairness": lambda: bench_fairness(table, 400),
        "overload": lambda: bench_overload(table, arguments.seconds),
        "schema": lambda: bench_schema(table),
        "compose": lambda: bench_compose(table),
    }
    started = time.monotonic()
    for name in arguments.only:
        parts[name]()
    table.write()
    print(f"{time.monotonic() - started:.0f} s")
    raise SystemExit(0 if table.holds else 1)


if __name__ == "__main__":
    main()
