"""Rows 7: a burst that does not fit, and two models of which the budget holds one; memory is measured from outside."""

import random
import tempfile
import threading
import time
from pathlib import Path

from services.worker.children import EngineChild
from services.worker.engine.loading import model_bytes
from services.worker.protocol import ModelSpec, Request, SamplingParams
from tests.benchmarks.engine_timed_child import STEPS_FILE, read_steps
from tests.benchmarks.engine_workloads import FIRST_TOKEN, VOCABULARY, make_model
from tests.benchmarks.table import Table
from tests.support.models import make_tiny_llama
from tests.support.servers import wait_until

SEED = 4
MIB = 2**20
BURST, PROMPT_TOKENS, ANSWER_TOKENS = 300, 200, 40
"""As many requests as can run at once and more, of twice as many tokens as the KV cache holds."""
QUICK_BURST = 200
ROOM = 1.02
"""The budget is that much of what one model is counted for."""


class AnonymousMemory:
    """The most memory of its own (without mapped files) that a process had while it was watched, bytes."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self.before = self.highest = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def now(self) -> int:
        line = next(line for line in self._status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.highest = max(self.highest, self.now())

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def _requests(count: int, prompt_tokens: int, answer_tokens: int, seed: int) -> list[Request]:
    dice = random.Random(seed)
    params = SamplingParams(max_tokens=answer_tokens, temperature=0, ignore_eos=True)
    return [
        Request(0, "complete", prompts=[[dice.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(prompt_tokens)]],
                params=params)
        for _ in range(count)
    ]  # fmt: skip


def _answer(child: EngineChild, model: ModelSpec, requests: list[Request]) -> int:
    """Have the requests answered; return how many tokens came."""
    batch, tokens, done = child.submit(model, requests), 0, 0
    while done < len(requests):
        for response in batch.collect(600):
            assert response.fault is None, response.fault
            tokens, done = tokens + response.completion_tokens, done + 1
    return tokens


def bench_memory(table: Table, *, is_quick: bool = False) -> None:
    with tempfile.TemporaryDirectory(prefix="lamplighter-bench-memory-") as name:
        directory = Path(name)
        models = [
            ModelSpec(f"bench-{number}", "causal_lm",
                      str(make_model("llama", directory / str(number), "float32", is_quick=is_quick)),
                      dtype="float32", context_length=2048)
            for number in range(2)
        ]  # fmt: skip
        tiny = ModelSpec("tiny", "causal_lm", str(make_tiny_llama(directory / "tiny")), context_length=256)
        budget = int(ROOM * model_bytes(models[0])) + model_bytes(tiny)
        for bench in (_bench_burst, _bench_turns):
            steps = directory / bench.__name__
            child = EngineChild("tests.benchmarks.engine_timed_child",
                                ["--device", "cpu:0", "--cache-bytes", str(budget)],
                                hang_seconds=600, environment={STEPS_FILE: str(steps)})  # fmt: skip
            try:
                _answer(child, tiny, _requests_of_bytes(4))  # libraries are loaded, and buffers of their own made
                bench(table, child, models, budget, steps, is_quick=is_quick)
            finally:
                child.close()


def _requests_of_bytes(count: int) -> list[Request]:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    return [Request(0, "complete", prompts=[f"request {i}"], params=params) for i in range(count)]


def _bench_burst(table, child, models, budget, steps_file, *, is_quick) -> None:
    """All at once: blocks never exceed the pool, sequences give way and come back, all tokens come."""
    count = QUICK_BURST if is_quick else BURST
    with AnonymousMemory(child.pid) as memory:
        tokens = _answer(child, models[0], _requests(count, PROMPT_TOKENS, ANSWER_TOKENS, SEED))
    steps = [step for step in read_steps(steps_file) if step.blocks > 600]  # not the tiny one's
    preemptions, most = steps[-1].preemptions, max(step.blocks_in_use for step in steps)
    wanted = count * ANSWER_TOKENS
    what = f"{count} requests of {PROMPT_TOKENS + ANSWER_TOKENS} tokens on {steps[0].blocks} blocks of 16: tokens that came "
    what += f"÷ wanted ({preemptions} preemptions)"
    table.add("engine-7a", what, tokens / wanted, "", "= 1, preempted", tokens == wanted and preemptions > 0)
    what = "blocks in use at most ÷ blocks there are, at every step; none when idle"
    holds = most <= steps[0].blocks and steps[-1].blocks_in_use == 0
    table.add("engine-7b", what, most / steps[0].blocks, "", "≤ 1", holds, [most, steps[-1].blocks_in_use])
    grown = memory.highest - memory.before
    what = f"memory that loading the model and the burst took ÷ the cache's budget of {budget / MIB:.0f} MiB"
    table.add("engine-7c", what, grown / budget, "", "≤ 1", grown <= budget, [grown, budget])


def _bench_turns(table, child, models, budget, _steps_file, *, is_quick) -> None:
    """Two models in turn, of which there is room for one: the cache's books and the process's memory, all the time."""
    counted: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            if child.status is not None:
                counted.append(child.status.cache_bytes)

    watcher = threading.Thread(target=watch, daemon=True)
    with AnonymousMemory(child.pid) as memory:
        watcher.start()
        for number in range(4):
            tokens = _answer(child, models[number % 2], _requests(8, 24, 8, SEED + number))
            assert tokens == 64
            time.sleep(1.2)  # the books are told once a second
        stop.set()
        watcher.join()
    wait_until(lambda: child.status.in_flight == 0, 10)
    what = "two models in turn, of which one fits: bytes that the cache counts at most ÷ its budget"
    loads = child.status.model_loads
    table.add(
        "engine-7d", what, max(counted) / budget, "", "≤ 1", max(counted) <= budget and loads >= 4, [max(counted)]
    )
    grown = memory.highest - memory.before
    what = "memory that the process took for it ÷ the budget"
    table.add("engine-7e", what, grown / budget, "", "≤ 1", grown <= budget, [grown, budget])
