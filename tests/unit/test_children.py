"""The supervisor against real child processes: answers, death, hanging, stopping, replacement."""

import os
import signal

import pytest

from services.worker.children import ChildSupervisor
from services.worker.protocol import ModelSpec, Request, SamplingParams
from shared.domain.errors import ChildLost
from tests.support.servers import wait_until

ECHO = ModelSpec("echo", "echo", "built-in")


@pytest.fixture
def child():
    supervisor = ChildSupervisor(
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


def test_a_delayed_request_is_no_hang(child):
    assert collect_all(child.submit(ECHO, [ask(delay_ms=5000)]), 1)
    assert child.restarts == 0


def test_aborted_requests_are_forgotten(child):
    slow = child.submit(ECHO, [ask(delay_ms=60_000)])
    child.abort(slow)
    collect_all(child.submit(ECHO, [ask()]), 1)
    wait_until(lambda: child.status and child.status.in_flight == 0, 5)
    assert slow.collect(0.1) == []
