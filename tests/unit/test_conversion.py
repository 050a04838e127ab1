"""Lines that a schedule's job reads, made of a batch's questions and answers."""

import json

import pytest

from services.preprocessor.conversion import answered_text, asking, converted, whole_lines
from shared.domain.job import JobKind

CHAT = "/v1/chat/completions"
ASKED = {"model": "m", "n": 2, "seed": 2**70, "messages": [{"role": "user", "content": "why?"}]}


def made(kind, request, answer="so", follow_up=None):
    line = converted(JobKind(kind), CHAT, "a", request, answer, follow_up)
    return None if line is None else json.loads(line)


def test_an_answer_is_gone_on_from_with_all_that_was_asked_for_besides():
    line = made("batch", ASKED, follow_up="sure?")
    assert (line["custom_id"], line["url"], line["body"]["seed"]) == ("a", CHAT, 2**70) and "n" not in line["body"]
    assert [turn["content"] for turn in line["body"]["messages"]] == ["why?", "so", "sure?"]


def test_an_answer_becomes_an_example_and_a_row():
    assert [turn["role"] for turn in made("fine_tuning", ASKED)["messages"]] == ["user", "assistant"]
    assert made("fine_tuning", {"prompt": "a b"}) == {"prompt": "a b", "completion": "so"}
    assert made("training", {"prompt": "a b"}) == {"custom_id": "a", "text": "a b", "answer": "so"}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": None}, {"type": "text", "text": "b"}]
    assert made("training", {"messages": [{"role": "user", "content": parts}]})["text"] == "ab"


@pytest.mark.parametrize("request_body", [{"prompt": ["a", "b"]}, {"prompt": [1, 2]}, {"input": "a"}])
def test_answers_to_something_else_than_one_text_are_left_out(request_body):
    assert made("fine_tuning", request_body) is made("training", request_body) is None


def test_texts_of_answers():
    assert answered_text({"choices": [{"message": {"content": "a"}}]}) == "a"
    assert answered_text({"choices": [{"text": "b"}]}) == "b"
    assert answered_text({"choices": [{"message": {"content": None}}]}) is None is answered_text({"data": []})


def test_a_line_asks_another_model_and_is_else_as_it_was():
    line = b'{"custom_id": "\xc3\xa4", "body": {"model": "m", "seed": 1180591620717411303424, "x": "\\ud800"}}\n'
    asked = json.loads(asking(line, "other"))
    assert asked["custom_id"] == "\u00e4"
    assert asked["body"] == {"model": "other", "seed": 1180591620717411303424, "x": "\ud800"}
    for other in (b"no json\n", b"[1]\n", b'{"body": 3}\n'):
        assert asking(other, "other") == other


def test_lines_are_whole_however_their_bytes_come():
    assert list(whole_lines([b"a\nb", b"c\n", b"d"])) == [b"a\n", b"bc\n", b"d\n"]
    assert list(whole_lines([])) == []
    long = b"x" * 3_000_000
    assert b"".join(whole_lines([long, b"y\nz"])) == long + b"y\nz\n"
