"""Log-probabilities and response formats over HTTP, as the official SDK sees them."""

import openai
import pytest

from services.worker.protocol import TokenLogprob
from services.worker.translation import logprobs_object
from shared.domain.payloads import parse_payload

MESSAGES = [{"role": "user", "content": "Good evening, dear lamplighter"}]


def test_chat_logprobs_plain_streamed_and_in_usage(sdk):
    answer = sdk.chat.completions.create(model="echo", messages=MESSAGES, logprobs=True, top_logprobs=1)
    content = answer.choices[0].logprobs.content
    assert "".join(each.token for each in content) == answer.choices[0].message.content
    assert len(content) == 4 and content[0].bytes == list(b"Good") and content[0].top_logprobs[0].logprob == 0
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    streamed = [
        each
        for chunk in sdk.chat.completions.create(model="echo", messages=MESSAGES, logprobs=True, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for each in chunk.choices[0].logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in content]
    assert sdk.chat.completions.create(model="echo", messages=MESSAGES).choices[0].logprobs is None


def test_completion_logprobs_count_the_text(sdk):
    whole = sdk.completions.create(model="echo", prompt="a bc def", logprobs=1).choices[0]
    assert whole.logprobs.tokens == ["a", " bc", " def"] and whole.logprobs.text_offset == [0, 1, 4]
    pieces = [
        (offset, token)
        for chunk in sdk.completions.create(model="echo", prompt="a bc def", logprobs=1, stream=True)
        if chunk.choices[0].logprobs
        for offset, token in zip(chunk.choices[0].logprobs.text_offset, chunk.choices[0].logprobs.tokens)
    ]
    assert pieces == list(zip(whole.logprobs.text_offset, whole.logprobs.tokens))
    assert whole.logprobs.top_logprobs[1] == {" bc": 0.0}


def test_the_object_has_the_drawn_token_beside_the_likeliest():
    payload = parse_payload("/v1/completions", {"model": "m", "prompt": "x", "logprobs": 2})
    token = TokenLogprob("c", -3.0, [TokenLogprob("a", -0.5), TokenLogprob("b", -1.5)], b"c")
    made = logprobs_object(payload, [token, token], 7)
    assert made["top_logprobs"] == [{"a": -0.5, "b": -1.5, "c": -3.0}] * 2 and made["text_offset"] == [7, 8]


@pytest.mark.parametrize(
    "wrong",
    [{"type": "json_schema"}, {"type": "text", "json_schema": {"name": "x", "schema": {}}}, {"type": "xml"},
     {"type": "json_schema", "json_schema": {"schema": {}}}],
)  # fmt: skip
def test_response_formats_are_checked_before_anything_runs(sdk, wrong):
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(model="echo", messages=MESSAGES, response_format=wrong)
    assert refused.value.param.startswith("response_format")
