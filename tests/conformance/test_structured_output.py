"""Answers that follow a JSON schema: always valid, whatever the weights say, and refused where they cannot be."""

import json
import random

import jsonschema_rs
import pytest

from services.worker.protocol import ModelSpec, Request, SamplingParams
from tests.conformance.test_engines import run

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def llama(tiny_llama):
    from services.worker.engine.loading import load_model

    engine = load_model(ModelSpec("tiny", "causal_lm", str(tiny_llama), dtype="float32", context_length=256), "cpu:0")
    yield engine
    engine.close()


def random_schema(generator, depth=2):
    """A bounded schema: an answer to it ends by itself, even from random weights."""
    kinds = ["integer", "boolean", "null", "enum", "string", *(["array", "object"] if depth else [])]
    kind = generator.choice(kinds)
    if kind == "enum":
        return {"enum": generator.sample(["red", "grün", "雪", 4, None, True], generator.randint(1, 4))}
    if kind == "integer":
        low = generator.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + generator.randint(0, 200)}
    if kind == "string":
        return {"type": "string", "pattern": f"^[a-d]{{0,{generator.randint(1, 6)}}}$"}
    if kind == "array":
        low = generator.randint(0, 2)
        return {"type": "array", "items": random_schema(generator, depth - 1), "minItems": low, "maxItems": low + 1}
    if kind == "object":
        names = generator.sample("abcdef", generator.randint(1, 3))
        properties = {name: random_schema(generator, depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    return {"type": kind}


def request(number, schema, **params):
    chosen = {"max_tokens": 200, "temperature": 1.0, "seed": number} | params
    return Request(number, "complete", prompts=["Say"], params=SamplingParams(schema=json.dumps(schema), **chosen))


def test_every_answer_is_valid(llama):
    generator = random.Random(4)
    schemas = {number: random_schema(generator) for number in range(120)}
    answers = run(llama, [request(number, schema) for number, schema in schemas.items()])
    for number, schema in schemas.items():
        ((text, reason),) = answers[number].choices
        assert reason == "stop", (schema, text)
        jsonschema_rs.validate(schema, json.loads(text))
    assert len({answers[number].choices[0][0] for number in schemas}) > 60


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
