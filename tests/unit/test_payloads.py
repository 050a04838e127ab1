import json

import pytest

from shared.domain.errors import InvalidRequest
from shared.domain.payloads import MAX_CHOICES, parse_batch_body, parse_payload, unknown_fields, unsupported_parameter

CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
CHAT_BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("endpoint", "change", "param"),
    [
        (CHAT, {"temperature": 2.1}, "temperature"),
        (CHAT, {"temperature": "hot"}, "temperature"),
        (CHAT, {"top_p": 0}, "top_p"),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"n": 129}, "n"),
        (CHAT, {"n": True}, "n"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
        ),
        (CHAT, {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        (CHAT, {"seed": 2**64}, "seed"),
        (CHAT, {"logit_bias": {"5": 101}}, "logit_bias.5"),
        (CHAT, {"top_logprobs": 3}, None),
        (CHAT, {"delay_ms": 60_001}, "delay_ms"),
        (CHAT, {"stream": True}, "stream"),
        (CHAT, {"model": ""}, "model"),
        (CHAT, {"model": 3}, "model"),
        (COMPLETION, {"prompt": ""}, "prompt"),
        (COMPLETION, {"prompt": []}, "prompt"),
        (COMPLETION, {"prompt": [[]]}, "prompt"),
        (COMPLETION, {"prompt": ["a", ""]}, "prompt"),
        (COMPLETION, {"prompt": ["x"] * (MAX_CHOICES + 1)}, "prompt"),
        (COMPLETION, {"prompt": ["x"] * 17, "n": 128}, "prompt"),
        (COMPLETION, {"prompt": [[1]] * 17, "n": 128}, "prompt"),
        (COMPLETION, {"prompt": [""] * 5000, "n": 128}, "prompt"),
        (CHAT, {"metadata": json.loads("[" * 100 + "]" * 100)}, None),
        (COMPLETION, {"prompt": [-1]}, "prompt"),
        (EMBEDDING, {"input": ""}, "input"),
        (EMBEDDING, {"input": []}, "input"),
        (EMBEDDING, {"input": ["x"] * 2049}, "input"),
        (EMBEDDING, {"encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_wrong_values_are_refused_by_name(endpoint, change, param):
    base = {CHAT: CHAT_BODY, COMPLETION: {"model": "m", "prompt": "x"}, EMBEDDING: {"model": "m", "input": "x"}}[
        endpoint
    ]
    with pytest.raises(InvalidRequest) as caught:
        parse_batch_body(endpoint, base | change)
    assert caught.value.status == 400
    if param is None:
        assert caught.value.message
    else:
        assert (caught.value.param or "").startswith(param)


def test_a_missing_field_has_a_code_of_its_own():
    with pytest.raises(InvalidRequest) as caught:
        parse_payload(CHAT, {"model": "m"})
    assert (caught.value.param, caught.value.code) == ("messages", "missing_required_parameter")


def test_unknown_fields_are_ignored_and_null_means_default():
    payload = parse_payload(CHAT, CHAT_BODY | {"brand_new": 1, "temperature": None, "n": None, "stop": None})
    assert payload.temperature == 1.0 and payload.n == 1 and payload.stops == ()


def test_prompt_forms():
    prompts = [
        parse_payload(COMPLETION, {"model": "m", "prompt": p}).prompts for p in ("a", ["a", "b"], [1, 2], [[1], [2]])
    ]
    assert prompts == [["a"], ["a", "b"], [[1, 2]], [[1], [2]]]
    inputs = [
        parse_payload(EMBEDDING, {"model": "m", "input": p}).inputs for p in ("a", ["a", "b"], [1, 2], [[1], [2]])
    ]
    assert inputs == prompts


def test_what_the_engine_cannot_do_is_named():
    assert unsupported_parameter(parse_payload(CHAT, CHAT_BODY | {"tools": [{}]})) == "tools"
    assert unsupported_parameter(parse_payload(CHAT, CHAT_BODY | {"logprobs": True})) is None
    assert unsupported_parameter(parse_payload(CHAT, CHAT_BODY | {"presence_penalty": 0.5})) is None
    assert unsupported_parameter(parse_payload(CHAT, CHAT_BODY | {"response_format": {"type": "text"}})) is None


def test_many_choices_are_served_up_to_the_limit():
    """One call of 15 KB once made 640,000 choices and took a worker's memory."""
    most = parse_payload(COMPLETION, {"model": "m", "prompt": ["x"] * 16, "n": 128})
    assert len(most.prompts) * most.n == MAX_CHOICES
    assert parse_payload(COMPLETION, {"model": "m", "prompt": [1] * 5000, "n": 128}).prompts == [[1] * 5000]
    assert parse_payload(CHAT, CHAT_BODY | {"metadata": json.loads("[" * 99 + "]" * 99)}).n == 1


def test_echo_refuses_many_choices_of_its_own():
    from services.worker.engine.echo import _too_much
    from services.worker.protocol import Request, SamplingParams

    many = Request(id=1, task="complete", prompts=[""] * 5000, params=SamplingParams(n=128))
    assert _too_much(many).status == 400 and _too_much(many).param == "prompt"
    some = Request(id=1, task="complete", prompts=["x"] * 16, params=SamplingParams(n=128))
    assert _too_much(some) is None


def test_unknown_fields_are_named_where_they_stand():
    body = {
        "brand_new": 1,
        "nothing": None,
        "messages": [
            {"role": "user", "content": "a", "x": 1, "refusal": None},
            {"role": "user", "content": [{"type": "text", "text": "b", "y": 1}], "x": 2},
        ],
        "stream_options": {"include_usage": True, "z": 1},
        "tools": [{"type": "function", "function": {"name": "anything"}}],
    }
    assert unknown_fields(CHAT, body) == ["brand_new", "messages[].x", "messages[].content[].y", "stream_options.z"]
    assert unknown_fields(EMBEDDING, {"input": ["a"], "model": "m", "n": 1}) == ["n"]
