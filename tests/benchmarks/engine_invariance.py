"""Rows 3: promise 3 on a model of real size, and what it costs to keep it."""

import statistics
import tempfile
from pathlib import Path

from tests.benchmarks.engine_inside import drive, engine_in_here
from tests.benchmarks.engine_sides import CORES
from tests.benchmarks.engine_workloads import FIRST_TOKEN, VOCABULARY, make_model
from tests.benchmarks.table import Table

DTYPES = ("float32", "bfloat16")
REQUESTS, SHORTEST_ANSWER = 200, 5
PROMPT_TOKENS = (5, 20, 33, 61, 90)
FEW_BLOCKS = 16
"""Blocks of 16 tokens: two or three of the longest requests."""
CONTEXT = 256
COUNTS = (1, 4, 16, 48)
"""Numbers of sequences; in bfloat16 some products have more rows than these, or are divided."""


def bench_invariance(table: Table, *, is_quick: bool = False) -> None:
    """Count requests that differ in any company from what they say alone, in each number type."""
    from services.worker.protocol import ModelSpec
    from tests.support.company import half_drawn, retried, ways

    for dtype in DTYPES:
        with tempfile.TemporaryDirectory(prefix="lamplighter-bench-invariance-") as name:
            model = make_model("llama", Path(name), dtype, is_quick=is_quick)
            wanted = half_drawn(_prompts(40 if is_quick else REQUESTS), SHORTEST_ANSWER)
            alone, differ = None, {}
            for company, found in ways(
                lambda model=model, dtype=dtype, **c: _engine(model, dtype, **c), wanted, FEW_BLOCKS
            ):
                alone = alone or found
                differ[company] = [i for i in alone if found[i] != alone[i]]
                print(f"    {dtype}, {company}: {len(differ[company])} of {len(wanted)} differ", flush=True)
            spec = ModelSpec("bench", "causal_lm", str(model), dtype=dtype, context_length=CONTEXT)
            found, lost = retried(spec, wanted)
            differ[f"retried in another process ({lost} of them)"] = [i for i in alone if found[i] != alone[i]]
        count = len({i for each in differ.values() for i in each})
        what = f"requests of {len(wanted)} that differ in any of {len(differ)} companies, {dtype}"
        samples = [{company: len(each) for company, each in differ.items()}]
        table.add(f"engine-3-{dtype}", what, count, "requests", "= 0", count == 0, samples)


def _prompts(count: int) -> list[list[int]]:
    import random

    dice = random.Random(3)
    return [
        [dice.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(PROMPT_TOKENS[i % len(PROMPT_TOKENS)])]
        for i in range(count)
    ]


def _engine(model: Path, dtype: str, *, blocks: int = 2048, **config):
    """Return an engine as the product loads it, but for the number of blocks and what its scheduler may do."""
    import torch
    from transformers import AutoModelForCausalLM

    from services.worker.engine.decoding import build_decoder
    from services.worker.engine.generation import GenerationEngine
    from services.worker.engine.prompts import Prompts
    from services.worker.engine.scheduler import SchedulerConfig
    from tests.support.generation import NumberTokenizer

    torch.set_num_threads(CORES)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    decoder = build_decoder(loaded, CONTEXT, blocks)
    prompts = Prompts(NumberTokenizer(), VOCABULARY, CONTEXT, frozenset())
    return GenerationEngine(decoder, prompts, blocks, SchedulerConfig(**config) if config else None)


def bench_cost(table: Table, rounds: int, *, is_quick: bool = False) -> None:
    """Tokens/s of sequences with products of the numbers of rows that agree, over products of as many as there are."""
    from services.worker.engine import linear

    kept = linear.divide
    for dtype in DTYPES:
        with engine_in_here(dtype, is_quick=is_quick) as engine:
            for count in COUNTS:
                rates: dict[str, list[float]] = {"kept": [], "not kept": []}
                for number in range(rounds):
                    for side, found in rates.items():
                        linear.divide = kept if side == "kept" else _undivided
                        seconds, tokens = drive(engine, _few(count, 8 if is_quick else 48, number))
                        found.append(tokens / seconds)
                linear.divide = kept
                ratio = statistics.median(rates["kept"]) / statistics.median(rates["not kept"])
                samples = [{"kept": a, "not kept": b} for a, b in zip(*rates.values(), strict=True)]
                what = f"tokens/s of {count} sequences with promise 3 kept ÷ not kept, {dtype}"
                table.add(f"engine-3-cost-{count}-{dtype}", what, ratio, "", "said", True, samples)


def _undivided(rows: int, _row_counts: tuple[int, ...]) -> tuple[int, ...]:
    return (rows,)


def _few(count: int, tokens: int, number: int) -> list:
    from tests.benchmarks.engine_inside import batch

    return batch(tokens, number)[:count]
