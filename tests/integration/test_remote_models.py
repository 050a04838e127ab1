"""Models on other servers, through the whole stack: our own gateway as the server, and others where they are installed.

The server is killed with SIGKILL in the middle of batches and streams and started again.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import openai
import psutil
import pytest
from sqlalchemy import text

from lamplighter import Client
from services.local.stack import Stack, StackOptions
from shared.db.session import connect_engine
from tests.conftest import FAST
from tests.support.batches import chat_line, chat_lines, read_lines, submit, wait_for
from tests.support.models import make_tiny_llama
from tests.support.openai_servers import (
    CountingProxy,
    ScriptedServer,
    llama_cpp_server,
    missing,
    running,
    transformers_serve,
    write_byte_gguf,
)
from tests.support.servers import wait_until

KEY = "LAMPLIGHTER_REMOTE_KEY_UPSTREAM"
WRONG_KEY, WRONG = "LAMPLIGHTER_REMOTE_KEY_WRONG", "lk-0-never-to-be-seen-in-any-log"


@contextmanager
def stack_in(directory, **environment):
    stack = Stack(StackOptions(directory, device="cpu", environment=FAST | environment))
    try:
        stack.start()
        yield stack
    finally:
        stack.shut_down()


def key_of(stack):
    return (stack.directory / "admin.key").read_text().strip()


@pytest.fixture(scope="module")
def upstream(scratch, tiny_llama):
    """The server of the remote models: a stack of its own, with a model that has weights."""
    with stack_in(scratch / "upstream") as stack:
        with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key_of(stack)}"}) as http:
            assert http.post("/v1/models", json={"name": "tiny", "source": str(tiny_llama)}).is_success
        yield stack


@pytest.fixture(scope="module")
def downstream(scratch, upstream):
    keys = {f"{KEY}_FILE": str(upstream.directory / "admin.key"), WRONG_KEY: WRONG}
    with stack_in(scratch / "downstream", **keys) as stack:
        yield stack


@pytest.fixture(scope="module")
def sdk(downstream):
    with openai.OpenAI(base_url=f"{downstream.url}/v1", api_key=key_of(downstream), max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def native(downstream):
    with Client(downstream.url, key_of(downstream)) as client:
        yield client


@pytest.fixture(scope="module")
def register(downstream):
    with httpx.Client(base_url=downstream.url, headers={"Authorization": f"Bearer {key_of(downstream)}"}) as http:

        def add(name, source, **fields):
            return http.post("/v1/models", json={"name": name, "source": source, **fields}, timeout=20)

        yield add


@pytest.fixture(scope="module")
def models(register, upstream):
    """`far-echo` and `far-tiny`, straight from upstream's gateway."""
    for name in ("echo", "tiny"):
        answer = register(f"far-{name}", f"{upstream.url}/v1", remote_model=name, api_key_env=KEY)
        assert answer.is_success and "warning" not in answer.json(), answer.text


@contextmanager
def gone(stack, name="gateway"):
    """Kill a process of a stack, which its supervisor starts again only after the block."""
    with stack._lock:
        stack.processes[name].running.kill()
        stack.processes[name].running.wait()
        yield


def engine_child(stack):
    (worker,) = [
        child
        for child in psutil.Process(stack.processes["launcher"].running.pid).children()
        if "services.worker.worker" in child.cmdline()
    ]
    return worker.children()[0]


def recorded(stack, job_id):
    engine = connect_engine(stack.settings("migration"))
    with engine.begin() as connection:
        query = text("SELECT count(*), count(DISTINCT line_no) FROM result WHERE job_id = :id AND status_code = 200")
        counts = tuple(connection.execute(query, {"id": job_id.removeprefix("batch_")}).one())
    engine.dispose()
    return counts


def done(sdk, batch):
    return sdk.batches.retrieve(batch.id).request_counts.completed


def test_a_batch_outlives_its_server_and_its_engine(upstream, downstream, sdk, native, register):
    """400 lines; the server is killed and away for three seconds, later the engine child is killed: every line has its
    own answer, once, and is charged once. Between them stands a proxy that counts connections.
    """
    proxy, count = CountingProxy(upstream.port), 400
    answer = register("far-counted", proxy.url, remote_model="echo", api_key_env=KEY, concurrency=16)
    assert answer.is_success, answer.text
    batch = submit(
        sdk, [chat_line(f"line-{i}", f"text number {i}", model="far-counted", delay_ms=150) for i in range(count)]
    )
    wait_until(lambda: done(sdk, batch) >= 40, 60)
    with gone(upstream):
        seen = done(sdk, batch)
        time.sleep(3)
    assert seen < count
    wait_until(lambda: done(sdk, batch) >= seen + 60, 60)
    engine_child(downstream).kill()
    assert done(sdk, batch) < count
    batch = wait_for(sdk, batch.id, seconds=120)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (count, 0)
    lines = read_lines(sdk, batch.output_file_id)
    for i in range(count):
        body = lines[f"line-{i}"]["response"]["body"]
        assert body["choices"][0]["message"]["content"] == f"text number {i}" and body["model"] == "far-counted"
    assert recorded(downstream, batch.id) == (count, count)
    usage = native.job(batch.id)["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (3 * count, 3 * count)
    # A call in flight has a connection of its own, and so has a probe.
    assert 12 <= proxy.most <= 17
    proxy.close()


def test_while_the_server_is_away_only_its_calls_wait(upstream, sdk, models):
    with gone(upstream):
        batch = submit(sdk, chat_lines(60, model="far-echo"))
        time.sleep(1)
        started = time.monotonic()
        with pytest.raises(openai.APIStatusError) as caught:
            sdk.chat.completions.create(model="far-echo", messages=[{"role": "user", "content": "there?"}])
        assert caught.value.status_code == 503 and time.monotonic() - started < 20
        assert int(caught.value.response.headers["retry-after"]) >= 1 and "does not answer" in caught.value.message
        started = time.monotonic()
        sdk.chat.completions.create(model="echo", messages=[{"role": "user", "content": "here?"}])
        assert time.monotonic() - started < 5
        # The slots of the worker are not all held by lines that cannot be answered.
        other = wait_for(sdk, submit(sdk, chat_lines(60)).id, seconds=60)
        assert other.request_counts.completed == 60
        assert sdk.batches.retrieve(batch.id).request_counts.failed == 0
    batch = wait_for(sdk, batch.id, seconds=120)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (60, 0)


def counted(answer):
    return answer.usage.prompt_tokens, answer.usage.completion_tokens  # what was cached depends on who came first


@pytest.mark.engine
def test_answers_are_those_of_the_server(upstream, sdk, models):
    with openai.OpenAI(base_url=f"{upstream.url}/v1", api_key=key_of(upstream)) as direct:
        chat = dict(
            messages=[{"role": "user", "content": "Good evening"}],
            max_tokens=12,
            seed=5,
            temperature=0.9,
            n=2,
            logprobs=True,
            top_logprobs=2,
            stop=["qqq"],
            extra_body={"ignore_eos": True, "top_k": 20},
        )
        far, near = (c.chat.completions.create(model=m, **chat) for c, m in ((sdk, "far-tiny"), (direct, "tiny")))
        assert far.choices == near.choices and far.model == "far-tiny" and counted(far) == counted(near)
        completion = dict(prompt=["one", "two"], max_tokens=6, seed=1, logprobs=1, extra_body={"ignore_eos": True})
        far, near = (c.completions.create(model=m, **completion) for c, m in ((sdk, "far-tiny"), (direct, "tiny")))
        assert far.choices == near.choices and counted(far) == counted(near)
        embedding = dict(input=["hello", "world"])
        far, near = (c.embeddings.create(model=m, **embedding) for c, m in ((sdk, "far-echo"), (direct, "echo")))
        assert far.data == near.data and far.usage == near.usage and far.usage.prompt_tokens == 2
        streams = [
            list(c.chat.completions.create(model=m, stream=True, stream_options={"include_usage": True}, **chat))
            for c, m in ((sdk, "far-tiny"), (direct, "tiny"))
        ]
    texts = [
        [
            "".join(k.choices[0].delta.content or "" for k in chunks if k.choices and k.choices[0].index == i)
            for i in (0, 1)
        ]
        for chunks in streams
    ]
    assert texts[0] == texts[1] and all(texts[0]) and counted(streams[0][-1]) == counted(streams[1][-1])


@pytest.mark.engine
def test_what_the_server_refuses_goes_to_the_error_file_alone(sdk, models):
    lines = chat_lines(10, model="far-tiny", max_tokens=2)
    lines[3]["body"]["max_tokens"] = 4000
    batch = wait_for(sdk, submit(sdk, lines).id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (9, 1)
    (failed,) = read_lines(sdk, batch.error_file_id).values()
    assert failed["custom_id"] == "line-3" and failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["code"] == "context_length_exceeded"


@pytest.mark.engine
def test_a_broken_stream_ends_in_an_error_and_is_not_replayed(upstream, downstream, models):
    body = {"model": "far-tiny", "messages": [{"role": "user", "content": "go"}], "max_tokens": 200, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key_of(downstream)}"}
    events = []
    with httpx.stream(
        "POST", f"{downstream.url}/v1/chat/completions", json=body | {"stream": True}, headers=headers, timeout=60
    ) as answer:
        for line in answer.iter_lines():
            if line:
                events.append(line)
            if len(events) == 3:
                os.kill(upstream.processes["gateway"].running.pid, signal.SIGKILL)
    assert '"error"' in events[-1] and "broke off" in events[-1] and "data: [DONE]" not in events

    def works():
        answer = httpx.post(
            f"{downstream.url}/v1/chat/completions", json=body | {"max_tokens": 2}, headers=headers, timeout=60
        )
        return answer.status_code == 200

    wait_until(works, 60, "calls are served again")


def test_a_wrong_key_is_the_operators_matter(upstream, downstream, sdk, register):
    answer = register("far-locked", f"{upstream.url}/v1", remote_model="echo", api_key_env=WRONG_KEY)
    assert answer.is_success and "status 401" in answer.json()["warning"]
    batch = submit(sdk, chat_lines(20, model="far-locked"))
    with pytest.raises(openai.APIStatusError) as caught:
        message = {"role": "user", "content": "a most private prompt"}
        sdk.chat.completions.create(model="far-locked", messages=[message])
    assert caught.value.status_code == 503 and "operator" in caught.value.message
    counts = sdk.batches.retrieve(batch.id).request_counts
    assert (counts.completed, counts.failed) == (0, 0)
    sdk.batches.cancel(batch.id)
    assert wait_for(sdk, batch.id, "cancelled").request_counts.failed == 0
    logs = "".join(path.read_text(errors="replace") for path in downstream.log_directory.iterdir())
    assert "refuses this worker" in logs
    assert WRONG not in logs and key_of(upstream) not in logs and "private prompt" not in logs


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"source": "http://user:pw@127.0.0.1/v1"}, "source", "credentials"),
        ({"source": "http://127.0.0.1/v1?key=a"}, "source", "ends with its path"),
        ({"source": "http://127.0.0.1:99999/v1"}, "source", "not one of a server"),
        ({"source": "http://127.0.0.1/v1", "api_key_env": "LAMPLIGHTER_DATABASE_URL"}, "api_key_env", "pattern"),
        ({"source": "http://127.0.0.1/v1", "revision": "main"}, "revision", "files"),
        ({"source": "http://127.0.0.1/v1", "dtype": "bfloat16"}, "dtype", "files"),
        ({"source": "http://127.0.0.1/v1", "remote_model": "a\u0000b"}, "remote_model", "pattern"),
        ({"source": "http://127.0.0.1/v1", "concurrency": 0}, "concurrency", "greater"),
        ({"source": "/models/x", "remote_model": "x"}, "remote_model", "servers"),
    ],
)
def test_registrations_that_are_refused_by_field(register, fields, param, says):
    answer = register("never", **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and says in error["message"], error
    assert "pw" not in answer.text


def test_what_a_server_says_of_its_models_is_looked_at(upstream, register):
    answer = register("none", f"{upstream.url}/v1", remote_model="no-such", api_key_env=KEY)
    assert answer.status_code == 400 and "has no model 'no-such'" in answer.json()["error"]["message"]
    assert "'echo'" in answer.json()["error"]["message"]
    assert register("unchecked", f"{upstream.url}/v1", remote_model="no-such", api_key_env=KEY, check=False).is_success
    away = register("away", "http://127.0.0.1:9/v1")
    assert away.is_success and "does not answer" in away.json()["warning"] and away.json()["kind"] == "remote"
    missing_key = register("keyless", f"{upstream.url}/v1", remote_model="echo")
    assert missing_key.is_success and "status 401" in missing_key.json()["warning"]
    server = ScriptedServer(lambda call: None)
    try:
        for status, content, says in [
            (307, {}, "redirects"),
            (200, {"data": [{"id": "other", "max_model_len": 4096}]}, "has no model"),
            (200, {"data": []}, "lists no models"),
            (200, b"<html>", "not OpenAI's list"),
        ]:
            server.RequestHandlerClass.do_GET = lambda call: call.say(status, content, Location=upstream.url)
            answer = register(f"looked-{says.replace(' ', '-')[:5]}", server.url, remote_model="mine")
            assert says in answer.text, answer.text
        server.RequestHandlerClass.do_GET = lambda call: call.say(
            200, {"data": [{"id": "mine", "max_model_len": 4096}]}
        )
        assert register("long", server.url, remote_model="mine").json()["context_length"] == 4096
    finally:
        del server.RequestHandlerClass.do_GET
        server.close()


def test_only_an_admin_registers(downstream, native):
    key = native.request("POST", "/v1/keys", json={"scopes": ["write"]})["key"]
    headers = {"Authorization": f"Bearer {key}"}
    body = {"name": "mine", "source": "http://127.0.0.1:9/v1"}
    assert httpx.post(f"{downstream.url}/v1/models", json=body, headers=headers).status_code == 403


def test_the_command_line_registers(upstream, downstream, sdk):
    environment = os.environ | {"LAMPLIGHTER_URL": downstream.url, "LAMPLIGHTER_API_KEY": key_of(downstream)}
    command = [sys.executable, "-m", "lamplighter.cli", "models", "add"]

    def add(*arguments):
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=60)

    options = ["--remote-model", "echo", "--api-key-env", KEY, "--concurrency", "4"]
    added = add("far-cli", f"{upstream.url}/v1", *options)
    assert added.returncode == 0 and added.stdout.strip() == "far-cli (remote, none)" and not added.stderr
    assert sdk.chat.completions.create(model="far-cli", messages=[{"role": "user", "content": "hi"}]).choices
    away = add("far-away", "http://127.0.0.1:9/v1")
    assert away.returncode == 0 and "does not answer" in away.stderr
    refused = add("far-none", f"{upstream.url}/v1", "--remote-model", "no-such", "--api-key-env", KEY)
    assert refused.returncode == 1 and "no-such" in refused.stderr


# Servers of others


def transformers_server(scratch):
    reason = missing("transformers", "fastapi", "uvicorn", "openai", "accelerate")
    if reason:
        pytest.skip(f"transformers serve cannot run here: {reason}")
    model = make_tiny_llama(scratch / "for-transformers-serve")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    return transformers_serve(model, scratch), str(model)


def llama_server(scratch):
    reason = missing(
        "llama_cpp", "gguf", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"
    )
    if reason:
        pytest.skip(f"llama-cpp-python's server cannot run here: {reason}")
    return llama_cpp_server(write_byte_gguf(scratch / "for-llama-cpp.gguf"), scratch), "tiny"


@pytest.mark.engine
@pytest.mark.parametrize("make", [transformers_server, llama_server])
def test_a_batch_on_a_server_of_others_that_is_killed(scratch, downstream, sdk, native, register, make):
    """240 lines; killed with SIGKILL after the first forty and started again: 0 lost, 0 twice, 0 failed."""
    server, name = make(scratch)
    with running(server):
        registered = f"others-{make.__name__}"
        assert register(registered, server.url, remote_model=name).is_success
        count, endpoint = 240, "/v1/completions"
        body = {"model": registered, "max_tokens": 24, "temperature": 0}
        lines = [
            {"custom_id": f"line-{i}", "method": "POST", "url": endpoint, "body": body | {"prompt": f"number {i}"}}
            for i in range(count)
        ]
        batch = submit(sdk, lines, endpoint)
        wait_until(lambda: done(sdk, batch) >= 40, 120)
        server.kill()
        seen = done(sdk, batch)
        server.start()
        batch = wait_for(sdk, batch.id, seconds=200)
        assert seen < count
        assert (batch.request_counts.completed, batch.request_counts.failed) == (count, 0)
        assert len(read_lines(sdk, batch.output_file_id)) == count and recorded(downstream, batch.id) == (count, count)
        answers = [line["response"]["body"] for line in read_lines(sdk, batch.output_file_id).values()]
        tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
        assert native.job(batch.id)["usage"]["output_tokens"] == tokens > count
        message = {"role": "user", "content": "Good evening"}
        chunks = list(sdk.chat.completions.create(model=registered, messages=[message], max_tokens=8, stream=True))
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
