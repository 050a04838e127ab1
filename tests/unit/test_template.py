"""Children that a template forks, real processes: they live, end and are told of as those that are started alone."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from services.worker import forks
from services.worker.children import ChildSupervisor
from services.worker.forks import Template, Unforkable
from tests.support.servers import wait_until

CHILD = "tests.support.stepping_child"


class Stepper(ChildSupervisor):
    """A child that says how far it is, whatever it was started by."""

    def __init__(self, template):
        super().__init__(
            template.module, template.arguments, hang_seconds=3, environment=template.environment, template=template
        )
        self.ended = []

    def start(self):
        with self._lock:
            return self._living()

    def _end(self, life):
        self.ended.append((life.process.pid, life.process.wait()))


@pytest.fixture
def template():
    made = Template(CHILD, [], {"LAMPLIGHTER_TEST_VALUE": "from the worker"})
    yield made
    made.close()


@pytest.fixture
def steppers(template):
    started = [Stepper(template), Stepper(template)]
    yield started
    for stepper in started:
        stepper.kill()  # it knows no other way to end
        stepper.close()


def moves(stepper):
    wait_until(lambda: stepper.status and stepper.status.progress > 2, 10)


def test_children_of_one_template_live_and_die_apart(template, steppers):
    first, second = (stepper.start() for stepper in steppers)
    for stepper in steppers:
        moves(stepper)
    process = psutil.Process(first.process.pid)
    assert process.ppid() == template.pid == psutil.Process(second.process.pid).ppid()
    assert process.name() == "stepper" and psutil.Process(template.pid).name() == "template"
    assert process.environ()["LAMPLIGHTER_TEST_VALUE"] == "from the worker"
    first.process.kill()
    wait_until(lambda: steppers[0].ended == [(first.process.pid, -signal.SIGKILL)], 5)
    assert not psutil.pid_exists(first.process.pid), "a zombie"
    moves(steppers[1])
    assert steppers[1].ended == [] and steppers[0].start().process.pid != first.process.pid


def test_the_second_child_begins_at_once(template, steppers):
    steppers[0].start()
    began = time.monotonic()
    steppers[1].start()
    assert psutil.Process(template.pid).children()[-1].create_time() and time.monotonic() - began < 1


def test_a_stopped_child_is_killed_and_a_stuck_one_replaced(steppers):
    stepper = steppers[0]
    stopped = stepper.start().process.pid
    moves(stepper)
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: stepper.ended == [(stopped, -signal.SIGKILL)], 20)
    stuck = stepper.start().process.pid
    moves(stepper)
    os.kill(stuck, signal.SIGUSR1)
    wait_until(lambda: [pid for pid, _ in stepper.ended] == [stopped, stuck], 20)


def test_children_outlive_a_killed_template_and_the_next_has_a_new_one(template, steppers):
    orphan = steppers[0].start().process
    moves(steppers[0])
    first = template.pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(first) or psutil.Process(first).status() == psutil.STATUS_ZOMBIE, 5)
    steppers[1].start()
    assert template.pid != first
    moves(steppers[1])
    assert steppers[0].pid == orphan.pid, "it was lost with its template"
    orphan.kill()
    wait_until(lambda: steppers[0].ended == [(orphan.pid, None)], 5)


def test_a_template_that_answers_no_more_is_replaced(template, steppers, monkeypatch):
    steppers[0].start()
    first = template.pid
    monkeypatch.setattr(forks, "FORK_SECONDS", 0.3)
    os.kill(first, signal.SIGSTOP)
    steppers[1].start()
    moves(steppers[1])
    assert template.pid != first and not psutil.pid_exists(first)


def test_a_template_ends_with_its_worker_and_children_with_theirs(template, steppers):
    life = steppers[0].start()
    running = psutil.Process(template.pid)
    template._running[1].close()
    running.wait(5)
    assert steppers[0].pid == life.process.pid
    life.channel.close()
    assert life.process.wait(5) is None


def test_the_end_of_a_child_is_told_whose_template_answers_no_more(template, steppers):
    life = steppers[0].start()
    moves(steppers[0])
    os.kill(template.pid, signal.SIGSTOP)
    life.process.kill()
    wait_until(lambda: steppers[0].ended == [(life.process.pid, None)], 3)


def test_a_worker_that_ends_waits_for_no_template_that_loads():
    template = Template(CHILD, [], {"LAMPLIGHTER_TEST_UNFIT": "disk"})
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(template.start)
        wait_until(lambda: template.pid, 10)
        loading = psutil.Process(template.pid)
        template.close()
        with pytest.raises(Unforkable):
            asked.result(timeout=5)
    assert not loading.is_running() and template.pid is None


def test_a_refusal_is_remembered_and_in_the_end_forgotten(template):
    """What failed may have been memory that others held; what fails is not tried again before every job."""
    template.environment["LAMPLIGHTER_TEST_UNFIT"] = "library"
    for _ in range(2):
        with pytest.raises(Unforkable, match="ended while it loaded"):
            template.start()
    began = time.monotonic()
    with pytest.raises(Unforkable):
        template.start()
    assert time.monotonic() - began < 0.05
    del template.environment["LAMPLIGHTER_TEST_UNFIT"]
    template.refuse("a moment", 0.05)
    time.sleep(0.1)
    process, channel = template.start()
    channel.close()
    assert process.wait(5) == 0


@pytest.mark.parametrize("fault", ["threads", "rehearsal"])
def test_where_nothing_can_be_forked_children_are_started_alone(fault):
    template = Template(CHILD, [], {"LAMPLIGHTER_TEST_UNFIT": fault})
    stepper = Stepper(template)
    try:
        alone = psutil.Process(stepper.start().process.pid)
        moves(stepper)
        assert alone.ppid() == os.getpid() and template.pid is None
        with pytest.raises(Unforkable, match="1 threads" if fault == "threads" else "status 1"):
            template.start()
    finally:
        stepper.kill()
        stepper.close()


def test_a_child_that_fails_to_begin_ends_with_its_status(template):
    """Its module's `main` raises: the fork must not go on as a second template."""
    template.arguments = ["--no-such-option"]
    process, channel = template.start()
    assert process.wait(5) == 1
    channel.close()
    again, channel = template.start()
    assert again.pid != process.pid and again.wait(5) == 1
    channel.close()
