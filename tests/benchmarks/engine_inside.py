"""Rows 5, 8 and 9: what an engine in this process does with prefixes, beside its forward pass, and with schemas."""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.engine_sides import CORES
from tests.benchmarks.engine_workloads import FIRST_TOKEN, VOCABULARY, make_model
from tests.benchmarks.table import Table

SEQUENCES, RANDOM_SCHEMAS = 48, 500
SYSTEM_TOKENS, OWN_TOKENS = 512, 16
DTYPES = ("float32", "bfloat16")
OVERHEAD_BAR, SCHEMA_BAR = 0.10, 0.85
WORD = {"type": "string", "pattern": "^[a-z ]{8,30}$"}
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["red", "green", "a longer name", None]},
        "price": {"type": "number"},
        "tags": {"type": "array", "items": WORD},
    },
    "required": ["name", "kind", "price", "tags"],
    "additionalProperties": False,
}
LONG_SCHEMAS = (
    {"type": "string", "minLength": 2000},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99999}, "minItems": 500},
    {"type": "array", "items": WORD, "minItems": 200},
    {"type": "array", "items": ITEM, "minItems": 200},
    {"type": "array", "items": {"anyOf": [ITEM, {"type": "boolean"}, WORD]}, "minItems": 500},
    {"type": "object", "properties": {"summary": {"type": "string", "minLength": 2000}}, "required": ["summary"]},
)
"""No answer to one of them can end within the tokens that are measured: both sides generate the same number."""


@contextmanager
def engine_in_here(dtype: str, *, is_quick: bool, tokenizer=None) -> Iterator:
    """Yield a Llama's engine on all cores, with a tokenizer of one's own."""
    import torch

    from services.worker.engine.loading import load_model
    from services.worker.protocol import ModelSpec

    torch.set_num_threads(CORES)
    with tempfile.TemporaryDirectory(prefix="lamplighter-bench-inside-") as name:
        model = make_model("llama", Path(name), dtype, is_quick=is_quick)
        if tokenizer is not None:
            tokenizer.save_pretrained(model)
        engine = load_model(ModelSpec("bench", "causal_lm", str(model), dtype=dtype, context_length=2048), "cpu:0")
        yield engine
        engine.check_integrity()
        engine.close()


def drive(engine, requests) -> tuple[float, int]:
    """Answer the requests; return (seconds, tokens)."""
    started, tokens, done = time.perf_counter(), 0, 0
    for request in requests:
        engine.add(request)
    while done < len(requests):
        for response in engine.step().responses:
            assert response.fault is None, response.fault
            assert all(reason == "length" for _, reason in response.choices), "an answer ended before its length"
            done, tokens = done + 1, tokens + response.completion_tokens
    return time.perf_counter() - started, tokens


def batch(tokens: int, number: int, schemas: list[str | None] | None = None, temperature: float = 0.0) -> list:
    """Return SEQUENCES requests whose prompts no other `number` has; schemas are taken in turn."""
    from services.worker.protocol import Request, SamplingParams

    made = []
    for i in range(SEQUENCES):
        schema = schemas[i % len(schemas)] if schemas else None
        params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=i, ignore_eos=True, schema=schema)
        prompt = [FIRST_TOKEN + (number * 7919 + i * 97 + k) % (VOCABULARY - FIRST_TOKEN) for k in range(24)]
        made.append(Request(i, "complete", prompts=[prompt], params=params))
    return made


def bench_prefix(table: Table, *, is_quick: bool = False) -> None:
    """64 requests with one system prompt of 512 tokens, and the same of another tenant."""
    from services.worker.protocol import Request, SamplingParams

    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    system = [FIRST_TOKEN + i * 7 % 8000 for i in range(SYSTEM_TOKENS)]
    prompts = [[*system, *(FIRST_TOKEN + (i * 31 + k) % 8000 for k in range(OWN_TOKENS))] for i in range(64)]
    computed = []
    with engine_in_here("float32", is_quick=is_quick) as engine:
        for namespace in ("one", "two"):
            before = engine.scheduler.prompt_tokens_computed
            drive(engine, [Request(i, "complete", prompts=[p], params=params, namespace=namespace)
                           for i, p in enumerate(prompts)])  # fmt: skip
            computed.append(engine.scheduler.prompt_tokens_computed - before)
    unique = SYSTEM_TOKENS + len(prompts) * OWN_TOKENS
    what = "64 requests with one system prompt of 512 tokens: prompt tokens computed ÷ unique ones"
    table.add("engine-5a", what, computed[0] / unique, "", "≤ 1.1", computed[0] <= 1.1 * unique, computed)
    what = "the same prompts of another tenant afterwards ÷ unique ones"
    table.add("engine-5b", what, computed[1] / unique, "", "≥ 1", computed[1] >= unique, computed)


def bench_overhead(table: Table, rounds: int, *, is_quick: bool = False) -> None:
    """The share of a step's time that is outside the forward pass, 48 sequences."""
    for dtype in DTYPES:
        _bench_overhead(table, dtype, rounds, is_quick=is_quick)


def _bench_overhead(table: Table, dtype: str, rounds: int, *, is_quick: bool) -> None:
    with engine_in_here(dtype, is_quick=is_quick) as engine:
        forward, spent = engine._decoder.forward, []

        def timed(*arguments):
            started = time.perf_counter()
            out = forward(*arguments)
            spent.append(time.perf_counter() - started)
            return out

        engine._decoder.forward = timed
        shares = []
        for number in range(rounds + 1):
            spent.clear()
            seconds, _ = drive(engine, batch(64, number))
            shares.append(1 - sum(spent) / seconds)
    share = statistics.median(shares[1:])  # the first round loads code
    what = f"step time outside the forward pass, {SEQUENCES} sequences, {dtype}"
    table.add(f"engine-8-{dtype}", what, share, "", f"≤ {OVERHEAD_BAR}", share <= OVERHEAD_BAR, shares[1:])


def _bench_validity(table: Table, count: int) -> None:
    """Answer as many random schemas at once, and check every answer by another library."""
    import jsonschema_rs

    from services.worker.engine.loading import load_model
    from services.worker.protocol import ModelSpec, Request, SamplingParams
    from tests.support.generation import run
    from tests.support.models import make_tiny_llama
    from tests.support.schemas import random_schema

    generator = random.Random(11)
    schemas = [random_schema(generator) for _ in range(count)]
    with tempfile.TemporaryDirectory(prefix="lamplighter-bench-schemas-") as name:
        path = make_tiny_llama(Path(name), max_position_embeddings=1024)
        engine = load_model(ModelSpec("tiny", "causal_lm", str(path), context_length=1024), "cpu:0")
        wanted = [
            Request(i, "complete", prompts=["Say"], params=SamplingParams(1000, seed=i, schema=json.dumps(schema)))
            for i, schema in enumerate(schemas)
        ]
        answers = run(engine, wanted)
    valid = sum(
        answers[i].fault is None and jsonschema_rs.is_valid(schema, json.loads(answers[i].choices[0][0]))
        for i, schema in enumerate(schemas)
    )
    what = f"answers to {count} random schemas that follow them"
    table.add("engine-9-valid", what, 100 * valid / count, "%", "= 100", valid == count)


def bench_structured(table: Table, rounds: int, *, is_quick: bool = False) -> None:
    """Tokens/s of answers that follow schemas over free ones of as many tokens, with tokens of several bytes.

    What a token costs more is told too: the mask of what may follow, its use, and going on in the grammar.
    """
    from examples.demo.docstrings import collect
    from tests.support.generation import trained_tokenizer

    _bench_validity(table, 20 if is_quick else RANDOM_SCHEMAS)
    tokenizer = trained_tokenizer([docstring.text for docstring in collect(2000)], VOCABULARY)
    sides = {"free": None, "schema": [json.dumps(schema) for schema in LONG_SCHEMAS]}
    tokens = 8 if is_quick else 64
    for dtype in DTYPES:
        rates: dict[str, list[float]] = {name: [] for name in sides}
        micros: dict[str, list[float]] = {name: [] for name in sides}
        with engine_in_here(dtype, is_quick=is_quick, tokenizer=tokenizer) as engine:
            for number in range(rounds + 1):
                for side, (name, schemas) in enumerate(sides.items()):
                    before = engine.statistics.part_seconds["sample"]
                    # Drawn, as greedy answers of random weights say the same token again and again.
                    seconds, made = drive(engine, batch(tokens, 2 * number + side, schemas, temperature=1.0))
                    assert made == SEQUENCES * tokens, "both sides generate the same"
                    if number:  # the first round loads code
                        rates[name].append(made / seconds)
                        micros[name].append((engine.statistics.part_seconds["sample"] - before) / made * 1e6)
        ratio = statistics.median(rates["schema"]) / statistics.median(rates["free"])
        more = statistics.median(micros["schema"]) - statistics.median(micros["free"])
        samples = [{"schema": a, "free": b} for a, b in zip(rates["schema"], rates["free"], strict=True)]
        what = f"tokens/s with {len(LONG_SCHEMAS)} schemas in turn ÷ without, {SEQUENCES} sequences, {dtype}"
        table.add(f"engine-9-{dtype}", what, ratio, "", f"≥ {SCHEMA_BAR}", ratio >= SCHEMA_BAR, samples)
        what = f"what drawing a token under a schema takes more than a free one, {dtype}"
        table.add(f"engine-9-{dtype}-token", what, more, "µs", "said", True, [micros])
