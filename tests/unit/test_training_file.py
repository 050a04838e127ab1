"""Lines of training files: what is taken, and what every kind of wrong line is told."""

import io
import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.preprocessor.validation import MAX_COUNTED, form_of, read_lines, validate
from shared.domain.batch_file import MAX_LINE_BYTES
from shared.domain.training_file import (
    MAX_ERRORS,
    MAX_MESSAGES,
    ChatExample,
    Faults,
    PromptExample,
    TrainingFileChecker,
    TrainingFileRefused,
)

USER, ANSWER = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}
GOOD = {"messages": [USER, ANSWER]}
PAIR = {"prompt": "p", "completion": " c"}


def check(line, form=None):
    """Return the example or the fault of one line; `form`: what an earlier line decided."""
    faults = Faults("training_file")
    checker = TrainingFileChecker(faults, form)
    example = checker.add(line if isinstance(line, bytes) else json.dumps(line).encode())
    assert (example is None) == (faults.count == 1)
    return example or faults.errors[0]


def chat(*messages, **more):
    return {"messages": list(messages)} | more


@pytest.mark.parametrize(
    "line",
    [
        GOOD,
        chat({"role": "system", "content": "s"}, {"role": "developer", "content": ""}, USER, ANSWER),
        chat(USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}),
        chat(USER, {"role": "tool", "content": "42", "tool_call_id": "call_1"}, ANSWER),
        chat({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "role": "user"}, ANSWER),
        chat(USER, {"role": "assistant", "content": [{"type": "text", "text": "b"}], "name": "x", "refusal": None}),
        chat(USER, ANSWER | {"tool_calls": None, "weight": None, "name": None}, tools=None, parallel_tool_calls=True),
        PAIR,
        {"prompt": "", "completion": "x"},
    ],
)
def test_lines_that_are_taken(line):
    example = check(line)
    assert isinstance(example, PromptExample if "prompt" in line else ChatExample)


def test_the_parts_of_a_content_are_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check(chat({"role": "user", "content": parts}, ANSWER)).messages[0].text == "ab"


TOOL = {"type": "function", "function": {"name": "f"}}
DEEP = json.loads("[" * 150 + "]" * 150)
REFUSED = [
    (b"", "invalid_json_line", None, "empty"),
    (b"{", "invalid_json_line", None, "JSON"),
    (b"[1]", "invalid_json_line", None, "object"),
    (b"\xef\xbb\xbf{}", "invalid_json_line", None, "byte order mark"),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not_utf8", None, "byte 44"),
    (json.dumps(GOOD).encode("utf-16"), "not_utf8", None, "byte 1 "),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json_line", None, "surrogate"),
    ({"x": DEEP} | GOOD, "nested_too_deep", None, "100"),
    (b'{"messages": ' + b"[" * 100_000, "invalid_json_line", None, ""),
    ({"text": "t"}, "missing_field", "messages", "prompt and completion"),
    ({}, "missing_field", "messages", ""),
    (GOOD | {"extra": 1}, "unknown_field", "extra", ""),
    (GOOD | {"a\0b": 1}, "unknown_field", "'a\\x00b'", ""),
    (GOOD | PAIR, "unknown_field", "prompt", ""),
    (GOOD | {"tools": [TOOL]}, "tools_not_supported", "tools", "version"),
    (GOOD | {"functions": [TOOL]}, "tools_not_supported", "functions", "version"),
    (GOOD | {"parallel_tool_calls": "yes"}, "invalid_value", "parallel_tool_calls", "true or false"),
    ({"messages": "x"}, "invalid_value", "messages", "list"),
    ({"messages": []}, "invalid_n_messages", "messages", "0"),
    (chat(*[USER, ANSWER] * (MAX_MESSAGES // 2), ANSWER), "invalid_n_messages", "messages", f"{MAX_MESSAGES + 1}"),
    (chat("x"), "invalid_message", "messages[0]", "object"),
    (chat(USER, {"content": "x"}), "invalid_role", "messages[1].role", "needs"),
    (chat(USER, {"role": "robot", "content": "x"}), "invalid_role", "messages[1].role", "robot"),
    (chat({"role": 1, "content": "x"}), "invalid_role", "messages[0].role", "1"),
    (chat({"role": "function", "content": "x"}, ANSWER), "tools_not_supported", "messages[0].role", ""),
    (chat(USER, {"role": "assistant", "tool_calls": [TOOL]}), "tools_not_supported", "messages[1].tool_calls", ""),
    (chat(USER | {"weight": 1}, ANSWER), "unknown_field", "messages[0].weight", ""),
    (chat(USER, ANSWER | {"audio": {}}), "unknown_field", "messages[1].audio", ""),
    (chat(USER, {"role": "assistant"}), "missing_content", "messages[1].content", ""),
    (chat({"role": "user", "content": None}, ANSWER), "missing_content", "messages[0].content", ""),
    (chat({"role": "user", "content": 1}, ANSWER), "invalid_content", "messages[0].content", "text"),
    (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}, ANSWER),
        "invalid_content",
        "messages[0].content[0].type",
        "text",
    ),
    (
        chat({"role": "user", "content": [{"type": "text"}]}, ANSWER),
        "invalid_content",
        "messages[0].content[0].text",
        "",
    ),
    (
        chat({"role": "user", "content": [{"type": "text", "text": "t", "x": 1}]}, ANSWER),
        "unknown_field",
        "messages[0].content[0].x",
        "",
    ),
    (chat(USER | {"name": 1}, ANSWER), "invalid_value", "messages[0].name", "string"),
    (chat(USER, ANSWER | {"weight": 2}), "invalid_weight", "messages[1].weight", "2"),
    (chat(USER, ANSWER | {"weight": 0.5}), "invalid_weight", "messages[1].weight", "0.5"),
    (chat(USER, ANSWER | {"weight": True}), "invalid_weight", "messages[1].weight", "True"),
    (chat(USER, ANSWER | {"refusal": "no"}), "invalid_value", "messages[1].refusal", "content"),
    (chat(USER, {"role": "assistant", "content": ""}), "empty_assistant_message", "messages[1].content", ""),
    (chat(USER, {"role": "assistant", "content": " \n"}), "empty_assistant_message", "messages[1].content", ""),
    (chat(USER, {"role": "assistant", "content": []}), "empty_assistant_message", "messages[1].content", ""),
    (chat(USER, ANSWER, USER), "last_message_not_assistant", "messages[2].role", "user"),
    (chat(USER), "last_message_not_assistant", "messages[0].role", ""),
    (chat(USER, ANSWER | {"weight": 0}), "nothing_to_train", "messages", "weight 0"),
    ({"prompt": "p"}, "missing_field", "completion", ""),
    ({"completion": "c"}, "missing_field", "prompt", ""),
    ({"prompt": 1, "completion": "c"}, "invalid_value", "prompt", "string"),
    ({"prompt": "p", "completion": " "}, "empty_completion", "completion", ""),
    (PAIR | {"id": 1}, "unknown_field", "id", ""),
    (
        {"input": GOOD, "preferred_completion": [ANSWER], "non_preferred_completion": [ANSWER]},
        "dpo_not_supported",
        "input",
        "DPO",
    ),
]


@pytest.mark.parametrize(("line", "code", "param", "said"), REFUSED)
def test_every_wrong_line_is_named(line, code, param, said):
    fault = check(line)
    assert (fault.code, fault.line, fault.param) == (code, 1, param)
    assert said in fault.message and fault.message[0].isupper() and fault.message.endswith(".")


@pytest.mark.parametrize(("line", "code", "param", "said"), REFUSED)
def test_a_wrong_line_is_told_alike_wherever_it_stands(line, code, param, said):
    """After a good line the quick way is taken first."""
    form = PromptExample if isinstance(line, dict) and "prompt" in line and "messages" not in line else ChatExample
    if isinstance(line, dict) and list(line) == ["completion"]:
        form = PromptExample
    fault = check(line, form)
    assert (fault.code, fault.param) == (code, param)


def test_one_file_has_one_form():
    faults = Faults("training_file")
    checker = TrainingFileChecker(faults)
    for line in (GOOD, PAIR, GOOD):
        checker.add(json.dumps(line).encode())
    (error,) = faults.errors
    assert (error.code, error.line) == ("mixed_forms", 2) and "prompt and completion" in error.message


def test_the_form_is_that_of_the_first_example_even_a_faulty_one():
    faults = Faults("training_file")
    checker = TrainingFileChecker(faults)
    for line in (b"nonsense", json.dumps({"prompt": 1}).encode(), json.dumps(PAIR).encode(), json.dumps(GOOD).encode()):
        checker.add(line)
    assert [(error.line, error.code) for error in faults.errors] == [
        (1, "invalid_json_line"),
        (2, "invalid_value"),
        (4, "mixed_forms"),
    ]


def refused(content, least=10, **more):
    with pytest.raises(TrainingFileRefused) as caught:
        validate(io.BytesIO(content), Faults("training_file"), least, **more)
    return caught.value


def lines(*entries):
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def test_a_file_has_ten_examples():
    assert validate(io.BytesIO(lines(*[GOOD] * 10)), Faults("training_file"), 10) is ChatExample
    for content, count in ((b"", "0"), (lines(*[GOOD] * 9), "9")):
        error = refused(content)
        assert error.job_error() == {"code": "invalid_n_examples", "param": "training_file", "message": error.message}
        assert f"there are {count}" in error.message and error.errors[0].line is None


def test_errors_are_listed_up_to_a_limit_and_counted():
    error = refused(lines(*[GOOD] * 5, *[chat(USER)] * 300))
    assert len(error.errors) == MAX_ERRORS and error.count == 300
    assert [each.line for each in error.errors] == [*range(6, 6 + MAX_ERRORS)]
    assert error.message.startswith(
        "The training file has 300 faulty lines. Line 6 (messages[0].role): The last message"
    )


def test_a_file_of_newlines_is_given_up():
    assert refused(b"\n" * (MAX_COUNTED + 50_000)).count == MAX_COUNTED


def test_a_validation_file_has_the_training_files_form():
    error = refused(lines(PAIR), least=1, expected=ChatExample)
    assert error.code == "mixed_forms" and "training file has the form chat" in error.message


def test_lines_are_cut_whatever_ends_them_and_never_held_beyond_the_limit():
    big = b"x" * MAX_LINE_BYTES
    content = b"a\r\n\nb\n" + big + b"\n" + big + b"\r\n" + big + b"x\n" + big * 3 + b"\nlast"
    got = list(read_lines(io.BytesIO(content)))
    assert got == [b"a", b"", b"b", big, big, None, None, b"last"]
    assert list(read_lines(io.BytesIO(b"x" * 3_000_000))) == [None]
    error = refused(lines(GOOD) + big * 2 + b"\n" + lines(*[GOOD] * 10))
    assert [(each.code, each.line) for each in error.errors] == [("line_too_large", 2)]


def test_the_form_of_a_good_file_is_found_by_its_first_line():
    assert form_of(io.BytesIO(lines(PAIR, PAIR))) is PromptExample


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user", "assistant", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "weight", "messages", "prompt", "completion", "type", "text", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.one_of(st.binary(max_size=60), VALUES.map(lambda value: json.dumps(value).encode())),
    st.sampled_from([None, ChatExample, PromptExample]),
)
@settings(max_examples=500)
def test_no_line_is_beyond_judging(line, form):
    """Whatever a line holds, it is taken or refused with a reason that can be stored; what is taken is JSON."""
    outcome = check(line, form)
    if isinstance(outcome, ChatExample | PromptExample):
        orjson.loads(line)
    else:
        stored = json.dumps(outcome.as_dict())
        assert outcome.message and "\\u0000" not in stored and "\\ud8" not in stored


@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_texts_come_through_unchanged(texts):
    messages = [{"role": "user", "content": text} for text in texts]
    example = check(chat(*messages, ANSWER))
    assert [message.text for message in example.messages] == [*texts, "an answer"]
