"""The remote engine over real sockets, against a server that does what the test says: every class of fault, and bounds."""

import base64
import json
import logging
import socket
import struct
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.worker.engine import remote_client, remote_dispatcher
from services.worker.engine.remote import RemoteEngine, load_remote
from services.worker.engine.remote_messages import EventParser, Failure, call_body
from services.worker.engine.remote_policy import FlowControl, Verdict, pause_seconds, retry_after_seconds, verdict_of
from services.worker.protocol import ModelSpec, Request, SamplingParams, TokenLogprob
from shared.domain.errors import ModelRefused
from shared.domain.remote import RemoteAddress, is_remote
from shared.settings import RemoteSettings
from tests.support.openai_servers import ScriptedServer, chat_answer, chunk, event
from tests.support.servers import wait_until

KEY_VARIABLE = "LAMPLIGHTER_REMOTE_KEY_TEST"


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(remote_dispatcher, "pause_seconds", lambda failures, jitter: 0.05 * bool(failures))


@pytest.fixture
def serve():
    servers = []

    def start(answer, port=0):
        servers.append(ScriptedServer(answer, port))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def engine_for():
    engines = []

    def make(url, *, key_variable=None, concurrency=None, **settings):
        address = RemoteAddress(url, "theirs", key_variable, concurrency)
        settings = {f"remote_{name}": value for name, value in settings.items()}
        engines.append(RemoteEngine(address, RemoteSettings(**settings), lambda: None))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
        assert not engine._thread.is_alive()


def chat(identifier, text="hello", *, is_online=False, is_streamed=False, **params):
    messages = [{"role": "user", "content": text}]
    return Request(
        identifier,
        "chat",
        messages=messages,
        params=SamplingParams(**params),
        is_online=is_online,
        is_streamed=is_streamed,
    )


def collect(engine, count, seconds=30):
    """Step until so many responses have come; return them by id, and each stream's pieces joined by (id, choice)."""
    answers, texts = {}, {}

    def look():
        output = engine.step()
        for delta in output.deltas:
            assert delta.id not in answers, "a delta after its response"
            texts[delta.id, delta.index] = texts.get((delta.id, delta.index), "") + delta.text
        for response in output.responses:
            assert response.id not in answers, "answered twice"
            answers[response.id] = response
        return len(answers) >= count

    wait_until(look, seconds, f"{count} responses")
    return answers, texts


def run(engine, requests, seconds=30):
    for request in requests:
        engine.add(request)
    answers, _ = collect(engine, len(requests), seconds)
    assert engine.wait_seconds() is None
    engine.check_integrity()
    return answers


# What is sent and what is understood


def test_only_what_differs_from_the_defaults_is_sent_and_all_of_that():
    plain = call_body(chat(1), "theirs", asks_for_usage=True)
    assert plain == {
        "model": "theirs",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 0,
    }
    params = dict(
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        n=2,
        min_tokens=1,
        ignore_eos=True,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
    )
    full = chat(1, stop=("x", "y"), seed=7, logit_bias={5: -1.5}, logprobs=3, is_streamed=True, **params)
    full.delay_ms = 20
    assert call_body(full, "theirs", asks_for_usage=True) == params | {
        "model": "theirs",
        "messages": full.messages,
        "seed": 7,
        "stop": ["x", "y"],
        "logit_bias": {"5": -1.5},
        "logprobs": True,
        "top_logprobs": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "delay_ms": 20,
    }
    # Every field of the parameters is covered above or below: a new one must be passed on, too.
    assert set(SamplingParams.__struct_fields__) == set(params) | {"stop", "seed", "logit_bias", "logprobs", "schema"}


def test_schemas_prompts_and_seeds_as_servers_take_them():
    def body(request):
        return call_body(request, "theirs", asks_for_usage=False)

    assert body(chat(1, schema='{"type":"object"}'))["response_format"] == {"type": "json_object"}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = body(chat(1, schema=json.dumps(schema)))["response_format"]
    assert asked["type"] == "json_schema" and asked["json_schema"]["schema"] == schema
    one = body(Request(1, "complete", prompts=["a"], params=SamplingParams(logprobs=2)))
    assert one["prompt"] == "a" and one["max_tokens"] == 16 and one["logprobs"] == 2
    assert body(Request(1, "complete", prompts=[[1, 2], [3]]))["prompt"] == [[1, 2], [3]]
    embedding = body(Request(1, "embed", prompts=["a", "b"]))
    assert embedding == {"model": "theirs", "input": ["a", "b"], "encoding_format": "base64"}
    assert 0 <= body(chat(1, seed=-(2**63)))["seed"] < 2**31 and body(chat(1, seed=12345))["seed"] == 12345


def test_a_chat_answer_with_everything_in_it(serve, engine_for):
    top = [{"token": "B", "logprob": -0.5, "bytes": [66]}, {"token": "A", "logprob": -1, "bytes": None}]
    logprobs = {"content": [{"token": "B", "logprob": -0.5, "bytes": [66], "top_logprobs": top}]}
    first = chat_answer("B", logprobs=logprobs)["choices"][0]
    second = chat_answer("", "length", index=1, message={"content": None})["choices"][0]
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    server = serve(lambda call: call.say(content={"choices": [second, first], "usage": usage, "extra": [1]}))
    (answer,) = run(engine_for(server.url), [chat(5, n=2, logprobs=2)]).values()
    assert answer.choices == [("B", "stop"), ("", "length")]
    named = TokenLogprob("B", -0.5, [TokenLogprob("B", -0.5, [], b"B"), TokenLogprob("A", -1.0)], b"B")
    assert answer.logprobs == [[named], []]
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (7, 3, 2)
    assert server.paths == ["/v1/chat/completions"]


def test_completions_and_their_logprobs(serve, engine_for):
    def answer(call):
        logprobs = {
            "tokens": ["x", "y"],
            "token_logprobs": [None, -0.25],
            "top_logprobs": [None, {"y": -0.25, "z": -2}],
            "text_offset": [0, 1],
        }
        choices = [{"index": i, "text": f"t{i}", "finish_reason": "length", "logprobs": logprobs} for i in (1, 0)]
        call.say(content={"choices": choices, "usage": {"prompt_tokens": 2, "completion_tokens": 4}})

    request = Request(1, "complete", prompts=["a", "b"], params=SamplingParams(logprobs=2))
    (got,) = run(engine_for(serve(answer).url), [request]).values()
    assert got.choices == [("t0", "length"), ("t1", "length")]
    top = [TokenLogprob("y", -0.25), TokenLogprob("z", -2.0)]
    assert got.logprobs == [[TokenLogprob("x", 0.0), TokenLogprob("y", -0.25, top)]] * 2


@pytest.mark.parametrize("is_base64", [True, False])
def test_embeddings(serve, engine_for, is_base64):
    vectors = [[0.5, -1.0], [2.0, 0.25]]

    def answer(call):
        raw = [base64.b64encode(struct.pack("<2f", *v)).decode() if is_base64 else v for v in vectors]
        data = [{"index": i, "embedding": raw[i]} for i in (1, 0)]
        call.say(content={"data": data, "usage": {"prompt_tokens": 9, "total_tokens": 9}})

    server = serve(answer)
    (got,) = run(engine_for(server.url), [Request(1, "embed", prompts=["a", [1, 2]])]).values()
    assert got.embeddings == [struct.pack("<2f", *v) for v in vectors] and got.prompt_tokens == 9
    assert server.paths == ["/v1/embeddings"]


def test_usage_that_is_not_said_is_estimated_low(serve, engine_for):
    server = serve(lambda call: call.say(content=chat_answer("12345678 ", usage=None)))
    (answer,) = run(engine_for(server.url), [chat(1, "Grüße")]).values()
    assert (answer.prompt_tokens, answer.completion_tokens) == (2, 3)


# Streams


STREAM = (
    b"\xef\xbb\xbf: a comment\r\n\r\n"
    + b"event: message\r\nid: 1\r\ndata: "
    + json.dumps(chunk("Grüße, ", role="assistant"), ensure_ascii=False).encode()
    + b"\r\n\r\n:ping\n\n"
    + b"data: " + json.dumps(chunk("雪\u2028 two"), ensure_ascii=False).encode().replace(b", ", b",\r\ndata: ", 1)
    + b"\n\n"
    + event(chunk(None, "stop"))
    + b"data:"
    + json.dumps({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 5}}).encode()
    + b"\r\r"
    + b"data: [DONE]\n\n"
)  # fmt: skip


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=40))
def test_events_do_not_depend_on_where_a_stream_is_cut(cuts):
    def parse(blocks):
        parser = EventParser()
        return [event for block in blocks for event in parser.feed(block)] + parser.finish()

    edges = [0, *sorted(set(cuts)), len(STREAM)]
    whole = parse([STREAM])
    assert parse([STREAM[a:b] for a, b in zip(edges, edges[1:])]) == whole and whole[-1] == b"[DONE]"
    assert len(whole) == 5 and parse([bytes([byte]) for byte in STREAM]) == whole


@given(st.binary(max_size=300))
def test_no_stream_of_bytes_breaks_the_parser(content):
    parser = EventParser()
    parser.feed(content)
    parser.finish()


def test_an_event_without_an_end_is_given_up():
    parser = EventParser()
    with pytest.raises(Failure):
        for _ in range(80):
            parser.feed(b"data: " + b"x" * 100_000)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_comes_piece_by_piece_and_joins_to_its_answer(serve, engine_for, size):
    blocks = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
    server = serve(lambda call: call.stream(blocks))
    engine = engine_for(server.url)
    engine.add(chat(1, is_streamed=True))
    answers, texts = collect(engine, 1)
    assert answers[1].choices == [("Grüße, 雪\u2028 two", "stop")] and texts == {(1, 0): "Grüße, 雪\u2028 two"}
    assert (answers[1].prompt_tokens, answers[1].completion_tokens) == (4, 5)
    assert run(engine, [chat(2, is_streamed=True)])[2].choices and server.connections == 1  # kept and used again


def test_deltas_arrive_before_the_stream_ends(serve, engine_for):
    go_on = threading.Event()

    def answer(call):
        def blocks():
            yield event(chunk("one"))
            go_on.wait(20)
            yield event(chunk(" two", "length")) + event(b"[DONE]")

        call.stream(blocks())

    engine = engine_for(serve(answer).url)
    engine.add(chat(1, is_streamed=True))
    first = wait_until(lambda: engine.step().deltas, 10)
    assert [delta.text for delta in first] == ["one"]
    go_on.set()
    assert collect(engine, 1)[0][1].choices == [("one two", "length")]


def test_a_server_that_knows_no_stream_options_is_asked_without(serve, engine_for):
    def answer(call):
        if "stream_options" in call.body:
            call.say(400, {"error": {"message": "unknown field", "param": "stream_options", "code": None}})
        else:
            call.stream([event(chunk("abcd", "stop")), event(b"[DONE]")])

    server = serve(answer)
    engine = engine_for(server.url)
    for identifier in (1, 2):
        (got,) = run(engine, [chat(identifier, is_streamed=True)]).values()
        assert got.choices == [("abcd", "stop")] and got.completion_tokens == 1
    assert [("stream_options" in body) for body in server.bodies] == [True, False, False]


def test_a_server_that_does_not_stream_has_its_answer_streamed_whole(serve, engine_for):
    engine = engine_for(serve(lambda call: call.say(content=chat_answer("all of it"))).url)
    engine.add(chat(1, is_streamed=True))
    answers, texts = collect(engine, 1)
    assert texts == {(1, 0): "all of it"} and answers[1].choices == [("all of it", "stop")]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"message": "too long", "type": "BadRequestError", "code": 400}, 400),
        ({"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}, 400),
        ("the engine died", None),
        ({"message": "overloaded", "type": "server_error", "code": 503}, None),
    ],
)
def test_an_error_event(serve, engine_for, error, status):
    """Before the first piece it is retried or is the request's own; after it the stream is broken and never replayed."""

    def answer(call):
        if call.server.tries[call.words] == 1:
            call.stream([event(chunk("a"))] * (call.words == "begun") + [event({"error": error})])
        else:
            call.stream([event(chunk("fine", "stop")), event(b"[DONE]")])

    server = serve(answer)
    engine = engine_for(server.url)
    for identifier, words in enumerate(("begun", "not begun")):
        engine.add(chat(identifier, words, is_streamed=True, is_online=True))
    answers, texts = collect(engine, 2)
    assert texts[0, 0] == "a" and answers[0].fault.status == status and server.tries["begun"] == 1
    if status is None:
        assert answers[1].choices == [("fine", "stop")] and server.tries["not begun"] == 2
    else:
        assert (answers[1].fault.status, answers[1].fault.message) == (400, "too long")


# Classes of faults


@pytest.mark.parametrize(("status", "told"), [(400, 400), (404, 404), (413, 413), (422, 400), (415, 400), (451, 400)])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_the_server_refuses_is_the_requests_own_error(serve, engine_for, status, told, is_streamed):
    """Under a status that means here what it means there: 422, say, is a key that was used for something else."""
    error = {"message": "m" * 900, "type": "BadRequest", "param": "top_k", "code": "bad"}
    server = serve(lambda call: call.say(status, {"error": error}))
    (answer,) = run(engine_for(server.url), [chat(1, is_streamed=is_streamed)]).values()
    fault = answer.fault
    assert (fault.status, fault.param, fault.code, fault.message) == (told, "top_k", "bad", "m" * 500)
    assert server.tries["hello"] == 1 and (answer.prompt_tokens, answer.completion_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"detail": [{"loc": ["body", "n"], "msg": "too many"}]}, '[{"loc":["body","n"],"msg":"too many"}]'),
        ({"object": "error", "message": "old vLLM", "code": 400}, "old vLLM"),
        (b"<html>no\n json</html>", "<html>no json</html>"),
        (b"", "status 400"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_errors_in_every_form(serve, engine_for, content, message):
    server = serve(lambda call: call.say(400, content))
    (answer,) = run(engine_for(server.url), [chat(1)]).values()
    assert answer.fault.status == 400 and answer.fault.message == message


PASSING = [408, 409, 425, 429, 500, 502, 503, 504]


@pytest.mark.parametrize("status", [*PASSING, "reset", "cut", "no json", "no choices", "aborted"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_passing_faults_are_tried_again_and_charge_nothing(serve, engine_for, hasty, status, is_streamed):
    def answer(call):
        if call.server.tries[call.words] > 2:
            if is_streamed:
                usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
                call.stream([event(chunk("fine", "stop")), event(usage), event(b"[DONE]")])
            else:
                call.say(content=chat_answer())
        elif status == "reset":
            call.reset()
        elif status == "cut":
            call.stream([b": nothing yet\n\n"], ends=False)
            call.reset()
        elif status == "no json":
            call.say(content=b"oh")
        elif status == "no choices":
            call.say(content={"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 100}})
        elif status == "aborted":
            call.say(content=chat_answer("half", "abort"))
        else:
            call.say(status, {"error": {"message": "later"}, "usage": {"prompt_tokens": 50}})

    server = serve(answer)
    engine = engine_for(server.url)
    (got,) = run(engine, [chat(1, is_streamed=is_streamed)]).values()
    assert got.choices == [("fine", "stop")] and server.tries["hello"] == 3
    assert (got.prompt_tokens, got.completion_tokens, engine.tokens) == (7, 3, 3)


@pytest.mark.parametrize("status", [301, 302, 307, 401, 402, 403, 405])
def test_an_operators_mistake_fails_all_without_blaming_them(serve, engine_for, caplog, status):
    elsewhere = serve(lambda call: call.say(content=chat_answer("stolen")))
    server = serve(lambda call: call.say(status, {"error": "no"}, Location=elsewhere.url))
    engine = engine_for(server.url, concurrency=2)
    answers = run(engine, [chat(i, f"secret prompt {i}") for i in range(50)])
    assert all(a.fault.status is None and "operator" in a.fault.message for a in answers.values())
    assert sum(server.tries.values()) <= 4 and not elsewhere.bodies  # nothing is followed, nothing hammers
    asked = len(server.bodies)
    assert all(run(engine, [chat(100 + i)])[100 + i].fault.status is None for i in range(5))
    assert len(server.bodies) == asked
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert record.status == status and "secret prompt" not in caplog.text


def test_the_key_comes_from_the_environment_or_a_file_and_is_read_anew(serve, engine_for, monkeypatch, tmp_path):
    def answer(call):
        is_right = call.headers["Authorization"] == "Bearer right"
        call.say(200 if is_right else 401, chat_answer())

    monkeypatch.setattr(remote_dispatcher, "MISCONFIGURED_SECONDS", 0.0)
    server = serve(answer)
    engine = engine_for(server.url, key_variable=KEY_VARIABLE)
    (answer,) = run(engine, [chat(1)]).values()
    assert answer.fault.status is None and not server.bodies  # without a key nothing is sent
    (tmp_path / "key").write_text("wrong\n")
    monkeypatch.setenv(f"{KEY_VARIABLE}_FILE", str(tmp_path / "key"))
    assert run(engine, [chat(2)])[2].fault.status is None
    (tmp_path / "key").write_text("right\n")
    assert run(engine, [chat(3)])[3].choices
    monkeypatch.setenv(KEY_VARIABLE, "wrong\nX-Injected: 1")
    assert run(engine, [chat(4)])[4].fault.status is None
    assert server.keys == ["Bearer wrong", "Bearer right"]


def test_neither_prompts_nor_keys_are_logged(serve, engine_for, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(KEY_VARIABLE, "sk-very-secret")
    fates = iter([500, 503, 400, 401])
    server = serve(lambda call: call.say(next(fates), {"error": {"message": call.words}}))
    engine = engine_for(server.url, key_variable=KEY_VARIABLE)
    run(engine, [chat(1, "a private question")])
    run(engine, [chat(2, "a private question", is_streamed=True)])
    assert len(server.bodies) == 4 and "Bearer sk-very-secret" in server.keys
    assert "private question" not in caplog.text and "very-secret" not in caplog.text


# Bounds


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_is_honoured_by_all_calls(serve, engine_for, kind):
    def answer(call):
        if len(call.server.bodies) == 1:
            later = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
            call.say(429, {"error": "slow"}, Retry_After="2" if kind == "seconds" else later)
        else:
            call.say(content=chat_answer())

    server = serve(answer)
    engine = engine_for(server.url, concurrency=1)
    run(engine, [chat(i) for i in range(3)])
    assert server.times[1] - server.times[0] > 1.8


def test_calls_in_flight_never_exceed_the_bound_and_reach_it(serve, engine_for):
    server = serve(lambda call: (time.sleep(0.02), call.say(content=chat_answer())))
    answers = run(engine_for(server.url, concurrency=12), [chat(i, is_online=i % 3 == 0) for i in range(300)])
    assert all(a.choices for a in answers.values()) and 10 <= server.most <= 12


def test_a_bound_of_one_holds_for_online_calls_too(serve, engine_for):
    server = serve(lambda call: (time.sleep(0.05), call.say(content=chat_answer())))
    run(engine_for(server.url, concurrency=1), [chat(i, is_online=i % 2 == 0) for i in range(12)])
    assert server.most == 1


def test_the_limit_finds_what_the_server_takes(serve, engine_for):
    """A server with four places turns the fifth call away: the limit hovers about four, and nobody is given up."""
    turned_away = []

    def answer(call):
        if call.server.now > 4:
            turned_away.append(len(call.server.bodies))
            call.say(429, {"error": "full"}, Retry_After="0")
            return
        time.sleep(0.02)
        call.say(content=chat_answer())

    server = serve(answer)
    answers = run(engine_for(server.url, concurrency=64), [chat(i) for i in range(300)], 60)
    assert all(a.choices for a in answers.values())
    assert 0 < len(turned_away) < 60 and server.most < 16  # 64 at once would be turned away by the hundred


def test_online_calls_go_first_and_find_a_place(serve, engine_for):
    order, leave = [], threading.Semaphore(0)

    def answer(call):
        order.append(call.words)
        leave.acquire(timeout=20)
        call.say(content=chat_answer())

    server = serve(answer)
    engine = engine_for(server.url, concurrency=4)
    for i in range(20):
        engine.add(chat(i, "batch"))
    wait_until(lambda: server.now == 3, 10)
    time.sleep(0.2)
    assert server.now == 3  # a place is left free
    engine.add(chat(100, "online", is_online=True))
    wait_until(lambda: server.now == 4, 10)
    engine.add(chat(101, "online", is_online=True))
    time.sleep(0.2)
    assert order == ["batch"] * 3 + ["online"] and server.most == 4
    # One place at a time: calls that are sent together reach a server in any order.
    leave.release()
    found, _ = collect(engine, 1)
    wait_until(lambda: len(order) == 5, 10)
    assert order[3:] == ["online"] * 2
    leave.release(22)
    rest, _ = collect(engine, 21)
    assert len(found | rest) == 22 and server.most == 4


def test_a_server_that_is_down_gets_probes_and_no_storm(engine_for):
    """Every attempt is a connection to a socket that closes at once: there are a few, and not two hundred times eight."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        accepted = []

        def slam():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                accepted.append(time.monotonic())
                connection.close()

        threading.Thread(target=slam, daemon=True).start()
        engine = engine_for(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", patience_seconds=4)
        started = time.monotonic()
        answers = run(engine, [chat(i, is_online=i % 10 == 0) for i in range(200)])
        assert time.monotonic() - started < 12 and len(accepted) < 30
        assert all(a.fault.status is None and "does not answer" in a.fault.message for a in answers.values())
        listener.shutdown(socket.SHUT_RDWR)


def test_once_known_to_be_away_newcomers_are_given_back_soon(engine_for):
    engine = engine_for("http://127.0.0.1:9/v1", patience_seconds=1)
    run(engine, [chat(1)])
    started = time.monotonic()
    run(engine, [chat(2)])
    assert time.monotonic() - started < remote_dispatcher.NEWCOMER_SECONDS + 2


def test_a_server_that_comes_back_in_time_costs_nothing(serve, engine_for):
    first = serve(lambda call: (time.sleep(0.05), call.say(content=chat_answer(call.words))))
    engine = engine_for(first.url, concurrency=8)
    for i in range(100):
        engine.add(chat(i, f"text {i}"))
    wait_until(lambda: len(first.bodies) > 20, 10)
    first.answer = lambda call: call.reset()
    wait_until(lambda: engine._dispatcher._flow.is_down, 10)
    port = first.server_port
    first.close()
    time.sleep(1.5)
    second = serve(lambda call: call.say(content=chat_answer(call.words)), port)
    answers, _ = collect(engine, 100)
    assert {i: a.choices for i, a in answers.items()} == {i: [(f"text {i}", "stop")] for i in range(100)}
    assert sum(second.tries.values()) < 100


def test_a_delivered_stream_is_never_replayed_and_an_undelivered_one_is(serve, engine_for):
    def answer(call):
        if call.server.tries[call.words] > 1:
            call.stream([event(chunk("again", "stop")), event(b"[DONE]")])
        else:
            call.stream([event(chunk("half"))] if call.words == "begun" else [b":\n\n"], ends=False)
            time.sleep(0.2)
            call.reset()

    server = serve(answer)
    engine = engine_for(server.url)
    for identifier, words in enumerate(("begun", "not begun")):
        engine.add(chat(identifier, words, is_streamed=True, is_online=True))
    answers, texts = collect(engine, 2)
    assert answers[0].fault.status is None and "broke off" in answers[0].fault.message and texts[0, 0] == "half"
    assert answers[1].choices == [("again", "stop")] and server.tries == {"begun": 1, "not begun": 2}


def test_a_stream_that_ends_without_a_reason_has_broken_off(serve, engine_for):
    """llama-cpp-python ends one so, with [DONE] and all, when another call comes in."""
    server = serve(lambda call: call.stream([event(chunk("half")), event(b"[DONE]")]))
    engine = engine_for(server.url)
    engine.add(chat(1, is_streamed=True))
    answers, _ = collect(engine, 1)
    assert answers[1].fault.status is None and not answers[1].choices


def test_a_call_that_takes_its_time_moves_the_progress_and_one_without_end_is_given_back(serve, engine_for):
    server = serve(lambda call: time.sleep(3) or call.say(content=chat_answer()))
    engine = engine_for(server.url, timeout_seconds=10)
    engine.add(chat(1))
    wait_until(lambda: server.now == 1, 5)
    before = engine.progress
    time.sleep(1)
    assert engine.progress > before and not engine.step() and engine.wait_seconds() > 0
    assert collect(engine, 1)[0][1].choices
    impatient = engine_for(server.url, timeout_seconds=0.5)
    (answer,) = run(impatient, [chat(2, "slow")]).values()
    assert answer.fault.status is None and server.tries["slow"] == 2
    assert impatient._dispatcher._flow.limit < 8


def test_a_server_that_hangs_is_noticed_before_its_calls_time_out(engine_for, monkeypatch):
    monkeypatch.setattr(remote_client, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:  # takes connections and says nothing
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        engine = engine_for(url, timeout_seconds=600, silence_seconds=0.5, patience_seconds=2)
        started = time.monotonic()
        (answer,) = run(engine, [chat(1)]).values()
        assert answer.fault.status is None and time.monotonic() - started < 15


def test_a_server_that_works_in_silence_is_left_to_it(serve, engine_for, monkeypatch):
    monkeypatch.setattr(remote_client, "PROBE_SECONDS", 0.3)
    server = serve(lambda call: time.sleep(3) or call.say(content=chat_answer()))
    (answer,) = run(engine_for(server.url, silence_seconds=0.5), [chat(1)]).values()
    assert answer.choices and server.tries["hello"] == 1 and server.probes >= 2


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_abort_closes_the_connection(serve, engine_for, is_streamed):
    left = []

    def answer(call):
        if is_streamed:
            call.stream([event(chunk("some text"))], ends=False)
        left.append(call.has_left(10))

    server = serve(answer)
    engine = engine_for(server.url)
    engine.add(chat(1, "twelve bytes", is_streamed=is_streamed))
    wait_until(lambda: server.now == 1 and (not is_streamed or engine.step().deltas), 10)
    used = engine.abort(1)
    assert used.is_aborted and used.prompt_tokens == 3 and used.completion_tokens == (3 if is_streamed else 0)
    assert engine.abort(1) is None and engine.wait_seconds() is None
    wait_until(lambda: left, 3)
    assert left == [True] and not engine.step()
    wait_until(lambda: not engine._dispatcher.in_flight, 3)
    engine.check_integrity()


def test_an_abort_of_what_was_not_sent_costs_nothing(serve, engine_for):
    server = serve(lambda call: time.sleep(1) or call.say(content=chat_answer()))
    engine = engine_for(server.url, concurrency=1)
    for identifier in (1, 2):
        engine.add(chat(identifier))
    wait_until(lambda: server.now == 1, 5)
    assert engine.abort(2).prompt_tokens == 0
    collect(engine, 1)
    time.sleep(0.2)
    assert server.tries["hello"] == 1 and engine.wait_seconds() is None


# One bad line harms nobody


def test_a_request_at_which_the_server_fails_again_and_again_is_its_own_fault(serve, engine_for, hasty):

    def answer(call):
        if call.words == "poison":
            call.say(500, {"error": {"message": "CUDA assert"}})
        else:
            call.say(content=chat_answer())

    server = serve(answer)
    answers = run(engine_for(server.url), [chat(0, "poison"), *(chat(i, f"fine {i}") for i in range(1, 60))])
    assert all(answers[i].choices for i in range(1, 60))
    assert answers[0].fault.status == 500 and "CUDA assert" in answers[0].fault.message
    assert server.tries["poison"] == remote_dispatcher.FAILURES_OF_A_BATCH_LINE


def test_nobody_is_blamed_for_a_server_that_fails_at_everything(serve, engine_for, hasty):
    server = serve(lambda call: call.say(500, {"error": {"message": "dead"}}))
    answers = run(engine_for(server.url, patience_seconds=600), [chat(i, f"line {i}") for i in range(6)])
    assert all(a.fault.status is None for a in answers.values())
    assert server.tries["line 0"] == remote_dispatcher.FAILURES_OF_A_BATCH_LINE and server.tries["Hello"] == 6


def test_an_answer_that_came_goes_before_what_gives_the_slice_back(serve, engine_for):
    server = serve(lambda call: call.say(200 if call.words == "fine" else 401, chat_answer()))
    engine = engine_for(server.url, concurrency=1)
    engine.add(chat(1, "fine"))
    wait_until(lambda: engine._news, 10)
    engine.add(chat(2, "bad"))
    wait_until(lambda: len(engine._news) == 2, 10)
    engine._news.reverse()
    assert [response.id for response in engine.step().responses] == [1, 2]


# Policy


def test_every_status_has_a_verdict():
    for status in range(100, 600):
        if status in PASSING or status >= 500:
            assert verdict_of(status) in (Verdict.OVERLOADED, Verdict.FAILED)
        elif status < 400 or status in (401, 402, 403, 405, 407):
            assert verdict_of(status) is Verdict.MISCONFIGURED
        else:
            assert verdict_of(status) is Verdict.REFUSED


@given(st.text(max_size=40) | st.none())
def test_any_retry_after_is_a_bounded_wait(header):
    assert 0 <= retry_after_seconds(header, datetime.now(UTC)) <= 300


@pytest.mark.parametrize(("header", "seconds"), [("2", 2), ("0.5", 0.5), ("nan", 0), ("inf", 300), ("-3", 0), ("x", 0)])
def test_retry_after_values(header, seconds):
    assert retry_after_seconds(header, datetime.now(UTC)) == seconds


class Flow(RuleBasedStateMachine):
    """Calls come and go in every way: there are never more than the bound, and never none for good."""

    @initialize(most=st.sampled_from([1, 2, 7, 64]))
    def begin(self, most):
        self.most, self.flow, self.now, self.sent = most, FlowControl(most), 0.0, []

    @rule(is_online=st.booleans())
    def send(self, is_online):
        online = sum(each[1] for each in self.sent)
        if self.flow.allows(len(self.sent), online, self.now, is_online=is_online):
            self.sent.append((self.flow.epoch, is_online))

    @rule(how=st.sampled_from(["answered", "overloaded", "unreachable", "timed_out", "failed"]), retry=st.floats(0, 9))
    def end(self, how, retry):
        if not self.sent:
            return
        epoch, _ = self.sent.pop(0)
        if how == "answered":
            self.flow.answered(len(self.sent) + 1)
        elif how == "overloaded":
            self.flow.overloaded(epoch, self.now, 1.0, retry)
        elif how == "unreachable":
            self.flow.unreachable(epoch, self.now)
        elif how == "timed_out":
            self.flow.timed_out(epoch)
        else:
            self.flow.failed(epoch, self.now, 1.0)

    @rule(was_away=st.booleans())
    def recover(self, was_away):
        if self.flow.is_down:
            self.flow.recovered(was_away=was_away)

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def is_bounded(self):
        assert len(self.sent) <= self.most and 1 <= self.flow.limit <= self.most

    @invariant()
    def goes_on(self):
        later = max(self.now, self.flow.held_until)
        assert self.flow.is_down or self.flow.allows(0, 0, later, is_online=False)


TestFlow = Flow.TestCase
TestFlow.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


def test_pauses_grow_to_a_bound():
    ceilings = [pause_seconds(failures, 1.0) for failures in range(1, 40)]
    assert ceilings[:4] == [0.5, 1, 2, 4] and ceilings[-1] == 10 and sorted(ceilings) == ceilings
    assert pause_seconds(0, 1.0) == 0 and pause_seconds(3, 0.0) == 1.0


def test_what_fails_together_halves_once():
    flow = FlowControl(64, limit=64)
    for _ in range(64):
        flow.overloaded(0, 1.0, 0.5)
    assert flow.limit == 32 and flow.strikes == 1 and flow.held_until == 1.5
    flow.overloaded(flow.epoch, 2.0, 0.5)
    assert flow.limit == 16


# Addresses


@given(
    st.sampled_from(["http", "https"]),
    st.sampled_from(["gpu-1", "10.0.0.1:8000", "[::1]:8000", "a.example"]),
    st.sampled_from(["", "/", "/v1", "/x/v1/"]),
    st.text(min_size=1),
    st.none() | st.just(KEY_VARIABLE),
    st.none() | st.integers(1, 1024),
)
def test_addresses_survive_the_registry(scheme, host, path, model, key_variable, concurrency):
    address = RemoteAddress(f"{scheme}://{host}{path}", model, key_variable, concurrency)
    again = RemoteAddress.parse(address.source, model)
    assert again.endpoint("models") == address.endpoint("models") and is_remote(address.source)
    assert (again.model, again.key_variable, again.concurrency) == (model, key_variable, concurrency)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@host/v1",
        "http://token@host/v1",
        "http://host/v1?api_key=secret",
        "http://host/v1#key=PATH",
        "http:///v1",
        "http://host:99999/v1",
        "http://host:0/v1",
        "http://ho st/v1",
        "http://host/v1\r\nX: 1",
        "http://[::1/v1",
        "file:///etc/passwd",
        "ftp://host/v1",
        "http://host\\@evil/v1",
    ],
)
def test_urls_that_are_refused_and_not_repeated(url):
    with pytest.raises(ModelRefused) as caught:
        RemoteAddress(url, "m")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("name", ["PATH", "LAMPLIGHTER_DATABASE_URL", "LAMPLIGHTER_REMOTE_KEY_", f"{KEY_VARIABLE}\n"])
def test_only_variables_for_keys_can_be_named(name):
    with pytest.raises(ModelRefused):
        RemoteAddress("http://host/v1", "m", name)


@pytest.mark.parametrize(
    ("hosts", "is_allowed"),
    [
        (["*"], True),
        (["gpu-1"], True),
        (["GPU-1:8000"], True),
        (["gpu-*:8000"], True),
        (["gpu-1:80"], False),
        ([], False),
    ],
)
def test_hosts_that_an_operator_allows(hosts, is_allowed):
    spec = ModelSpec("m", "remote", "http://gpu-1:8000/v1", "theirs")
    load = lambda: load_remote(spec, RemoteSettings(remote_hosts=hosts), lambda: None).close()
    if is_allowed:
        load()
    else:
        with pytest.raises(ModelRefused):
            load()
