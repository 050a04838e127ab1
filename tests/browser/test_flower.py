"""Flower as people see it: behind its password, with names that can be read, and nothing that changes anything."""

import os
import re
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from tests.support.batches import chat_lines, submit, wait_for
from tests.support.chromium import CHROMIUM, launch
from tests.support.servers import wait_until

SHOTS = os.environ.get("LAMPLIGHTER_TEST_SHOTS")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture
def page(stack):
    password = (stack.directory / "flower.password").read_text().strip()
    with sync_playwright() as playwright:
        browser = launch(playwright)
        credentials = {"username": "lamplighter", "password": password}
        context = browser.new_context(
            base_url=stack.flower_url, http_credentials=credentials, viewport={"width": 1400, "height": 600}
        )
        yield context.new_page()
        browser.close()


def shoot(page, name):
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


def test_workers_and_tasks_are_named_for_people(stack, sdk, page):
    """From a task one comes to its job's page on the board, and nothing of a prompt is shown."""
    wait_until(lambda: httpx.get(stack.flower_url).status_code == 401, 30, "Flower asks for its password")
    batch = wait_for(sdk, submit(sdk, chat_lines(3)).id)
    page.goto("/workers")
    row = page.locator("#workers-table tbody tr", has_text="worker-cpu-0@")
    expect(row).to_be_visible()
    shoot(page, "flower-workers")
    name = row.locator("a").first.inner_text()
    page.goto(f"/worker/{name}")
    expect(page.get_by_text("Shut Down", exact=False)).to_have_count(0)
    page.goto("/tasks")
    tasks = page.locator("#tasks-table tbody tr", has_text=batch.id.removeprefix("batch_"))
    expect(tasks.first).to_contain_text("generate[echo]")
    shoot(page, "flower-tasks")
    task = re.search(r"[0-9a-f]{32}-s\d+-d\d+", tasks.first.inner_html())[0]
    page.goto(f"/task/{task}")
    expect(page.locator("body")).to_contain_text(f"{stack.url}/board/tasks/{task}")
    assert "hello number" not in page.content()
