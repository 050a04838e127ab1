"""Our generation engine against transformers' `generate()` and a plainly written sampler."""

from itertools import count, islice

import pytest
import torch
import transformers

from services.worker.engine.decoding import build_decoder, pick_kernels
from services.worker.engine.kernels.cpu import CpuKernels
from services.worker.engine.kernels.kernels import BLOCK_TOKENS
from services.worker.engine.sampling import draw, keep_likely, uniform
from services.worker.engine.sequence import Sequence
from services.worker.protocol import Request, SamplingParams
from shared.domain.errors import ModelRefused
from shared.model_files import context_of
from tests.support.generation import (
    COMMON,
    SHAPES,
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
from tests.support.plain_sampling import next_tokens

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

FUSED = {"llama", "llama-narrow", "qwen2", "qwen3", "gemma", "mistral-window", "gpt2"}
PARAMS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "high temperature": {"temperature": 1.9},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "presence": {"temperature": 0.0, "presence_penalty": 1.9},
    "frequency": {"temperature": 0.0, "frequency_penalty": 1.4},
    "negative penalties": {"presence_penalty": -1.5, "frequency_penalty": -0.5},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.8},
    "logit_bias": {"logit_bias": {7: 6.0, 8: 6.5, 9: -100.0}},
    "min_tokens": {"logit_bias": {5: 8.0}, "min_tokens": 9, "ignore_eos": False},
    "all": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {11: 3.0},
        "min_tokens": 4,
        "ignore_eos": False,
    },
}
EOS = frozenset({5})


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_tokens_are_generates(name):
    reference = make_model(name)
    texts = prompts(18)
    engine = make_engine(make_model(name))
    assert (type(engine._decoder).__name__ == "FusedDecoder") == (name in FUSED)
    answers = run(engine, requests(texts))
    for i, text in enumerate(texts):
        wanted, found = generate(reference, text, 24), tokens(answers[i])
        assert found == wanted or is_tie(reference, text, wanted, found), (i, wanted, found)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_longer_than_a_step_alone(name):
    """No token is drawn in the steps before its last: such a step once ended the child."""
    text = prompts(9)[8] * 3
    (whole,) = run(make_engine(make_model(name)), requests([text])).values()
    (in_steps,) = run(
        make_engine(make_model(name), step_tokens=40, online_step_tokens=40, fewest_prompt_tokens=8), requests([text])
    ).values()
    assert len(text) > 3 * 40 and tokens(in_steps) == tokens(whole)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma", "mistral-window", "gemma3", "phi3"])
def test_logprobs_are_transformers(name):
    reference = make_model(name)
    texts = prompts(9, seed=5)
    answers = run(make_engine(make_model(name)), requests(texts, logprobs=5, temperature=0.8))
    for i, text in enumerate(texts):
        drawn = tokens(answers[i])
        expected = logits_after(reference, text, drawn).log_softmax(-1)
        assert len(answers[i].logprobs[0]) == len(drawn) == 24
        for place, (each, token) in enumerate(zip(answers[i].logprobs[0], drawn, strict=True)):
            assert each.token == str(token) and abs(each.logprob - float(expected[place, token])) < 1e-4
            # By what transformers says of the named tokens: two that are all but equal may have changed places.
            named = [(float(expected[place, int(top.token)]), top.logprob) for top in each.top]
            best = expected[place].topk(5).values.tolist()
            assert max(abs(theirs - ours) for theirs, ours in named) < 1e-4
            assert max(abs(value - ours) for value, (_, ours) in zip(best, named, strict=True)) < 1e-4


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_every_parameter_draws_what_a_plain_sampler_draws(params):
    """Tokens of the engine, each among those that the plain sampler takes from transformers' logits in its place."""
    reference = make_model("llama")
    texts = prompts(12, seed=3)
    chosen = {"temperature": 1.0, "max_tokens": 20} | params
    answers = run(make_engine(make_model("llama"), eos=EOS), requests(texts, logprobs=0, **chosen))
    ended = 0
    for i, text in enumerate(texts):
        sampling, answer, drawn = SamplingParams(**chosen), answers[i], tokens(answers[i])
        if answer.choices[0][1] == "stop":
            drawn, ended = [*drawn, *EOS], ended + 1
        assert answer.completion_tokens == len(drawn) and (len(drawn) == 20 or drawn[-1] in EOS)
        for place, logits in enumerate(logits_after(reference, text, drawn).tolist()):
            number = uniform(1000 + i, place)
            expected = next_tokens(logits, sampling, text, drawn[:place], EOS, number)
            assert drawn[place] in expected, (i, place)
    if sampling.min_tokens and sampling.logit_bias.get(5):
        assert ended > 6  # or the least length was never tried


def test_rows_of_other_parameters_do_not_touch_each_other():
    """All parameters at once in one batch of random logits, each row drawn as if it were alone."""
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(600, 48, generator=generator) * 3
    kinds = list(PARAMS.values())
    sequences, expected = [], []
    for row in range(len(logits)):
        params = SamplingParams(**{"temperature": 1.0} | kinds[row % len(kinds)])
        context = torch.randint(0, 48, (12,), generator=generator).tolist()
        sequence = Sequence(row, 0, context[:6], 6, 99, row, params, EOS)
        for token in context[6:]:
            sequence.append(token)
        sequences.append(sequence)
        number = uniform(row, sequence.generated)
        expected.append(next_tokens(logits[row].tolist(), params, context[:6], context[6:], EOS, number))
    found = draw(logits.clone(), sequences).read()
    assert [token in tokens for token, tokens in zip(found, expected, strict=True)] == [True] * 600
    assert len(set(found)) > 30


def test_answers_of_one_prompt_share_it_and_differ():
    engine = make_engine(make_model("llama"))
    text = prompts(9)[8] * 2
    params = SamplingParams(max_tokens=8, temperature=1.0, n=6, seed=3, ignore_eos=True)
    answer = run(engine, [Request(1, "complete", prompts=[text], params=params)])[1]
    assert len({text for text, _ in answer.choices}) > 3 and answer.completion_tokens == 48
    assert answer.prompt_tokens == len(text)  # once, however many answers
    assert engine.scheduler.prompt_tokens_computed < len(text) + 6 * 16
    apart = [
        run(engine, [Request(2, "complete", prompts=[text], params=SamplingParams(
            max_tokens=8, temperature=1.0, seed=3 + index, ignore_eos=True))])[2].choices[0]
        for index in range(6)
    ]  # fmt: skip
    assert apart == answer.choices


def test_cached_tokens_are_the_blocks_that_somebody_of_the_namespace_computed():
    engine = make_engine(make_model("llama"))
    text = prompts(9)[8]  # 43 tokens: two blocks of 16, and 11

    def cached(prompt, namespace=""):
        (answer,) = run(engine, [Request(1, "complete", prompts=[prompt], namespace=namespace,
                                         params=SamplingParams(max_tokens=2, ignore_eos=True))]).values()  # fmt: skip
        return answer.cached_tokens

    assert [cached(text), cached(text), cached(text[:32] + [1, 2, 3])] == [0, 32, 32]
    assert cached(text[:32]) == 16  # at least one token is computed, as the next one comes from it
    assert cached([1] + text[1:]) == 0 and cached(text, "another tenant") == 0 and cached(text, "another tenant") == 32


def first_end(answer, token):
    return next((i for i, drawn in enumerate(answer) if drawn == token), None)


def test_why_an_answer_ended_is_said_exactly():
    """At an end token, also the last allowed; at a limit; not at an end token that is to be ignored."""
    text = prompts(1)[0]
    free = tokens(run(make_engine(make_model("llama")), requests([text], max_tokens=30))[0])
    end = free[6]
    place = first_end(free, end)
    engine = make_engine(make_model("llama"), eos=frozenset({end}))

    def answer(**params):
        found = run(engine, requests([text], **{"ignore_eos": False} | params))[0]
        return tokens(found), found.choices[0][1], found.completion_tokens

    assert answer(max_tokens=30) == (free[:place], "stop", place + 1)
    assert answer(max_tokens=place + 1) == (free[:place], "stop", place + 1)
    assert answer(max_tokens=place) == (free[:place], "length", place)
    assert answer(max_tokens=30, ignore_eos=True) == (free, "length", 30)
    least, reason, count = answer(max_tokens=place + 4, min_tokens=place + 2)
    assert least[:place] == free[:place] and end not in least[: place + 1] and count >= place + 2
    assert reason == ("stop" if count < place + 4 or len(least) < count else "length")


def test_stop_strings_end_an_answer_wherever_its_tokens_part_them():
    """Tokens read `12 345 6`: a stop string may end in the middle of one, span three, or be complete with the last."""
    text = prompts(1)[0]
    engine = make_engine(make_model("llama"))
    free = run(engine, requests([text]))[0].choices[0][0]
    words = free.split()
    ends = [len(" ".join(words[: i + 1])) for i in range(len(words))]
    for start in range(0, len(free) - 9, 3):
        stop = free[start : start + 9]
        cut = free.find(stop)
        (answer,) = run(engine, requests([text], stop=(stop, "never said"))).values()
        assert answer.choices == [(free[:cut], "stop")], stop
        needed = next(i + 1 for i, end in enumerate(ends) if end >= cut + 9)
        assert answer.completion_tokens in (needed, needed + 1), stop  # a token's text may depend on the next one
    last = free[-4:]
    assert free.find(last) == len(free) - 4
    assert run(engine, requests([text], stop=(last,)))[0].choices == [(free[:-4], "stop")]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_what_is_aborted_gives_its_blocks_back_at_once_and_disturbs_nobody(steps):
    """Waiting, in the middle of its prompt, generating; one answer, and three."""
    engine = make_engine(make_model("llama"), step_tokens=48, online_step_tokens=48, fewest_prompt_tokens=8)
    texts = [text * 2 for text in prompts(9)]
    expected = {i: tokens(answer) for i, answer in run(engine, requests(texts)).items()}
    wanted = requests(texts)
    victims = [Request(100 + i, "complete", prompts=[[9 + i, *text]], params=SamplingParams(
        max_tokens=40, n=1 + 2 * (i % 2), ignore_eos=True)) for i, text in enumerate(texts)]  # fmt: skip
    for request, victim in zip(wanted, victims, strict=True):
        engine.add(victim)
        engine.add(request)
    answers = {}
    for _ in range(steps):
        answers |= {response.id: tokens(response) for response in engine.step().responses}
    for victim in victims:
        held = sum(len(s.blocks) for s in engine.scheduler.running if s.request_id == victim.id)
        before = engine.pool.in_use
        aborted = engine.abort(victim.id)
        assert aborted.is_aborted and engine.abort(victim.id) is None
        assert before - engine.pool.in_use <= held and (not held or engine.pool.in_use < before)
        assert all(s.request_id != victim.id for s in engine.scheduler.running)
        engine.check_integrity()
    while engine.wait_seconds() is not None:
        answers |= {response.id: tokens(response) for response in engine.step().responses}
    assert answers == expected and engine.pool.in_use == 0


def test_a_burst_that_does_not_fit_preempts_and_completes():
    """A pool for three long answers, and forty of them at once: blocks are never more than there are."""
    engine = make_engine(make_model("llama"), blocks=20)
    most = 0
    wanted = requests([text * 2 for text in prompts(40)], max_tokens=60)
    roomy = run(make_engine(make_model("llama")), requests([text * 2 for text in prompts(40)], max_tokens=60))
    for request in wanted:
        engine.add(request)
    answers = {}
    while engine.wait_seconds() is not None:
        answers |= {response.id: response for response in engine.step().responses}
        engine.check_integrity()
        most = max(most, engine.pool.in_use)
    assert engine.scheduler.preemptions > 10 and 18 <= most <= 20
    assert {i: tokens(answer) for i, answer in answers.items()} == {i: tokens(a) for i, a in roomy.items()}


def test_draws_follow_the_filtered_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sequences = [
        Sequence(i, 0, [0], 1, 9, i, SamplingParams(temperature=0.7, top_k=3), frozenset()) for i in range(6000)
    ]
    found = torch.bincount(draw(logits.repeat(6000, 1), sequences).tokens, minlength=4) / 6000
    expected = torch.softmax(keep_likely(logits / 0.7, SamplingParams(top_k=3)), 0)
    assert expected[3] == 0 == found[3] and torch.allclose(found, expected, atol=0.03)
    numbers = torch.tensor([[uniform(seed, position) for position in range(200)] for seed in range(100)])
    assert 0 <= numbers.min() and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.01
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 0.4  # neighbouring seeds have nothing in common


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: transformers.BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4), "other means"),
        (
            lambda: transformers.GptOssConfig(**COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
            "not supported: results are",
        ),
        (lambda: transformers.MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2), "another attention"),
    ],
)
def test_models_that_it_would_get_wrong_are_refused(config, reason):
    model = transformers.AutoModelForCausalLM.from_config(config()).eval()
    with pytest.raises(ModelRefused, match=reason):
        build_decoder(model, 64, 40)


def test_kernels_are_those_in_c_where_they_fit():
    from services.worker.engine.kernels.kernels import HeadShape

    row = torch.zeros(64)
    assert isinstance(pick_kernels([HeadShape(4, 2, 32)], row), CpuKernels)
    assert not isinstance(pick_kernels([HeadShape(4, 2, 20)], row), CpuKernels)
    assert not isinstance(pick_kernels([HeadShape(32, 1, 32)], row), CpuKernels)
    assert not isinstance(pick_kernels([HeadShape(4, 2, 32)], row.half()), CpuKernels)


@pytest.mark.parametrize(
    "params", [{"temperature": 1e-46}, {"temperature": 1e-39, "top_p": 0.5}, {"temperature": 2e-5}]
)
def test_the_coldest_temperatures_draw_the_likeliest_token(params):
    """In float32 they are nothing, or so little that a logit divided by them is no number: that ended the process."""
    engine = make_engine(make_model("llama"))
    wanted = prompts(3)
    greedy = run(engine, requests(wanted))
    found = run(engine, requests(wanted, **params))
    assert [tokens(found[i]) for i in range(3)] == [tokens(greedy[i]) for i in range(3)]


@pytest.mark.parametrize("penalty", [0.01, 10.0])
def test_the_strongest_penalties_leave_a_token_to_draw(penalty):
    engine = make_engine(make_model("llama"))
    answers = run(engine, requests(prompts(3), temperature=1.0, repetition_penalty=penalty))
    assert all(len(tokens(answer)) == 24 for answer in answers.values())


def test_cached_tokens_of_several_prompts_are_all_counted():
    engine = make_engine(make_model("llama"))
    texts = [text for text in prompts(20) if len(text) > 32][:2]
    params = SamplingParams(max_tokens=2, n=2, ignore_eos=True)
    first = run(engine, [Request(0, "complete", prompts=texts, params=params)])[0]
    again = run(engine, [Request(1, "complete", prompts=texts, params=params)])[1]
    blocks = sum((len(text) - 1) // BLOCK_TOKENS * BLOCK_TOKENS for text in texts)
    assert first.cached_tokens == 0 and again.cached_tokens == blocks > 0


def test_nothing_stops_an_answer_that_is_shorter_than_it_must_be():
    engine = make_engine(make_model("llama"))
    text = prompts(1)
    whole = tokens(run(engine, requests(text))[0])
    stop = str(whole[2])
    assert len(tokens(run(engine, requests(text, stop=(stop,)))[0])) == 2

    answer = run(engine, requests(text, stop=(stop,), min_tokens=10))[0]
    later = [place for place in range(10, 24) if stop in str(whole[place])]
    assert tokens(answer) == whole[: later[0] if later else 24]


def test_a_longrope_model_is_served_as_far_as_places_are_all_that_counts():
    """Beyond, all that is computed together is encoded otherwise as soon as one sequence is long."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 64, **factors}
    config = {"max_position_embeddings": 256, "original_max_position_embeddings": 64, "rope_parameters": rope}
    assert context_of(config) == 64
    assert context_of({"max_position_embeddings": 256}) == 256
    assert context_of({"n_positions": 1024, "rope_scaling": None}) == 1024


MIXED = [
    *({}, {"temperature": 0.9}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 0.7, "logprobs": 3}),
    *({"presence_penalty": 1.5}, {"min_tokens": 7, "ignore_eos": False}, {"ignore_eos": False}, {"max_tokens": 1}),
    *(
        {"logit_bias": {7: 3.0}, "temperature": 0.8},
        {"stop": ("1", "77")},
        {"n": 3, "temperature": 1.2},
        {"max_tokens": 31},
        {"logprobs": 0},
    ),
]
"""Kinds of requests that need to know their tokens before the next is drawn, that end by themselves, and others."""


def mixed_requests(count):
    texts = [text * 2 for text in prompts(count, seed=8)]
    made = []
    for number, text in enumerate(texts):
        params = SamplingParams(
            **{"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, "seed": number} | MIXED[number % len(MIXED)]
        )
        online = number % 5 == 0
        made.append(
            Request(number, "complete", prompts=[text], params=params, is_online=online, is_streamed=number % 3 == 0)
        )
    return made


def run_arriving(engine, wanted, given_up=None):
    """Answer requests of which three come at each step; return answers and streamed texts.

    given_up: Requests that are aborted so many steps after they came.
    """
    answers, streamed, doomed = {}, {}, {}
    waiting = iter(wanted)
    for step in count():
        arrived = list(islice(waiting, 3))
        if not arrived and engine.wait_seconds() is None:
            break
        for request in arrived:
            engine.add(request)
            if request.id in (given_up or {}):
                doomed[request.id] = step + given_up[request.id]
        output = engine.step()
        for delta in output.deltas:
            streamed.setdefault((delta.id, delta.index), []).append(delta.text)
        for response in output.responses:
            answers[response.id] = (response.choices, response.logprobs, response.completion_tokens)
        for number in [number for number, end in doomed.items() if end == step]:
            engine.abort(number)
        engine.check_integrity()
    assert engine.pool.in_use == 0
    return answers, {key: "".join(pieces) for key, pieces in streamed.items()}


@pytest.mark.parametrize("blocks", [400, 26])
def test_planning_ahead_changes_no_answer(blocks):
    """Also where sequences are put back for want of blocks, end by themselves, and need to know their tokens."""
    wanted = mixed_requests(60)
    plain = make_engine(make_model("llama"), eos=frozenset({5, 9, 100}), blocks=blocks, most_sequences=12)
    ahead = make_engine(
        make_model("llama"), eos=frozenset({5, 9, 100}), blocks=blocks, most_sequences=12, plans_ahead=True
    )
    expected = run_arriving(plain, wanted)
    assert run_arriving(ahead, wanted) == expected
    assert len(expected[0]) == 60 and {"stop", "length"} == {c[1] for a in expected[0].values() for c in a[0]}
    assert (ahead.scheduler.preemptions > 20) == (blocks == 26)
    # Again, and some are given up at every point of their lives: the others' answers stay as they are.
    given_up = {number: number // 5 for number in range(0, 60, 5)}
    answers, _ = run_arriving(ahead, wanted, given_up)
    assert len(answers) < 60
    for number, answer in expected[0].items():
        assert number in given_up or answers[number] == answer


def test_planning_ahead_reads_a_step_when_the_next_is_under_way():
    """Sequences that go on are a step ahead of what is known of them; nothing is computed for those at their limit."""
    engine = make_engine(make_model("llama"), plans_ahead=True)
    for request in requests(prompts(4), max_tokens=5):
        engine.add(request)
    known = []
    while engine.wait_seconds() is not None:
        engine.step()
        known.append(engine.tokens)
    assert known == [0, 4, 8, 12, 16, 20]
    assert engine.scheduler.sequences == 4 * 5 and engine.scheduler.steps == 5
