"""A device too small for its models and a trainer at once: each gives way to the other, and nobody's work is lost."""

import time

import openai
import pytest
from lamplighter import Client

from services.local.stack import Stack, StackOptions
from services.worker.engine.process import estimate_bytes
from shared.model_files import DEFAULT_KV_TOKENS
from services.worker.protocol import ModelSpec
from services.worker.room import STARVED_SECONDS
from tests.integration.test_fine_tuning import create, wait_for
from tests.support.servers import wait_until

pytestmark = pytest.mark.timeout(240)
BASE = "cramped"


@pytest.fixture(scope="module")
def cramped(scratch, tiny_llama):
    """A stack whose cache has room for the model, a small adapter and nothing beside them."""
    size = estimate_bytes(
        ModelSpec(BASE, "causal_lm", str(tiny_llama), dtype="float32", context_length=256), DEFAULT_KV_TOKENS
    )
    environment = {"LAMPLIGHTER_CACHE_BYTES": str(size + (256 << 10)), "LAMPLIGHTER_HEARTBEAT_SECONDS": "1"}
    stack = Stack(StackOptions(scratch / "cramped", device="cpu", environment=environment))
    try:
        stack.start()
        key = (stack.directory / "admin.key").read_text().strip()
        native = Client(stack.url, key)
        native.request("POST", "/v1/models", json={"name": BASE, "source": str(tiny_llama)})
        yield native, openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0, timeout=120)
    finally:
        stack.shut_down()


def ask(sdk, model=BASE):
    messages = [{"role": "user", "content": "say red"}]
    more = {"extra_body": {"ignore_eos": True}}
    return sdk.chat.completions.create(model=model, messages=messages, max_tokens=3, temperature=0, **more)


def loaded(native):
    (worker,) = [w for w in native.request("GET", "/v1/workers")["data"] if w["state"] != "lost"]
    return worker["models"]


def test_an_idle_model_goes_for_a_trainer_and_comes_back(cramped):
    native, sdk = cramped
    ask(sdk)
    wait_until(lambda: BASE in loaded(native), 20)
    job = create(sdk, BASE, hyper={"n_epochs": 30})
    wait_for(sdk, job.id, ("running",))
    wait_until(lambda: BASE not in loaded(native), 20, "the model has made room")
    job = wait_for(sdk, job.id)
    assert job.status == "succeeded", job.error
    assert ask(sdk, job.fine_tuned_model).usage.completion_tokens == 3


@pytest.mark.long
def test_somebody_online_gets_the_room_back_and_the_job_goes_on(cramped):
    native, sdk = cramped
    job = create(sdk, BASE, hyper={"n_epochs": 50, "batch_size": 1})
    wait_until(lambda: sdk.fine_tuning.jobs.list_events(job.id).data[0].type == "metrics", 60, "it trains")
    assert sdk.fine_tuning.jobs.retrieve(job.id).status == "running"
    started = time.monotonic()
    answer = ask(sdk)
    assert answer.usage.completion_tokens == 3
    assert time.monotonic() - started > STARVED_SECONDS / 2, "it had room beside the trainer: this shows nothing"
    attempts = native.request("GET", f"/v1/jobs/{job.id}/attempts")["data"]
    assert [attempt["outcome"] for attempt in attempts] == ["preempted"]
    done = wait_for(sdk, job.id, seconds=200)
    assert done.status == "succeeded", done.error
    steps = [e.data["step"] for e in sdk.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"]
    assert sorted(steps) == list(range(1, 24 * 50 + 1)), "a step was told twice, or not at all"


def test_what_can_never_fit_fails_with_the_figures(cramped, scratch):
    from tests.support.models import make_tiny_llama

    native, sdk = cramped
    large = make_tiny_llama(scratch / "too-large", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    native.request("POST", "/v1/models", json={"name": "too-large", "source": str(large)})
    job = wait_for(sdk, create(sdk, "too-large").id)
    assert job.status == "failed" and job.error.code == "out_of_memory" and "bytes" in job.error.message
    assert ask(sdk).usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError):
        ask(sdk, "too-large")
