"""Row surface-7 of `make bench-surface`: the board's first page, with 10,000 jobs of which the newest wait."""

import statistics
import time
from datetime import UTC, datetime, timedelta

import httpx
import openai
import psycopg

from tests.benchmarks.bench_spine import running_stack
from tests.benchmarks.table import Table
from tests.support.batches import chat_lines, jsonl
from tests.support.chromium import CHROMIUM, launch

JOBS, WAITING, LOOKS = 10_000, 60, 40

ENDED = """
    INSERT INTO job (tenant_id, job_id, kind, state, created_on, created_at, ended_at, model, endpoint, spec, total, completed)
    SELECT 'default', gen_random_uuid(), 'batch', 'succeeded', current_date, now() - i * interval '1 minute', now(), 'echo',
        '/v1/chat/completions', '{"completion_window": "24h"}', 100, 100 FROM generate_series(1, %s) i
"""


def bench_board(table: Table) -> None:
    with running_stack("board") as stack:
        key = (stack.directory / "admin.key").read_text().strip()
        with psycopg.connect(stack.database_url("superuser"), autocommit=True) as connection:
            connection.execute(ENDED, (JOBS - WAITING,))
            connection.execute("VACUUM ANALYZE job")
        _accept_waiting(stack.url, key)
        with httpx.Client(base_url=stack.url) as browser:
            assert browser.post("/login", data={"key": key}).status_code == 303
            times = [_seconds(browser) for _ in range(LOOKS)]
        what = f"first page of the board with {JOBS:,} jobs, of which {WAITING} wait, median of {LOOKS}: HTML, by the server"
        middle = statistics.median(times) * 1000
        table.add("surface-7a", what, middle, "ms", "≤ 300", middle <= 300, times)
        if CHROMIUM is None:
            table.add(
                "surface-7b", "the same in Chromium, until it is loaded: not installed here", -1.0, "ms", "≤ 300", None
            )
            return
        shown = _in_chromium(stack.url, key)
        middle = statistics.median(shown)
        table.add("surface-7b", "the same in Chromium, until it is loaded", middle, "ms", "≤ 300", middle <= 300, shown)


def _accept_waiting(url: str, key: str) -> None:
    """Hand in batches whose window is closed: each row says why it waits and when it is expected to end."""
    opens = datetime.now(UTC) + timedelta(hours=3)
    window = {"start": f"{opens:%H:%M}", "end": f"{opens + timedelta(hours=8):%H:%M}", "tz": "UTC"}
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        uploaded = client.files.create(file=("input.jsonl", jsonl(chat_lines(100))), purpose="batch")
        asked = {"input_file_id": uploaded.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        for _ in range(WAITING):
            client.batches.create(**asked, extra_body={"window": window})
    time.sleep(6)  # until they are planned and a forecast has seen them


def _seconds(browser: httpx.Client) -> float:
    started = time.perf_counter()
    answer = browser.get("/")
    assert answer.status_code == 200 and "Its window is closed" in answer.text, answer.text[:500]
    return time.perf_counter() - started


def _in_chromium(url: str, key: str) -> list[float]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        page = launch(playwright).new_page()
        page.goto(f"{url}/")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Log in").click()
        loaded = "performance.getEntriesByType('navigation')[0].loadEventEnd"
        times = []
        for _ in range(10):
            page.goto(f"{url}/")
            page.wait_for_function(f"{loaded} > 0")
            times.append(page.evaluate(loaded))
        return times
