"""What engines say of themselves, against what they really did; and the rates that a worker makes of it."""

import socket
import time

import pytest

from services.worker.engine.echo import STEP_REQUESTS, EchoEngine
from services.worker.engine.process import EngineProcess
from services.worker.engine.statistics import PARTS, RateMeter, StepClock, merged
from services.worker.model_cache import ModelCache
from services.worker.protocol import (
    Channel,
    EngineStatistics,
    ModelSpec,
    Ping,
    Pong,
    Request,
    SamplingParams,
    Submit,
)
from tests.support.servers import wait_until

engine_test = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def run(engine, requests):
    """Answer requests; return the responses by id, how many steps it took and their seconds, as seen from outside."""
    for request in requests:
        engine.add(request)
    answers, seconds = {}, 0.0
    while engine.wait_seconds() is not None:
        began = time.perf_counter()
        answers |= {response.id: response for response in engine.step().responses}
        seconds += time.perf_counter() - began
    return answers, seconds


def pong(at_seconds, **engines):
    return Pong(0, 0, [], 0, 0, 0, engines=engines, at_seconds=at_seconds)


class TestGeneration:
    pytestmark = engine_test

    @pytest.fixture(scope="class")
    def model(self):
        import torch
        import transformers

        torch.manual_seed(7)
        shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
        return shape, transformers

    @pytest.fixture
    def make(self, model):
        shape, transformers = model

        def make(blocks=400, **config):
            from services.worker.engine.decoding import build_decoder
            from services.worker.engine.generation import GenerationEngine
            from services.worker.engine.prompts import Prompts
            from services.worker.engine.scheduler import SchedulerConfig

            class Numbers:
                chat_template = None

                def decode(self, tokens, **_):
                    return " ".join(map(str, tokens))

            causal = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape)).eval()
            decoder = build_decoder(causal, 192, blocks)
            prompts = Prompts(Numbers(), 512, 192, frozenset())
            return GenerationEngine(decoder, prompts, blocks, SchedulerConfig(**config) if config else None)

        return make

    def requests(self, count, prefix=(), tokens=12, first_id=0):
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        return [
            Request(first_id + i, "complete", prompts=[[*prefix, *range(5 + i, 25 + i)]], params=params)
            for i in range(count)
        ]

    def test_totals_are_the_sums_of_usage(self, make):
        engine = make()
        prefix = list(range(100, 164))
        answers, _ = run(engine, self.requests(20, prefix))
        said = engine.statistics
        assert said.tokens == sum(a.completion_tokens for a in answers.values()) == 20 * 12
        assert said.prompt_tokens_computed + said.prompt_tokens_cached == sum(a.prompt_tokens for a in answers.values())
        assert said.prompt_tokens_cached == sum(a.cached_tokens for a in answers.values()) == 19 * 64
        again, _ = run(engine, self.requests(20, prefix))
        assert engine.statistics.tokens == 2 * said.tokens
        more = engine.statistics.prompt_tokens_cached - said.prompt_tokens_cached
        assert more == sum(a.cached_tokens for a in again.values()) > said.prompt_tokens_cached

    def test_gauges_are_of_this_moment(self, make):
        engine = make(most_sequences=4)
        idle = engine.statistics
        assert (idle.running, idle.waiting, idle.blocks, idle.blocks_in_use, idle.blocks_cached) == (0, 0, 400, 0, 0)
        assert (
            idle.kv_bytes == 2 * 3 * 400 * 16 * 2 * 16 * 4
        )  # keys and values, layers, blocks, tokens, heads, size, float32
        for request in self.requests(10):
            engine.add(request)
        engine.step()
        busy = engine.statistics
        assert (busy.running, busy.waiting) == (4, 6) and busy.blocks_in_use == engine.pool.in_use >= 4 * 2
        run(engine, [])
        after = engine.statistics
        assert (after.running, after.waiting, after.blocks_in_use) == (0, 0, 0) and after.blocks_cached > 0

    def test_sequences_and_places_are_summed_over_steps(self, make):
        engine = make(most_sequences=4)
        run(engine, self.requests(4, tokens=10))
        said = engine.statistics
        # One step computes all four prompts, and nine more a token each; the tenth token ends them.
        assert (said.steps, said.sequences, said.places) == (10, 40, 40)
        run(engine, self.requests(1, tokens=10, first_id=50))
        assert (engine.statistics.sequences - 40, engine.statistics.places - 40) == (10, 40)

    def test_parts_add_up_to_the_steps(self, make):
        engine = make()
        _, seconds = run(engine, self.requests(48, tokens=40))
        parts = engine.statistics.part_seconds
        assert set(parts) == set(PARTS) and all(value > 0 for value in parts.values())
        assert 0.9 * seconds < sum(parts.values()) <= seconds
        assert parts["forward"] > 0.3 * seconds

    def test_preempted_and_aborted_ones_are_counted(self, make):
        engine = make(blocks=16)
        answers, _ = run(engine, self.requests(10, tokens=60))
        said = engine.statistics
        assert len(answers) == 10 and said.tokens == 600 and said.preemptions == engine.scheduler.preemptions > 0
        assert said.evictions > 0
        for request in self.requests(3, first_id=90):
            engine.add(request)
        engine.step()
        assert engine.abort(91) is not None and engine.abort(91) is None and engine.abort(1000) is None
        assert engine.statistics.aborts == 1
        run(engine, [])
        assert engine.statistics.blocks_in_use == 0


class TestEncoder:
    pytestmark = engine_test

    def test_it_says_what_it_embedded(self):
        import transformers

        from services.worker.engine.encoder import EncoderEngine, EncoderSettings

        shape = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        model = transformers.BertModel(transformers.BertConfig(**shape, num_attention_heads=2)).eval()

        class Words:
            pad_token_id = 0

            def __call__(self, text):
                return {"input_ids": [len(word) for word in text.split()]}

        engine = EncoderEngine(model, Words(), EncoderSettings(max_tokens=64, pooling="mean", normalize=True))
        texts = ["a bb ccc"] * 300 + ["one two three four five six"] * 10
        for i, text in enumerate(texts):
            engine.add(Request(i, "embed", prompts=[text]))
        assert engine.statistics.waiting == 310
        engine.abort(0)
        answers, seconds = run(engine, [])
        said = engine.statistics
        assert said.tokens == sum(a.prompt_tokens for a in answers.values()) == 299 * 3 + 10 * 6
        assert said.prompt_tokens_computed == said.tokens and said.aborts == 1
        # The longest ten and as many short ones as one batch takes; then the rest.
        assert (said.steps, said.sequences, said.places) == (2, 309, 512)
        assert said.part_seconds["sample"] == 0 and said.part_seconds["prepare"] > 0
        assert 0.7 * seconds < sum(said.part_seconds.values()) <= seconds


class TestEcho:
    def test_totals_are_the_sums_of_usage(self):
        engine = EchoEngine()
        said = [{"role": "user", "content": "one two three"}]
        requests = [Request(i, "chat", messages=said, params=SamplingParams(n=2)) for i in range(40)]
        answers, seconds = run(engine, requests)
        statistics = engine.statistics
        assert statistics.tokens == sum(a.completion_tokens for a in answers.values()) == 240
        assert statistics.prompt_tokens_computed == sum(a.prompt_tokens for a in answers.values()) == 120
        assert (statistics.steps, statistics.sequences, statistics.places) == (2, 40, 2 * STEP_REQUESTS)
        assert 0 < sum(statistics.part_seconds.values()) <= seconds

    def test_waiting_is_no_step(self):
        engine = EchoEngine()
        engine.add(Request(1, "complete", prompts=["a"], delay_ms=100))
        for _ in range(5):
            engine.step()
        assert engine.statistics.steps == 0 and engine.statistics.waiting == 1
        run(engine, [])
        assert engine.statistics.steps == 1 and engine.statistics.waiting == 0

    def test_aborts(self):
        engine = EchoEngine()
        engine.add(Request(1, "complete", prompts=["a"], delay_ms=100))
        engine.abort(1)
        engine.abort(1)
        assert engine.statistics.aborts == 1


def test_the_clock_charges_every_moment_once():
    clock = StepClock()
    began = time.perf_counter()
    for _ in range(3):
        clock.start()
        time.sleep(0.01)
        clock.charge("forward")
        time.sleep(0.005)
        clock.charge("sample")
        clock.charge("schedule")
    seconds = time.perf_counter() - began
    parts = clock.part_seconds
    assert parts["forward"] >= 0.03 and parts["sample"] >= 0.015 and parts["prepare"] == parts["deliver"] == 0
    assert sum(parts.values()) <= seconds


def test_two_copies_under_one_name_are_summed():
    one = EngineStatistics(tokens=1, steps=2, part_seconds={"forward": 1.0}, blocks=5)
    other = EngineStatistics(tokens=10, steps=20, part_seconds={"forward": 0.5, "sample": 1.0}, blocks=6)
    both = merged(one, other)
    assert (both.tokens, both.steps, both.blocks) == (11, 22, 11)
    assert both.part_seconds == {"forward": 1.5, "sample": 1.0}


class TestRates:
    def test_are_what_was_added_between_two_pongs(self):
        meter = RateMeter()
        meter.look(pong(100.0, a=EngineStatistics(tokens=50, steps=5, sequences=10, places=100)))
        assert (meter.total.tokens_per_second, meter.total.batch_occupancy) == (0, 0)
        later = {
            "a": EngineStatistics(tokens=150, steps=9, sequences=50, places=180),
            "b": EngineStatistics(tokens=20, steps=2, sequences=20, places=20),
        }
        meter.look(pong(104.0, **later))
        assert meter.by_model["a"].tokens_per_second == 25 and meter.by_model["a"].batch_occupancy == 0.5
        assert meter.by_model["b"].tokens_per_second == 5 and meter.by_model["b"].batch_occupancy == 1
        assert meter.total.tokens_per_second == 30 and meter.total.batch_occupancy == 0.6
        meter.look(pong(104.0, **later))  # nothing was heard since: nothing is said anew
        assert meter.total.tokens_per_second == 30
        meter.look(pong(105.0, **later))
        assert meter.total.tokens_per_second == 0 and meter.total.batch_occupancy == 0

    def test_a_model_that_was_loaded_anew_begins_at_zero(self):
        meter = RateMeter()
        meter.look(pong(0.0, a=EngineStatistics(tokens=1000, steps=100, sequences=100, places=100)))
        meter.look(pong(2.0, a=EngineStatistics(tokens=30, steps=3, sequences=3, places=6)))
        assert meter.total.tokens_per_second == 15 and meter.total.batch_occupancy == 0.5

    def test_without_a_child_nothing_is_done(self):
        meter = RateMeter()
        meter.look(pong(0.0, a=EngineStatistics(tokens=1)))
        meter.look(pong(1.0, a=EngineStatistics(tokens=11)))
        assert meter.total.tokens_per_second == 10
        meter.look(None)
        assert meter.total.tokens_per_second == 0 and meter.by_model == {}
        meter.look(pong(9.0, a=EngineStatistics(tokens=5)))
        assert meter.total.tokens_per_second == 0  # how long it took is not known


def test_a_pong_names_models_and_counts_hits():
    """Two copies of one name, one of another; the first time is no hit."""
    ours, theirs = socket.socketpair()
    process = EngineProcess(Channel(theirs), ModelCache(10, lambda _: EchoEngine(), lambda _: 0))
    for number, (name, source) in enumerate([("x", "1"), ("x", "2"), ("y", "3"), ("x", "1"), ("y", "3")]):
        spec = ModelSpec(name, "causal_lm", source)
        process._handle([Submit(spec, [Request(number, "complete", prompts=["a b"])])])
        wait_until(lambda: process._place_waiting() == [] and not process._waiting, 10)
        for engine in process._cache.engines():
            engine.step()
    process._handle([Ping()])
    found = Channel(ours).receive_in_worker()
    assert isinstance(found, Pong) and (found.model_loads, found.model_hits) == (3, 2)
    assert {name: engine.tokens for name, engine in found.engines.items()} == {"x": 6, "y": 4}
    assert found.load_seconds.keys() == {"x", "y"} and all(0 < each < 10 for each in found.load_seconds.values())
    assert found.engines["x"].steps == 3 and 0 < found.at_seconds <= time.monotonic()
    for end in (ours, theirs):
        end.close()
