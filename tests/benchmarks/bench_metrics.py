"""What being watched costs: of a machine's time, of a request's, and of a batch's throughput."""

import asyncio
import os
import statistics
import threading
import time

import httpx
import psutil
import psycopg

from services.gateway.metrics import MeasureRequests, Metrics
from tests.benchmarks.bench_spine import run_batch, running_stack, sdk_for
from tests.benchmarks.table import Table
from tests.support.batches import CHAT, chat_lines, jsonl

LINES = 40_000
SCRAPE_SECONDS, USUAL_SECONDS = 1.0, 15.0
"""What is kept of Postgres is read anew each second at most; services/prometheus/prometheus.yml reads every 15 s."""
IDLE_SECONDS = 20
CALLS = 400
TRIVIAL_REQUESTS = 20_000


class Scraper(threading.Thread):
    """Reads `/metrics` each second until it is told to stop."""

    def __init__(self, url: str, key: str) -> None:
        super().__init__(daemon=True)
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"})
        self._ended = threading.Event()
        self.seconds: list[float] = []

    def run(self) -> None:
        while not self._ended.is_set():
            started = time.monotonic()
            self._http.get("/metrics").raise_for_status()
            self.seconds.append(time.monotonic() - started)
            self._ended.wait(max(0.0, SCRAPE_SECONDS - self.seconds[-1]))

    def end(self) -> None:
        self._ended.set()
        self.join()
        self._http.close()


def bench_metrics(table: Table, rounds: int = 4) -> None:
    """By the CPU's time, which says more than rates do: equal runs of a batch differ by a tenth here."""
    with running_stack("metrics") as stack, sdk_for(stack) as sdk:
        key = (stack.directory / "admin.key").read_text().strip()
        run_batch(sdk, jsonl(chat_lines(LINES)), CHAT)  # jobs, results and attempts to be counted
        _bench_reading(table, stack, key, rounds)
        _bench_counting(table, stack, key)
        _bench_throughput(table, stack, sdk, key, rounds)


def _bench_reading(table: Table, stack, key: str, rounds: int) -> None:
    """CPU time of everything that an answer of `/metrics` takes, over that of the same time without one."""
    taken = []
    for _ in range(rounds):
        quiet = _busy(lambda: time.sleep(IDLE_SECONDS))
        scraper = Scraper(stack.url, key)
        watched = _busy(lambda s=scraper: (s.start(), time.sleep(IDLE_SECONDS), s.end()))
        taken.append((watched - quiet) / len(scraper.seconds))
    share = statistics.median(taken) / (USUAL_SECONDS * os.cpu_count()) * 100
    what = f"of the machine's {os.cpu_count()} cores, `/metrics` read every {USUAL_SECONDS:.0f} s"
    what += f" ({statistics.median(taken) * 1000:.0f} ms of CPU an answer, gateway and Postgres)"
    table.add("surface-8", what, share, "%", "≤ 1", share <= 1, taken)


def _bench_counting(table: Table, stack, key: str) -> None:
    """What counting a request takes, over all that the gateway does for an online call."""

    async def app(_scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def time_of(measured) -> float:
        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(_message):
            pass

        scope = {"type": "http", "method": "GET", "path": "/v1/models"}
        began = time.process_time()
        for _ in range(TRIVIAL_REQUESTS):
            await measured(dict(scope), receive, send)
        return (time.process_time() - began) / TRIVIAL_REQUESTS

    counted = MeasureRequests(app, Metrics(parts=None))
    pairs = [(asyncio.run(time_of(app)), asyncio.run(time_of(counted))) for _ in range(5)]
    counting = statistics.median(after - before for before, after in pairs)
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}]}
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key}"}) as http:

        def call() -> None:
            for _ in range(CALLS):
                http.post("/v1/chat/completions", json=body).raise_for_status()

        call()
        of_a_call = _busy(call, only="services.gateway") / CALLS
    share = counting / of_a_call * 100
    what = f"of what the gateway does for an online call is counting it ({counting * 1e6:.0f} of {of_a_call * 1e6:.0f} µs of CPU)"
    table.add("surface-8a", what, share, "%", "≤ 1", share <= 1, pairs)


def _bench_throughput(table: Table, stack, sdk, key: str, rounds: int) -> None:
    """Batches in turn, one read at each second and one not: within what equal runs differ by."""
    content = jsonl(chat_lines(LINES))
    rates: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * rounds):
        is_watched = number % 2 == 1
        scraper = Scraper(stack.url, key) if is_watched else None
        if scraper is not None:
            scraper.start()
        batch, _ = run_batch(sdk, content, CHAT)
        rates[is_watched].append(LINES / _seconds(stack, batch.id))
        if scraper is not None:
            scraper.end()
    ratio = statistics.median(rates[True]) / statistics.median(rates[False])
    spread = max(rates[False]) / min(rates[False])
    what = f"rate of a batch with `/metrics` read each second ÷ without (medians of {rounds}; equal runs differ {spread:.2f}-fold)"
    table.add("surface-8b", what, ratio, "×", "said", True, [rates[True], rates[False]])


def _busy(work, only: str = "") -> float:
    """Return the CPU seconds that the stack's processes took while `work` was done."""
    before = _cpu_seconds(only)
    work()
    after = _cpu_seconds(only)
    return sum(seconds - before.get(process, 0.0) for process, seconds in after.items())


def _cpu_seconds(only: str) -> dict[int, float]:
    """Return what each process below this one has taken; `only` those whose command line names it."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if only in " ".join(process.cmdline()):
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return found


def _seconds(stack, batch_id: str) -> float:
    """Return how long a batch took by Postgres' clock: who asks for its end sees it a while later."""
    statement = "SELECT extract(epoch FROM ended_at - created_at) FROM job WHERE job_id = %s"
    with psycopg.connect(stack.database_url("superuser")) as connection:
        return float(connection.execute(statement, (batch_id.removeprefix("batch_"),)).fetchone()[0])
