"""The child's loop: what one request brings about stays with that request."""

import socket
import subprocess
import sys

from services.worker.engine.echo import EchoEngine
from services.worker.engine.process import EngineProcess
from services.worker.model_cache import ModelCache
from services.worker.protocol import Channel, ModelSpec, Request, Submit
from tests.support.servers import wait_until


class Particular(EchoEngine):
    """Refuses a system role by raising, as chat templates do (`raise_exception`)."""

    def add(self, request):
        if any(message["role"] == "system" for message in request.messages or []):
            raise ValueError("System role not supported")
        super().add(request)


def test_a_message_that_the_template_refuses_is_that_requests_fault_alone():
    ours, theirs = socket.socketpair()
    process = EngineProcess(Channel(theirs), ModelCache(10, lambda _: Particular(), lambda _: 0))
    said = [Request(1, "chat", messages=[{"role": "system", "content": "x"}]),
            Request(2, "chat", messages=[{"role": "user", "content": "good evening"}])]  # fmt: skip
    process._handle([Submit(ModelSpec("m", "causal_lm", "x"), said)])
    refused = []
    wait_until(lambda: refused.extend(process._place_waiting()) or not process._waiting, 10)
    (fault,) = refused
    assert fault.id == 1 and (fault.fault.status, fault.fault.param) == (400, "messages")
    assert "System role not supported" in fault.fault.message
    (engine,) = process._cache.engines()
    answers = []
    wait_until(lambda: answers.extend(engine.step().responses) or answers, 5)
    assert [(answer.id, answer.choices[0][0]) for answer in answers] == [(2, "good evening")]
    assert list(process._owner) == [2]
    for end in (ours, theirs):
        end.close()


def test_a_child_that_starts_imports_little():
    """It is started again after each death: what only services need, and torch before there is a model, costs time."""
    code = "import sys, services.worker.engine.process; print(*(name for name in sys.argv[1:] if name in sys.modules))"
    heavy = ("torch", "transformers", "numpy", "pydantic", "sqlalchemy", "celery", "redis", "fastapi")
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
