"""Rows 2: greedy tokens and log-probabilities beside transformers' own, on tiny models of every shape."""

from tests.benchmarks.table import Table
from tests.support.generation import (
    generate,
    is_tie,
    logits_after,
    make_engine,
    make_model,
    prompts,
    requests,
    run,
    tokens,
)

SHAPES = ("gpt2", "llama", "qwen3", "gemma", "mistral-window")
PROMPTS, ANSWER_TOKENS = 48, 32
LOGPROB_BAR = 1e-4


def bench_correctness(table: Table, *, is_quick: bool = False) -> None:
    """Count requests whose tokens are not `generate()`'s; find the log-probability that is furthest off."""
    count = 4 if is_quick else PROMPTS
    wrong: dict[str, int] = {}
    ties: dict[str, int] = {}
    furthest: dict[str, float] = {}
    for name in SHAPES:
        reference = make_model(name)
        texts = prompts(count, seed=11)
        answers = run(make_engine(make_model(name)), requests(texts, max_tokens=ANSWER_TOKENS, logprobs=0))
        wrong[name] = ties[name] = 0
        furthest[name] = 0.0
        for number, text in enumerate(texts):
            found, wanted = tokens(answers[number]), generate(reference, text, ANSWER_TOKENS)
            if found != wanted:
                tied = is_tie(reference, text, wanted, found)
                ties[name], wrong[name] = ties[name] + tied, wrong[name] + (not tied)
            expected = logits_after(reference, text, found).log_softmax(-1)
            for place, (token, said) in enumerate(zip(found, answers[number].logprobs[0], strict=True)):
                furthest[name] = max(furthest[name], abs(said.logprob - float(expected[place, token])))
    all_wrong, worst = sum(wrong.values()), max(furthest.values())
    what = (
        f"{count * len(SHAPES)} greedy answers over {', '.join(SHAPES)}: not generate()'s ({sum(ties.values())} ties)"
    )
    table.add("engine-2a", what, all_wrong, "requests", "= 0", all_wrong == 0, [wrong])
    what = "log-probability furthest from transformers'"
    table.add("engine-2b", what, worst, "", f"≤ {LOGPROB_BAR}", worst <= LOGPROB_BAR, [furthest])
