import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplighter.doctor import bfloat16
from lamplighter.policy import MAX_KEY_CHARACTERS, LineSplitter, Outage, file_key


def lines_of(blocks):
    splitter = LineSplitter()
    lines = [line for block in blocks for line in splitter.feed(block)]
    return lines + splitter.finish()


@given(st.lists(st.text()), st.lists(st.integers(0, 400)), st.booleans())
def test_lines_are_the_same_wherever_the_blocks_are_cut(texts, cuts, ends_in_newline):
    content = "\n".join(json.dumps(text, ensure_ascii=False) for text in texts).encode()
    content += b"\n" * ends_in_newline
    edges = [0, *sorted(cuts), len(content)]
    blocks = [content[start:end] for start, end in zip(edges, edges[1:])]
    assert [json.loads(line) for line in lines_of(blocks)] == texts


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_only_a_line_feed_ends_a_line(separator):
    content = f"a{separator}b\nc\n".encode()
    assert lines_of([content]) == [f"a{separator}b".encode(), b"c"]


def test_an_outage_is_borne_with_growing_pauses_up_to_its_limit():
    outage, now, pauses = Outage(60), 1000.0, []
    while (pause := outage.pause_seconds(now)) is not None:
        pauses.append(pause)
        now += pause
    assert pauses[:6] == [0.5, 1, 2, 4, 8, 10] and max(pauses) == 10 and sum(pauses) == 60


def test_an_answer_ends_the_outage():
    outage = Outage(10)
    assert outage.pause_seconds(0) == 0.5
    assert outage.pause_seconds(9) == 1
    outage.end()
    assert outage.pause_seconds(100) == 0.5
    assert outage.pause_seconds(109.9) is not None and outage.pause_seconds(110) is None


def test_no_patience_is_none():
    assert Outage(0).pause_seconds(5) is None


@given(st.text(min_size=1, max_size=MAX_KEY_CHARACTERS))
def test_a_files_key_is_its_own_stable_and_short_enough(key):
    assert file_key(key) == file_key(key) != key and len(file_key(key)) <= MAX_KEY_CHARACTERS


def test_the_key_of_a_file_is_derived_and_only_from_a_key():
    assert file_key("night") == "night:file" and file_key(None) is None


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n", "native"),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", "native"),
        ("Features\t: fp asimd bf16\n", "native"),
        ("model name\t: Xeon avx512_bf16\nflags\t\t: fpu avx2 avx512f\n", "emulated, slow"),
        ("", "unknown"),
    ],
)
def test_bfloat16_units_are_read_from_the_flags(cpuinfo, found):
    assert bfloat16(cpuinfo) == found
