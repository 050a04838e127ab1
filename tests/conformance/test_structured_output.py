"""Answers that follow a JSON schema: always valid, whatever the weights say, and refused where they cannot be."""

import json
import random

import jsonschema_rs
import pytest

from services.worker.protocol import ModelSpec, Request, SamplingParams
from tests.support.generation import run, trained_tokenizer
from tests.support.models import make_tiny_llama
from tests.support.schemas import random_schema

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

CONTEXT = 1024


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny model on one thread: with more, what a step takes is mostly how long they wait for each other."""
    import torch

    from services.worker.engine.loading import load_model

    path = make_tiny_llama(tmp_path_factory.mktemp("llama"), max_position_embeddings=CONTEXT)
    spec = ModelSpec("tiny", "causal_lm", str(path), dtype="float32", context_length=CONTEXT)
    engine, threads = load_model(spec, "cpu:0"), torch.get_num_threads()
    torch.set_num_threads(1)
    yield engine
    torch.set_num_threads(threads)
    engine.close()


def request(number, schema, **params):
    chosen = {"max_tokens": 1000, "temperature": 1.0, "seed": number} | params
    return Request(number, "complete", prompts=["Say"], params=SamplingParams(schema=json.dumps(schema), **chosen))


def assert_valid(answers, schemas):
    for number, schema in schemas.items():
        assert answers[number].fault is None, (schema, answers[number].fault)
        ((text, reason),) = answers[number].choices
        assert reason == "stop", (schema, text)
        jsonschema_rs.validate(schema, json.loads(text), validate_formats=True)
    assert len({answers[number].choices[0][0] for number in schemas}) > len(schemas) / 2


def test_every_answer_is_valid(llama):
    """Five hundred schemas at once, each of its own: the whole of what the engine promises of them."""
    generator = random.Random(4)
    schemas = {number: random_schema(generator) for number in range(500)}
    assert_valid(run(llama, [request(number, schema) for number, schema in schemas.items()]), schemas)


def test_answers_are_valid_where_tokens_are_of_several_bytes(tmp_path):
    """A vocabulary in which `":"` and `},{` are one token each, and words and half characters are others."""
    from services.worker.engine.loading import load_model

    generator = random.Random(5)
    schemas = {number: random_schema(generator) for number in range(60)}
    make_tiny_llama(tmp_path, vocab_size=1024, max_position_embeddings=CONTEXT)
    tokenizer = trained_tokenizer([json.dumps(schema, ensure_ascii=False) for schema in schemas.values()] * 3, 1024)
    tokenizer.save_pretrained(tmp_path)
    spec = ModelSpec("words", "causal_lm", str(tmp_path), dtype="float32", context_length=CONTEXT)
    engine = load_model(spec, "cpu:0")
    answers = run(engine, [request(number, schema) for number, schema in schemas.items()])
    assert_valid(answers, schemas)
    written = sum(len(answer.choices[0][0].encode()) for answer in answers.values())
    assert sum(answer.completion_tokens for answer in answers.values()) < 0.8 * written


def test_an_answer_does_not_depend_on_others_and_each_choice_follows(llama):
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": "^[a-z]{8}$"}}, "required": ["x"],
              "additionalProperties": False}  # fmt: skip
    alone = run(llama, [request(1, schema, n=3, seed=9)])[1].choices
    crowd = [request(1, schema, n=3, seed=9), *(request(i, {"type": "boolean"}) for i in range(2, 20)),
             Request(30, "complete", prompts=["free"], params=SamplingParams(max_tokens=9, seed=1))]  # fmt: skip
    answers = run(llama, crowd)
    assert answers[1].choices == alone and len({text for text, _ in alone}) == 3
    assert all(set(json.loads(text)) == {"x"} for text, _ in alone)
    assert {answers[i].choices[0][0] for i in range(2, 20)} <= {"true", "false"}


def test_neither_a_least_length_nor_ignore_eos_breaks_a_schema(llama):
    answer = run(llama, [request(1, {"const": "yes"}, min_tokens=50, ignore_eos=True, logit_bias={5: 100.0})])[1]
    assert answer.choices == [('"yes"', "stop")]


@pytest.mark.parametrize("schema", [{"type": "wrong"}, {"type": "array", "minItems": 3, "maxItems": 1}])
def test_a_schema_that_cannot_be_followed_is_refused_by_name(llama, schema):
    answer = run(llama, [request(1, schema)])[1]
    assert (answer.fault.status, answer.fault.param) == (400, "response_format")
    assert run(llama, [request(2, {"const": 1})])[2].choices == [("1", "stop")]


def test_an_answer_cut_short_says_so(llama):
    (choice,) = run(llama, [request(1, {"type": "string", "pattern": "^[a-z]{40}$"}, max_tokens=5)])[1].choices
    assert choice[1] == "length" and len(choice[0]) == 5


def test_a_schema_that_fails_on_the_way_fails_its_own_request_and_nothing_is_called_whole(llama):
    """A reference to itself is taken, and then nothing can follow: the library stops, which is no end of an answer."""
    hostile = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    answers = run(llama, [request(1, hostile, n=3), request(2, {"const": "yes"})])
    assert (answers[1].fault.status, answers[1].fault.param) == (400, "response_format"), answers[1]
    assert answers[2].choices == [('"yes"', "stop")]
    llama.check_integrity()
    assert run(llama, [request(4, {"const": 4})])[4].choices == [("4", "stop")]


def test_a_schema_too_large_to_be_read_between_steps_is_refused(llama):
    answer = run(llama, [request(1, {"enum": [f"value {i}" * 5 for i in range(5000)]}, n=100)])[1]
    assert answer.fault.status == 400 and "characters" in answer.fault.message
