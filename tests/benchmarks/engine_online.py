"""Rows 4: online calls beside a batch of 5,000 lines, on a real engine child and through the whole stack.

The batch runs all the time; phases with and without one online call a second alternate. Calls leave at their time,
whether or not earlier ones were answered.
"""

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from services.worker.children import EngineChild
from services.worker.protocol import ModelSpec, Output, Request, SamplingParams
from tests.benchmarks.engine_timed_child import STEPS_FILE, Step, read_steps
from tests.benchmarks.engine_workloads import FIRST_TOKEN, VOCABULARY, make_model
from tests.benchmarks.load import Connection, Sample, percentile
from tests.benchmarks.table import Table
from tests.support.servers import wait_until

SEED = 4
LINES = 5000
PROMPT_TOKENS = (12, 60)
ANSWER_TOKENS = (32, 96)
"""Of a line; lengths differ so that lines end evenly."""
CALL_PROMPT, CALL_ANSWER = 32, 16
P95 = 0.95
LATENCY_BAR, THROUGHPUT_BAR = 2.0, 0.85


@dataclass(frozen=True)
class Plan:
    """How long everything takes, in seconds; `pairs` of phases with and without online calls."""

    idle_calls: int = 40
    warm: float = 20.0
    phase: float = 30.0
    pairs: int = 3
    calls_a_second: float = 1.0


QUICK = Plan(idle_calls=4, warm=1.0, phase=3.0, pairs=1)


@dataclass
class Call:
    """One online call; times by CLOCK_MONOTONIC, None before they come."""

    sent: float
    first: float | None = None
    ended: float | None = None
    tokens: int = 0

    @property
    def seconds(self) -> float:
        return self.first - self.sent


@dataclass
class Calls:
    """The listener of all online calls."""

    by_id: dict[int, Call] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)

    def deliver(self, output: Output) -> None:
        now = time.monotonic()
        for delta in output.deltas:
            call = self.by_id[delta.id]
            call.first = call.first or now
        for response in output.responses:
            assert response.fault is None, response.fault
            call = self.by_id[response.id]
            call.first, call.ended, call.tokens = call.first or now, now, response.completion_tokens

    def lose(self, request_ids: list[int]) -> None:
        self.lost += request_ids


@dataclass
class Phase:
    """A window of time, and the calls that were sent in it."""

    began: float
    ended: float = 0.0
    calls: list[Call] = field(default_factory=list)


class Bench:
    """An engine child with its online calls and one batch."""

    def __init__(self, child: EngineChild, model: ModelSpec, steps_file: Path) -> None:
        self._child, self._model, self._steps_file = child, model, steps_file
        self._calls = Calls()
        self._dice = random.Random(SEED)
        self._batch = None

    def _tokens(self, count: int) -> list[int]:
        return [self._dice.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(count)]

    def call(self) -> Call:
        """Send one online call."""
        params = SamplingParams(max_tokens=CALL_ANSWER, temperature=0, ignore_eos=True)
        request = Request(0, "complete", prompts=[self._tokens(CALL_PROMPT)], params=params, is_online=True,
                          is_streamed=True)  # fmt: skip
        call = Call(time.monotonic())
        note = lambda ids: self._calls.by_id.update({ids[0]: call})  # noqa: E731  # before the first answer can come
        self._child.submit_for(self._calls, self._model, [request], before_send=note)
        return call

    def idle(self, count: int) -> list[Call]:
        """Make calls one after another with nothing beside them."""
        made = []
        for _ in range(count):
            made.append(self.call())
            wait_until(lambda: made[-1].ended or self._calls.lost, 120)
            time.sleep(0.1 * self._dice.random())
        return made

    def start_batch(self, lines: int) -> None:
        requests = []
        for _ in range(lines):
            params = SamplingParams(max_tokens=self._dice.randint(*ANSWER_TOKENS), temperature=0, ignore_eos=True)
            prompt = self._tokens(self._dice.randint(*PROMPT_TOKENS))
            requests.append(Request(0, "complete", prompts=[prompt], params=params))
        self._batch = self._child.submit(self._model, requests)

    def phase(self, seconds: float, calls_a_second: float) -> Phase:
        """Let the batch run for so long, with calls at this rate, each at a random moment of its turn."""
        phase = Phase(time.monotonic())
        for number in range(int(seconds * calls_a_second)):
            at = phase.began + (number + self._dice.random()) / calls_a_second
            time.sleep(max(0.0, at - time.monotonic()))
            phase.calls.append(self.call())
        time.sleep(max(0.0, phase.began + seconds - time.monotonic()))
        phase.ended = time.monotonic()
        wait_until(lambda: all(call.ended for call in phase.calls) or self._calls.lost, 120)
        return phase

    def end_batch(self) -> int:
        """Give up the rest of the batch; return how many of its lines were still to do."""
        done = self._batch.collect(0.001)
        self._child.abort(self._batch)
        return len(self._batch.ids) - len(done)

    def steps(self, phase: Phase) -> list[Step]:
        """Return the steps that lie in a phase."""
        return [s for s in read_steps(self._steps_file) if s.began >= phase.began and s.ended <= phase.ended]

    @property
    def lost(self) -> int:
        return len(self._calls.lost)


@contextmanager
def running_bench(*, is_quick: bool) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="lamplighter-bench-online-") as name:
        model = make_model("llama", Path(name) / "model", "float32", is_quick=is_quick)
        spec = ModelSpec("bench", "causal_lm", str(model), dtype="float32", context_length=2048)
        steps = Path(name) / "steps"
        child = EngineChild("tests.benchmarks.engine_timed_child", ["--device", "cpu:0", "--cache-bytes", str(2**35)],
                            hang_seconds=600, environment={STEPS_FILE: str(steps)})  # fmt: skip
        try:
            yield Bench(child, spec, steps)
        finally:
            child.close()


def batch_rate(bench: Bench, phase: Phase) -> float:
    """Return the batch's tokens a second in a phase: those of the steps in it, less what its calls got."""
    steps = bench.steps(phase)
    seconds = steps[-1].ended - steps[0].ended
    return (steps[-1].tokens - steps[0].tokens - sum(call.tokens for call in phase.calls)) / seconds


def bench_online(table: Table, *, is_quick: bool = False) -> float:
    """Measure calls on an engine child; return how long a step beside the batch takes, seconds (p95)."""
    plan = QUICK if is_quick else Plan()
    with running_bench(is_quick=is_quick) as bench:
        bench.idle(3)
        idle = bench.idle(plan.idle_calls)
        bench.start_batch(LINES)
        time.sleep(plan.warm)
        quiet, busy = [], []
        for _ in range(plan.pairs):
            quiet.append(bench.phase(plan.phase, 0))
            busy.append(bench.phase(plan.phase, plan.calls_a_second))
        left = bench.end_batch()
        step = percentile([s.seconds for phase in quiet for s in bench.steps(phase)], P95)
        rates = [(batch_rate(bench, a), batch_rate(bench, b)) for a, b in zip(quiet, busy, strict=True)]
        assert not bench.lost and left > 0, "the batch was over too soon, or the engine died"
    calls = [call for phase in busy for call in phase.calls]
    _add_rows(table, "engine-4", "an engine child", [c.seconds for c in idle], [c.seconds for c in calls], step, rates)
    return step


def _add_rows(table, name, where, idle, loaded, step, rates) -> None:
    slow, fast = percentile(loaded, P95), percentile(idle, P95)
    limit = LATENCY_BAR * fast + step
    what = f"{where}: time to first token, p95, beside a batch of {LINES:,} lines (idle {fast * 1000:.0f} ms, a step of it "
    what += f"{step * 1000:.0f} ms, both p95)"
    samples = [{"beside the batch": [s * 1000 for s in loaded], "idle": [s * 1000 for s in idle]}]
    table.add(f"{name}a", what, slow * 1000, "ms", f"≤ {limit * 1000:.0f} (2 × idle + a step)", slow <= limit, samples)
    ratio = statistics.median(b for _, b in rates) / statistics.median(a for a, _ in rates)
    samples = [{"with one call a second": b, "without": a} for a, b in rates]
    what = f"{where}: the batch's throughput with one online call a second ÷ without"
    table.add(f"{name}b", what, ratio, "", f"≥ {THROUGHPUT_BAR}", ratio >= THROUGHPUT_BAR, samples)


def bench_online_stack(table: Table, step: float, *, is_quick: bool = False) -> None:
    """The same through gateway, queues and database; `step` is an engine's step beside the batch, seconds."""
    from tests.benchmarks.bench_spine import native_for, run_batch, running_stack, sdk_for
    from tests.support.batches import jsonl

    plan = QUICK if is_quick else Plan()
    with tempfile.TemporaryDirectory(prefix="lamplighter-bench-online-") as name, running_stack("online") as stack:
        Path(name).chmod(0o711)
        model = make_model("llama", Path(name) / "model", "float32", is_quick=is_quick)
        with sdk_for(stack) as sdk, native_for(stack) as native:
            native.request("POST", "/v1/models", json={"name": "bench", "source": str(model)})
            lines = jsonl(_lines(LINES))
            run_batch(sdk, lines.splitlines(keepends=True)[0], "/v1/completions")  # loads the model
            key = (stack.directory / "admin.key").read_text().strip()
            idle = asyncio.run(_calls(stack.port, key, plan.idle_calls, None))
            uploaded = sdk.files.create(file=("x.jsonl", lines), purpose="batch")
            batch = sdk.batches.create(input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h")
            wait_until(lambda: sdk.batches.retrieve(batch.id).request_counts.completed > 0, 120)
            time.sleep(plan.warm)
            loaded, rates = [], []
            for _ in range(plan.pairs):
                quiet = _lines_a_second(sdk, batch.id, lambda: time.sleep(plan.phase))
                with_calls = _lines_a_second(sdk, batch.id, lambda: loaded.extend(
                    asyncio.run(_calls(stack.port, key, int(plan.phase * plan.calls_a_second), plan.calls_a_second))
                ))  # fmt: skip
                rates.append((quiet, with_calls))
            assert sdk.batches.retrieve(batch.id).status == "in_progress", "the batch was over too soon"
            sdk.batches.cancel(batch.id)
    _add_rows(
        table, "engine-4-stack-", "the whole stack", [s.first for s in idle], [s.first for s in loaded], step, rates
    )


def _lines(count: int) -> list[dict]:
    dice = random.Random(SEED)
    lines = []
    for number in range(count):
        prompt = [dice.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(dice.randint(*PROMPT_TOKENS))]
        body = {"model": "bench", "prompt": prompt, "max_tokens": dice.randint(*ANSWER_TOKENS), "temperature": 0,
                "ignore_eos": True}  # fmt: skip
        lines.append({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body})
    return lines


def _lines_a_second(sdk, batch: str, act) -> float:
    def completed() -> int:
        return sdk.batches.retrieve(batch).request_counts.completed

    before, began = completed(), time.monotonic()
    act()
    return (completed() - before) / (time.monotonic() - began)


async def _calls(port: int, key: str, count: int, rate: float | None) -> list[Sample]:
    """Make streamed calls: at a rate, each at a random moment of its turn, or one after another."""
    dice, began, tasks, samples = random.Random(time.monotonic_ns()), time.monotonic(), [], []
    for number in range(count):
        if rate is None:
            samples.append(await _call(port, key, dice))
            continue
        await asyncio.sleep(max(0.0, began + (number + dice.random()) / rate - time.monotonic()))
        tasks.append(asyncio.ensure_future(_call(port, key, dice)))
    samples += await asyncio.gather(*tasks)
    assert all(sample.status == 200 for sample in samples), "a call failed"
    return samples


async def _call(port: int, key: str, dice: random.Random) -> Sample:
    prompt = [dice.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(CALL_PROMPT)]
    body = {"model": "bench", "prompt": prompt, "max_tokens": CALL_ANSWER, "temperature": 0, "ignore_eos": True,
            "stream": True}  # fmt: skip
    connection = Connection(port, key)
    sample = await connection.post("/v1/completions", json.dumps(body).encode(), until=b'"text":')
    connection.close()
    return sample
