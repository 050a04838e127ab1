"""What being watched costs: batches while `/metrics` is read each second, and in between batches while nobody looks."""

import statistics
import threading
import time

import httpx
import psycopg

from tests.benchmarks.bench_spine import run_batch, running_stack, sdk_for
from tests.benchmarks.table import Table
from tests.support.batches import CHAT, chat_lines, jsonl

LINES = 40_000
SCRAPE_SECONDS, USUAL_SECONDS = 1.0, 15.0
"""Read fifteen times as often as services/prometheus/prometheus.yml has it: what once in 15 s costs is below what can be
measured here, where equal runs differ by a tenth."""


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


def bench_metrics(table: Table, rounds: int = 8) -> None:
    """In turn, watched and not."""
    content = jsonl(chat_lines(LINES))
    rates: dict[bool, list[float]] = {True: [], False: []}
    answered: list[float] = []
    with running_stack("metrics") as stack, sdk_for(stack) as sdk:
        for number in range(2 * rounds + 1):
            is_watched = number % 2 == 1
            scraper = Scraper(stack.url, (stack.directory / "admin.key").read_text().strip()) if is_watched else None
            if scraper is not None:
                scraper.start()
            batch, _ = run_batch(sdk, content, CHAT)
            rate = LINES / _seconds(stack, batch.id)
            if scraper is not None:
                scraper.end()
                answered += scraper.seconds
            if number:  # the first one warms everything up
                rates[is_watched].append(rate)
    ratio = statistics.median(rates[True]) / statistics.median(rates[False])
    lost = (1 - ratio) * 100 * SCRAPE_SECONDS / USUAL_SECONDS
    what = f"lines/s lost while /metrics is read every {USUAL_SECONDS:.0f} s: a fifteenth of what is lost while it is read each second "
    what += (
        f"({ratio:.3f} of the rate, medians of {rounds}; an answer takes {statistics.median(answered) * 1000:.0f} ms)"
    )
    table.add("surface-8", what, lost, "%", "≤ 1", lost <= 1, [rates[True], rates[False]])


def _seconds(stack, batch_id: str) -> float:
    """Return how long a batch took by Postgres' clock: who asks for its end sees it a while later."""
    statement = "SELECT extract(epoch FROM ended_at - created_at) FROM job WHERE job_id = %s"
    with psycopg.connect(stack.database_url("superuser")) as connection:
        return float(connection.execute(statement, (batch_id.removeprefix("batch_"),)).fetchone()[0])
