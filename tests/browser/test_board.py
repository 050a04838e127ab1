"""The job board as people use it: a real Chromium, the whole stack behind it, axe over every page."""

import json
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from tests.support.batches import chat_line, chat_lines, submit, wait_for
from tests.support.chromium import CHROMIUM, launch
from tests.support.servers import wait_until
from tests.support.task_rows import DIGIT_TASKS, digit_rows, with_files

SHOTS = os.environ.get("LAMPLIGHTER_TEST_SHOTS")
PAGES = {
    "jobs": "/",
    "plan": "/board/plan",
    "workers": "/board/workers",
    "models": "/board/models",
    "usage": "/board/usage",
}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, stack):
    """Return a function that opens a window of its own, logged in with a key."""
    contexts = []

    def enter(key, width=1200, **options):
        context = chromium.new_context(viewport={"width": width, "height": 900}, base_url=stack.url, **options)
        contexts.append(context)
        page = context.new_page()
        page.wrong = []
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("console", lambda said: page.wrong.append(said.text) if said.type == "error" else None)
        page.goto("/")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Jobs")
        return page

    yield enter
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def batch(sdk):
    """A batch of which one line fails."""
    lines = [*chat_lines(5), chat_line("no-such-field", temperature=9)]
    return wait_for(sdk, submit(sdk, lines, metadata={"name": "<b>nightly</b>"}).id)


@pytest.fixture(scope="module")
def training(native):
    rows, validation = digit_rows()
    ids = [
        native.upload("rows.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in part), "fine-tune")["id"]
        for part in (rows, validation[:200])
    ]
    asked = {"max_steps": 30, "batch_size": 32, "learning_rate": 3e-2, "eval_steps": 10}
    tasks = with_files(DIGIT_TASKS, *ids)
    job = native.training.create(model="vector:64:32", tasks=tasks, seed=3, hyperparameters=asked)
    return wait_until(lambda: (now := native.training.retrieve(job["id"]))["status"] == "succeeded" and now, 120)


def shoot(page, name):
    """Keep a picture for the docs, where one is asked for."""
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


def serious(page):
    found = Axe().run(page).response["violations"]
    return [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")]


def test_every_page_is_whole_for_everybody(visit, admin_key, batch, training):
    """Every page renders, follows its own policy, and axe finds nothing serious, by day, by night and on a phone."""
    page = visit(admin_key)
    addresses = PAGES | {"job": f"/board/jobs/{batch.id}", "training": f"/board/jobs/{training['id']}"}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for name, address in addresses.items():
            assert page.goto(address).status == 200
            expect(page.get_by_role("heading", level=1)).to_be_visible()
            assert serious(page) == [], (name, scheme)
            assert all(page.locator("img").evaluate_all("all => all.map(one => one.naturalWidth > 0)")), name
            if scheme == "light":
                shoot(page, name)
    assert page.wrong == []
    page.set_viewport_size({"width": 360, "height": 740})
    for address in addresses.values():
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, address


def test_a_batch_is_shown_with_what_failed_and_why(visit, admin_key, batch):
    page = visit(admin_key)
    page.goto(f"/board/jobs/{batch.id}")
    # A name is text, whatever stands in it.
    expect(page.get_by_role("heading", level=1)).to_have_text("Batch: <b>nightly</b>")
    row = page.get_by_role("row").filter(has_text="no-such-field")
    expect(row).to_contain_text("temperature")
    expect(row.get_by_role("cell").first).to_have_text("6")
    expect(page.get_by_role("region", name="Attempts")).to_contain_text("cpu:0")
    with page.expect_download() as started:
        page.get_by_role("link", name="Failed lines").click()
    lines = Path(started.value.path()).read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == ["no-such-field"]


def test_a_training_shows_its_curves_and_tasks(visit, admin_key, training):
    page = visit(admin_key)
    page.goto(f"/board/jobs/{training['id']}")
    chart = page.get_by_role("img", name="The loss of this job")
    drawn = page.request.get(chart.get_attribute("src"))
    assert drawn.headers["content-type"] == "image/svg+xml" and "<script" not in drawn.text()
    assert all(f">{task['name']}</text>" in drawn.text() for task in training["tasks"])
    tasks = page.get_by_role("region", name="Tasks")
    for task in training["tasks"]:
        expect(
            tasks.get_by_role("row").filter(has=page.get_by_role("rowheader", name=task["name"], exact=True))
        ).to_be_visible()
    with page.expect_download() as started:
        page.get_by_role("link", name="Result file").first.click()
    assert Path(started.value.path()).stat().st_size > 0


def test_what_happens_elsewhere_shows_by_itself_and_a_job_is_cancelled_from_here(visit, admin_key, sdk):
    page = visit(admin_key)
    expect(page.get_by_role("status")).to_have_text("Live")
    made = submit(sdk, chat_lines(50_000), metadata={"name": "seen at once"})
    row = page.get_by_role("row").filter(has_text=made.id[18:])
    expect(row).to_be_visible(timeout=10_000)
    link = row.get_by_role("link")
    link.focus()
    expect(row).to_contain_text("of 50", timeout=20_000)
    assert link.evaluate("one => one === document.activeElement"), "the focus went with the old rows"
    page.keyboard.press("Enter")
    shown = page.get_by_role("button", name="Cancel")
    shown.wait_for()
    page.once("dialog", lambda question: question.dismiss())
    shown.click()
    assert sdk.batches.retrieve(made.id).status not in ("cancelling", "cancelled")
    page.once("dialog", lambda question: question.accept())
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".now .state")).to_have_text("cancelled", timeout=30_000)
    assert sdk.batches.retrieve(made.id).status == "cancelled"
    assert page.wrong == []


def test_a_job_is_paused_and_resumed_and_its_failed_line_is_tried_again_from_here(visit, admin_key, sdk):
    made = submit(sdk, [*chat_lines(300, delay_ms=6000), chat_line("bad", temperature=9)])
    wait_for(sdk, made.id, "in_progress")
    page = visit(admin_key)
    page.on("dialog", lambda question: question.accept())
    page.goto(f"/board/jobs/{made.id}")
    state = page.locator(".now .state")
    page.get_by_role("button", name="Pause").click()
    expect(state).to_have_text("paused", timeout=30_000)
    page.get_by_role("button", name="Resume").click()
    expect(state).to_have_text("succeeded", timeout=90_000)
    page.get_by_role("button", name=re.compile("Retry")).click()
    page.wait_for_url(lambda url: made.id not in url)
    expect(state).to_have_text("succeeded", timeout=30_000)
    again = sdk.batches.retrieve(page.url.rpartition("/")[2])
    assert (again.request_counts.completed, again.request_counts.failed) == (300, 1)  # what was done is taken over
    assert page.wrong == []


def test_the_plan_shows_when_a_job_is_expected_to_end(visit, admin_key, sdk):
    opens, by = (datetime.now(UTC) + timedelta(hours=hours) for hours in (3, 6))
    window = {"start": f"{opens:%H:%M}", "end": f"{opens + timedelta(hours=1):%H:%M}", "tz": "UTC"}
    made = submit(sdk, chat_lines(3000), extra_body={"window": window, "deadline": f"{by:%Y-%m-%dT%H:%M:%SZ}"})
    page = visit(admin_key)
    page.get_by_role("link", name="Tonight").click()
    row = page.get_by_role("row").filter(has_text=made.id[18:])
    expect(row).to_contain_text(re.compile("in time|at risk"), timeout=20_000)
    expect(page.locator(".now")).to_contain_text("planned; none is expected late")
    bar = page.locator("svg rect.block").filter(has=page.locator("title", has_text=made.id))
    expect(bar).not_to_have_count(0)
    assert serious(page) == []
    shoot(page, "plan")
    row.get_by_role("link").click()
    expect(page.locator("dl.facts")).to_contain_text(f"{window['start']} to {window['end']}, UTC")
    expect(page.get_by_text("Its window is closed.")).to_be_visible()
    sdk.batches.cancel(made.id)
    page.get_by_role("link", name="Tonight").click()
    expect(row).to_have_count(0, timeout=20_000)


def test_a_tenant_sees_its_own_only(visit, native, admin_key, batch):
    native.request("POST", "/v1/tenants", json={"id": "board-guest", "name": "Guest"})
    key = native.request("POST", "/v1/keys", json={"tenant": "board-guest", "scopes": ["read"]})["key"]
    page = visit(key)
    expect(page.get_by_text("No jobs here.")).to_be_visible()
    expect(page.get_by_label("Tenant")).to_have_count(0)
    assert page.goto(f"/board/jobs/{batch.id}").status == 404
    assert page.request.get(f"/board/live/jobs/{batch.id}").status == 404
    assert page.request.get(f"/board/jobs/{batch.id}/lines").status == 404
    page.goto("/board/usage")
    expect(page.get_by_text("Nothing was used in these days.")).to_be_visible()


def test_the_keyboard_is_enough(visit, admin_key, batch):
    page = visit(admin_key)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id"))
    assert "Show" in reached and any(text.startswith("batch_") for text in reached)


def test_it_works_without_scripts(visit, admin_key, batch):
    page = visit(admin_key, java_script_enabled=False)
    page.get_by_role("link", name=batch.id[:18]).first.click()
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
    assert page.goto("/board/workers").url.endswith("/login?next=/board/workers")
