import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.ingest import LineReader
from shared.domain.batch_file import MAX_LINE_BYTES, MAX_LINES, batch_errors, batch_model, render_line
from tests.support.batches import CHAT, chat_line, chat_lines, jsonl


def check(content: bytes, endpoint: str = CHAT, chunk: int = 1 << 20):
    reader = LineReader()
    for start in range(0, len(content), chunk):
        reader.feed(content[start : start + chunk])
    reader.finish()
    summary = json.loads(json.dumps(reader.checker.summary()))
    return summary, batch_errors(summary, endpoint), reader


def codes(content: bytes):
    return [(error["code"], error["line"]) for error in check(content)[1]]


def test_a_good_file_has_no_errors_and_one_model():
    summary, errors, _ = check(jsonl(chat_lines(10)))
    assert errors == [] and summary["lines"] == 10 and batch_model(summary) == "echo"


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (b"not json", ("invalid_json_line", 2)),
        (b"", ("invalid_json_line", 2)),
        (b'"a string"', ("invalid_json_line", 2)),
        (b'{"custom_id": "\xff\xfe"}', ("invalid_json_line", 2)),
        (b"[" * 100_000, ("invalid_json_line", 2)),
        (chat_line("line-0"), ("duplicate_custom_id", 2)),
        (chat_line("x", url="/v1/embeddings"), ("url_mismatch", 2)),
        ({**chat_line("x"), "method": "GET"}, ("url_mismatch", 2)),
        ({**chat_line("x"), "custom_id": 7}, ("invalid_json_line", 2)),
        ({**chat_line("x"), "custom_id": "a\x00b"}, ("invalid_json_line", 2)),
        ({**chat_line("x"), "body": []}, ("invalid_json_line", 2)),
        (chat_line("x", model="other"), ("model_mismatch", 2)),
        (chat_line("x", "y" * (MAX_LINE_BYTES + 1)), ("line_too_large", 2)),
    ],
)
def test_each_fault_is_named_with_its_line(second, expected):
    assert codes(jsonl([chat_line("line-0"), second, chat_line("line-2")])) == [expected]


def test_whole_file_faults():
    assert codes(b"") == [("empty_file", None)]
    line = json.dumps(chat_line("a")).encode()
    many = b"\n".join([line] * (MAX_LINES + 1))
    assert codes(many)[0] == ("too_many_tasks", None)
    assert len(check(many)[2].offsets) <= MAX_LINES + 2


def test_errors_are_bounded():
    assert len(codes(b"x\n" * 5000)) == 100
    summary, errors, _ = check(jsonl([chat_line(str(i), url=f"/{i}", model=f"m{i}") for i in range(5000)]))
    assert len(errors) == 100 and len(summary["urls"]) <= 101 and len(summary["models"]) <= 101


@given(
    st.lists(st.one_of(st.binary(max_size=40).filter(lambda b: b"\n" not in b and b"\r" not in b)), max_size=30),
    st.integers(1, 17),
    st.booleans(),
)
@settings(max_examples=200)
def test_lines_and_offsets_do_not_depend_on_how_the_stream_is_cut(lines, chunk, ends_with_newline):
    content = b"\n".join(lines) + (b"\n" if ends_with_newline and lines else b"")
    _, _, reader = check(content, chunk=chunk)
    expected = content.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    # A file of one empty line without its newline is an empty file.
    assert reader.checker.lines == len(expected)
    cut = [content[a:b].removesuffix(b"\n") for a, b in zip(reader.offsets, reader.offsets[1:])]
    assert cut == expected


def test_rendered_lines_are_json_in_openai_shape():
    done = json.loads(render_line("batch_req_1", 'a"b', 200, '{"x":1}', None))
    assert done == {
        "id": "batch_req_1",
        "custom_id": 'a"b',
        "error": None,
        "response": {"status_code": 200, "request_id": "batch_req_1", "body": {"x": 1}},
    }
    failed = json.loads(render_line("batch_req_1", "a", None, None, '{"code":"line_failed"}'))
    assert failed["response"] is None and failed["error"] == {"code": "line_failed"}


def test_a_nul_is_kept_from_postgres_and_is_no_ones_name():
    lines = [chat_line("a", url=CHAT + "\0"), chat_line("b", model="echo\0")]
    for line, expected in zip(lines, (["url_mismatch"], [])):
        summary, errors, _ = check(jsonl([line]))
        assert "\0" not in json.dumps(summary) and "\\u0000" not in json.dumps(summary)
        assert [error["code"] for error in errors] == expected
    assert batch_model(summary) not in ("echo", None)  # its line goes to the error file: there is no such model


def test_lines_beyond_the_limit_are_only_counted():
    """A file of newlines: 200 MB of them once held the interpreter for 50 s."""
    import time

    started = time.monotonic()
    reader = LineReader()
    for _ in range(64):
        reader.feed(b"\n" * 2**20)
    reader.feed(b"the last, not ended")
    reader.finish()
    assert time.monotonic() - started < 5
    assert reader.checker.lines == 64 * 2**20 + 1 and reader.offsets[-1] == 64 * 2**20 + 19
    assert batch_errors(reader.checker.summary(), CHAT)[0]["code"] == "too_many_tasks"


@pytest.mark.parametrize("chunk", [7, 1000, 1 << 20])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n", b"x"])
def test_counting_does_not_depend_on_how_the_stream_is_cut(monkeypatch, chunk, ending):
    monkeypatch.setattr("shared.domain.batch_file.MAX_LINES", 10)
    content = b"\n".join([b"some line"] * 300) + ending
    reader = check(content, chunk=chunk)[2]
    assert reader.checker.lines == len(content.split(b"\n")) - (ending.endswith(b"\n"))
    assert reader.offsets[-1] == len(content) and len(reader.offsets) == 12


def test_faults_of_joined_files_are_those_of_each():
    summary = {
        "lines": 9,
        "urls": {"/v1/other": [6]},
        "models": {"a": 1, "b": 4},
        "errors": [],
        "parts": [[1, "f1"], [4, "zz"], [4, "f2"]],
    }
    found = [
        (error["code"], error["line"], error["message"][:4])
        for error in batch_errors(summary | {"most_lines": 9}, CHAT)
    ]
    assert found == [("model_mismatch", 1, "f2: "), ("url_mismatch", 3, "f2: ")]
    (whole, *_) = batch_errors(summary | {"most_lines": 8}, CHAT)
    assert (whole["code"], whole["line"]) == ("too_many_tasks", None)
