"""The supervisor against real child processes: answers, death, hanging, stopping, replacement."""

import os
import signal
import socket

import pytest

from services.worker.children import ChildSupervisor, EngineChild
from services.worker.protocol import ModelSpec, Request, SamplingParams
from shared.domain.errors import ChildLost
from tests.support.servers import wait_until

ECHO = ModelSpec("echo", "echo", "built-in")


@pytest.fixture
def child():
    supervisor = EngineChild(
        "services.worker.engine.process", ["--device", "cpu:0", "--cache-bytes", "1000000"], hang_seconds=3
    )
    yield supervisor
    supervisor.close()


def ask(content="one two three", *, delay_ms=0, max_tokens=None):
    return Request(
        0, "chat", messages=[{"role": "user", "content": content}], params=SamplingParams(max_tokens), delay_ms=delay_ms
    )


def collect_all(batch, count):
    answers = []
    wait_until(lambda: answers.extend(batch.collect(0.2)) or len(answers) >= count, 20)
    return answers


def test_answers_come_to_whom_asked(child):
    batches = [child.submit(ECHO, [ask(f"batch {i} line {j}") for j in range(50)]) for i in range(4)]
    for number, batch in enumerate(batches):
        texts = {answer.choices[0][0] for answer in collect_all(batch, 50)}
        assert texts == {f"batch {number} line {j}" for j in range(50)}


def test_echo_cuts_words_and_counts_tokens(child):
    (answer,) = collect_all(child.submit(ECHO, [ask("one two  three", max_tokens=2)]), 1)
    assert answer.choices == [("one two", "length")] and (answer.prompt_tokens, answer.completion_tokens) == (3, 2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_child_is_reported_and_replaced(child, number):
    batch = child.submit(ECHO, [ask(delay_ms=30_000)])
    wait_until(lambda: child.status is not None, 10)
    first = child.pid
    os.kill(first, number)
    with pytest.raises(ChildLost):
        wait_until(lambda: batch.collect(0.2), 20)
    assert collect_all(child.submit(ECHO, [ask()]), 1)
    assert child.pid != first and child.restarts == 1


def test_a_hung_child_that_reads_nothing_more_is_killed(child):
    """Its socket is full, and the ping that finds it so must not wait: nobody else would look at the clock."""
    collect_all(child.submit(ECHO, [ask()]), 1)
    os.kill(child.pid, signal.SIGSTOP)
    endpoint = child._life.channel._socket
    with pytest.raises(BlockingIOError):
        while True:
            endpoint.send(b"\0" * 14, socket.MSG_DONTWAIT)
    wait_until(lambda: child.restarts == 1, 20, "the child is given up")


def test_a_delayed_request_is_no_hang(child):
    assert collect_all(child.submit(ECHO, [ask(delay_ms=5000)]), 1)
    assert child.restarts == 0


def test_aborted_requests_are_forgotten(child):
    slow = child.submit(ECHO, [ask(delay_ms=60_000)])
    child.abort(slow)
    collect_all(child.submit(ECHO, [ask()]), 1)
    wait_until(lambda: child.status and child.status.in_flight == 0, 5)
    assert slow.collect(0.1) == []


class PongCounter(ChildSupervisor):
    """Another kind of child behind the same supervisor: it is given no requests and only says how far it is."""

    def __init__(self, hang_seconds):
        super().__init__("tests.support.stepping_child", [], hang_seconds=hang_seconds)
        self.ended = []

    def start(self):
        with self._lock:
            return self._living()

    def _receive(self, life, message):
        raise AssertionError("this child only pongs")

    def _end(self, life):
        self.ended.append(life.process.pid)


def test_one_supervisor_serves_every_kind_of_child():
    """A child that steps, as a trainer does: seen moving, told of its death, replaced, and killed when it stands still."""
    stepper = PongCounter(hang_seconds=3)
    first = stepper.start().process.pid
    wait_until(lambda: stepper.status and stepper.status.progress > 2, 10)
    assert stepper.status.in_flight == 1
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: stepper.ended == [first], 10)
    second = stepper.start().process.pid
    assert second != first and stepper.restarts == 1
    os.kill(second, signal.SIGUSR1)  # it goes on answering pings, but steps no more
    wait_until(lambda: stepper.ended == [first, second], 20)
    stepper.close()
