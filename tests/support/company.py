"""The same requests in every company in which they may find themselves, for promise 3: their answers never differ."""

import random
from collections.abc import Callable, Iterator

from services.worker.children import EngineChild
from services.worker.engine.generation import GenerationEngine
from services.worker.protocol import ModelSpec, Request, Response, SamplingParams
from shared.domain.errors import ChildLost

Answer = tuple[str, list[float]]
"""An answer's text and the log-probability of each of its tokens, to the last bit."""
Answers = dict[int, Answer]
ANSWER_SECONDS = 300.0


def half_drawn(texts: list[list[int]], shortest: int) -> list[Request]:
    """Return a request for each prompt: the even ones greedy, the odd ones drawn from a seed of their own.

    Answers have `shortest` to four times as many tokens, so that requests leave a batch at different steps.
    """
    made = []
    for i, text in enumerate(texts):
        drawn = {"temperature": 0.9, "top_p": 0.95, "seed": 1000 + i} if i % 2 else {"temperature": 0.0}
        params = SamplingParams(max_tokens=shortest * (1 + i % 4), ignore_eos=True, logprobs=0, **drawn)
        made.append(Request(i, "complete", prompts=[text], params=params))
    return made


def said(response: Response) -> Answer:
    assert response.fault is None, response.fault
    return response.choices[0][0], [token.logprob for token in response.logprobs[0]]


def in_batches(engine: GenerationEngine, wanted: list[Request], sizes: list[int]) -> Answers:
    """Answer the requests in batches of these sizes, one after another."""
    found: Answers = {}
    rest = list(wanted)
    for size in sizes:
        batch, rest = rest[:size], rest[size:]
        for request in batch:
            engine.add(request)
        while engine.wait_seconds() is not None:
            found |= {response.id: said(response) for response in engine.step().responses}
    engine.check_integrity()
    assert not rest
    return found


def one_by_one(engine: GenerationEngine, wanted: list[Request]) -> Answers:
    """Answer the requests as they come, one a step, every third of them online."""
    found: Answers = {}
    for request in wanted:
        engine.add(replace_online(request, is_online=request.id % 3 == 0))
        found |= {response.id: said(response) for response in engine.step().responses}
    while engine.wait_seconds() is not None:
        found |= {response.id: said(response) for response in engine.step().responses}
    engine.check_integrity()
    return found


def replace_online(request: Request, *, is_online: bool) -> Request:
    return Request(request.id, request.task, prompts=request.prompts, params=request.params, is_online=is_online)


def sizes(count: int, seed: int) -> list[int]:
    """Return sizes of 2 to 64 that add up to at least `count`."""
    generator, made = random.Random(seed), []
    while sum(made) < count:
        made.append(generator.randint(2, 64))
    return made


def ways(
    make_engine: Callable[..., GenerationEngine], wanted: list[Request], few_blocks: int
) -> Iterator[tuple[str, Answers]]:
    """Yield a company's name and the answers in it; the first is none at all.

    `make_engine` takes `blocks` and the scheduler's fields. `few_blocks` hold any two or three of the requests.
    """
    count = len(wanted)
    engine = make_engine()
    yield "alone", in_batches(engine, wanted, [1] * count)
    assert engine.pool.cached > 0
    before = engine.scheduler.prompt_tokens_computed
    yield "prefixes cached", in_batches(engine, wanted, sizes(count, 1))
    assert engine.scheduler.prompt_tokens_computed - before < sum(len(r.prompts[0]) for r in wanted)
    yield "pairs", in_batches(make_engine(), wanted, [2] * -(-count // 2))
    yield "batches of 2 to 64", in_batches(make_engine(), wanted, sizes(count, 2))
    yield "batches of 64", in_batches(make_engine(), wanted, [64] * -(-count // 64))
    yield "one more a step", one_by_one(make_engine(), wanted)
    few = {"step_tokens": 5, "online_step_tokens": 5, "fewest_prompt_tokens": 5}
    yield "prompts in chunks of 5", in_batches(make_engine(**few), wanted, [64] * -(-count // 64))
    engine = make_engine(blocks=few_blocks)
    yield "preempted", in_batches(engine, wanted, [64] * -(-count // 64))
    assert engine.scheduler.preemptions > count / 10, engine.scheduler.preemptions


def retried(model: ModelSpec, wanted: list[Request]) -> tuple[Answers, int]:
    """Answer the requests in a real engine child that is killed in the middle, and what is left in another.

    Returns the answers, and how many of them were begun twice.
    """
    found: Answers = {}
    numbers: dict[int, int] = {}

    def submit(child: EngineChild, requests: list[Request]):
        numbers.clear()
        originals = [request.id for request in requests]
        batch = child.submit(model, requests)  # which gives them ids of its own
        numbers.update({request.id: original for request, original in zip(requests, originals, strict=True)})
        return batch

    left = [replace_online(request, is_online=False) for request in wanted]
    lost = 0
    for share in (3, 1):
        child = EngineChild("services.worker.engine.process", ["--device", "cpu:0", "--cache-bytes", str(2**34)],
                            hang_seconds=ANSWER_SECONDS)  # fmt: skip
        batch, goal = submit(child, left), len(found) + len(left) // share
        try:
            while len(found) < goal:
                for response in batch.collect(ANSWER_SECONDS):
                    found[numbers[response.id]] = said(response)
            if share > 1:
                child.kill()
                while True:  # what had been sent before it died still comes
                    for response in batch.collect(ANSWER_SECONDS):
                        found[numbers[response.id]] = said(response)
        except ChildLost:
            lost = len(wanted) - len(found)
        finally:
            child.close()
        left = [replace_online(request, is_online=False) for request in wanted if request.id not in found]
    return found, lost
