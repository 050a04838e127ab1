"""Our generation engine against transformers' `generate()`, and against itself in other company."""

import pytest
import torch
import transformers

from services.worker.engine.decoding import build_decoder, pick_kernels
from services.worker.engine.generation import GenerationEngine
from services.worker.engine.kernels.cpu import CpuKernels
from services.worker.engine.prompts import Prompts
from services.worker.engine.sampling import keep_likely, uniform
from services.worker.engine.scheduler import SchedulerConfig
from services.worker.protocol import Request, SamplingParams
from shared.domain.errors import ModelRefused

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

VOCABULARY = 512
CONTEXT = 192
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
SHAPES = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=32),
    "gemma": lambda: transformers.GemmaConfig(**COMMON, head_dim=32),
    "mistral-window": lambda: transformers.MistralConfig(**COMMON, sliding_window=12),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=256),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=12),
    "phi3": lambda: transformers.Phi3Config(**COMMON, pad_token_id=0),
}
FUSED = {"llama", "qwen2", "qwen3", "gemma", "mistral-window", "gpt2"}


class NumberTokenizer:
    """Tokens as numbers: what is compared is what the model draws."""

    chat_template = None

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


def make_model(name, dtype=torch.float32):
    torch.manual_seed(7)
    config = SHAPES[name]()
    # Random weights draw the same token again and again; larger ones make the choice change with the input.
    config.initializer_range = 0.2
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def make_engine(model, *, blocks=400, **config):
    decoder = build_decoder(model, CONTEXT, blocks)
    return GenerationEngine(
        decoder,
        Prompts(NumberTokenizer(), VOCABULARY, CONTEXT, frozenset()),
        blocks,
        SchedulerConfig(**config) if config else None,
    )


def prompts(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (3 + 5 * (i % 9),), generator=generator).tolist() for i in range(count)]


def requests(texts, **params):
    chosen = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True} | params
    return [
        Request(i, "complete", prompts=[text], params=SamplingParams(**chosen | {"seed": 1000 + i}))
        for i, text in enumerate(texts)
    ]


def run(engine, wanted):
    for request in wanted:
        engine.add(request)
    answers = {}
    while engine.wait_seconds() is not None:
        answers |= {response.id: response for response in engine.step().responses}
    engine.check_integrity()
    return answers


def tokens(response):
    return [int(token) for token in response.choices[0][0].split()]


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_tokens_are_generates(name):
    reference = make_model(name)
    texts = prompts(18)
    expected = []
    with torch.inference_mode():
        for text in texts:
            out = reference.generate(
                torch.tensor([text]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            expected.append(out[0, len(text) :].tolist())
    engine = make_engine(make_model(name))
    assert (type(engine._decoder).__name__ == "FusedDecoder") == (name in FUSED)
    answers = run(engine, requests(texts))
    for i, wanted in enumerate(expected):
        found = tokens(answers[i])
        if found != wanted:
            _assert_a_tie(reference, texts[i], wanted, found)


def _assert_a_tie(reference, text, wanted, found):
    """A difference counts unless the reference's two best logits at that place are all but equal."""
    place = next(i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)
    with torch.inference_mode():
        logits = reference(torch.tensor([text + wanted[:place]])).logits[0, -1]
    best = logits.topk(2).values
    assert best[0] - best[1] < 1e-4, (place, wanted, found)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_longer_than_a_step_alone(name):
    """No token is drawn in the steps before its last: such a step once ended the child."""
    text = prompts(9)[8] * 3
    (whole,) = run(make_engine(make_model(name)), requests([text])).values()
    (in_steps,) = run(
        make_engine(make_model(name), step_tokens=40, online_step_tokens=40, fewest_prompt_tokens=8), requests([text])
    ).values()
    assert len(text) > 3 * 40 and tokens(in_steps) == tokens(whole)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3"])
def test_logprobs_are_transformers(name):
    reference = make_model(name)
    (text,) = prompts(1, seed=5)
    answer = run(make_engine(make_model(name)), requests([text], logprobs=5, temperature=0.8))[0]
    drawn = tokens(answer)
    with torch.inference_mode():
        logits = reference(torch.tensor([text + drawn])).logits[0, len(text) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert len(answer.logprobs[0]) == len(drawn) == 24
    for place, (each, token) in enumerate(zip(answer.logprobs[0], drawn, strict=True)):
        assert each.token == str(token) and abs(each.logprob - float(expected[place, token])) < 1e-4
        values, indexes = expected[place].topk(5)
        assert [top.token for top in each.top] == [str(index) for index in indexes.tolist()]
        assert max(abs(top.logprob - value) for top, value in zip(each.top, values.tolist(), strict=True)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3"])
def test_the_same_answer_in_every_company(name, dtype):
    """Alone; in batches of 2 and 64; in chunks of 5 tokens; preempted again and again; from a cached prefix; all over."""
    texts = prompts(50)
    wanted = requests(texts, temperature=0.9, top_p=0.95)

    def answers(batch, **config):
        engine = make_engine(make_model(name, dtype), **config)
        found = {}
        for start in range(0, len(wanted), batch):
            found |= run(engine, wanted[start : start + batch])
        return {i: tokens(answer) for i, answer in found.items()}, engine

    alone, engine = answers(1)
    again = {i: tokens(answer) for i, answer in run(engine, wanted).items()}  # the prompts' blocks are cached by now
    assert engine.pool.cached and again == alone
    for batch in (2, 64):
        assert answers(batch)[0] == alone, batch
    assert answers(64, step_tokens=5, online_step_tokens=5, fewest_prompt_tokens=5)[0] == alone
    crowded, engine = answers(64, blocks=13)
    assert engine.scheduler.preemptions > 20 and crowded == alone


def test_answers_of_one_prompt_share_it_and_differ():
    engine = make_engine(make_model("llama"))
    text = prompts(9)[8] * 2
    params = SamplingParams(max_tokens=8, temperature=1.0, n=6, seed=3, ignore_eos=True)
    answer = run(engine, [Request(1, "complete", prompts=[text], params=params)])[1]
    assert len({text for text, _ in answer.choices}) > 3 and answer.completion_tokens == 48
    assert engine.scheduler.prompt_tokens_computed < len(text) + 6 * 16
    apart = [
        run(engine, [Request(2, "complete", prompts=[text], params=SamplingParams(
            max_tokens=8, temperature=1.0, seed=3 + index, ignore_eos=True))])[2].choices[0]
        for index in range(6)
    ]  # fmt: skip
    assert apart == answer.choices


def test_penalties_biases_and_least_tokens():
    model = make_model("llama")
    with torch.inference_mode():
        text = prompts(1)[0]
        logits = model(torch.tensor([text])).logits[0, -1]
    best, second = logits.topk(2).indexes if hasattr(logits.topk(2), "indexes") else logits.topk(2).indices
    gap = float(logits[best] - logits[second])
    engine = make_engine(model)

    def first(**params):
        return tokens(run(engine, requests([text], **params))[0])

    assert first()[0] == best
    assert first(logit_bias={int(best): -gap - 0.1})[0] == second
    assert set(first(logit_bias={7: 100.0})) == {7}
    free = first(max_tokens=60)
    assert len(set(first(max_tokens=60, presence_penalty=2.0, frequency_penalty=2.0))) > len(set(free))
    repeated = first(max_tokens=60, logit_bias={7: 30.0}, repetition_penalty=10.0)
    assert repeated.count(7) < 60
    engine._prompts.eos = frozenset({7})
    ends = run(engine, requests([text], logit_bias={7: 100.0}, min_tokens=5, ignore_eos=False))[0]
    assert ends.completion_tokens == 6 and ends.choices[0][1] == "stop" and 7 not in tokens(ends)
    assert run(engine, requests([text], logit_bias={7: 100.0}, ignore_eos=False))[0].choices == [("", "stop")]


def test_penalties_are_the_plain_ones():
    from services.worker.engine.sampling import adjust
    from services.worker.engine.sequence import Sequence

    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0, logit_bias={4: 1.5})
    sequence = Sequence(1, 0, [0, 1], 2, 9, 0, params, frozenset({5}))
    for token in (2, 2, 3):
        sequence.append(token)
    row = torch.tensor([2.0, -2.0, 4.0, -4.0, 1.0, 1.0])
    adjust(row, sequence)
    assert row.tolist() == [1.0, -4.0, 2.0 - 0.5 - 0.5, -8.0 - 0.5 - 0.25, 2.5, 1.0]


def test_draws_follow_the_filtered_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    assert keep_likely(logits, SamplingParams(top_p=0.6)).isfinite().tolist() == [True, False, False, False]
    assert keep_likely(logits, SamplingParams(top_p=0.7)).isfinite().tolist() == [True, True, False, False]
    assert keep_likely(logits, SamplingParams(min_p=0.3)).isfinite().tolist() == [True, True, False, False]
    assert keep_likely(logits, SamplingParams(top_k=3)).isfinite().tolist() == [True, True, True, False]

    from services.worker.engine.sampling import sample
    from services.worker.engine.sequence import Sequence

    sequences = [
        Sequence(i, 0, [0], 1, 9, i, SamplingParams(temperature=0.7, top_k=3), frozenset()) for i in range(6000)
    ]
    found = torch.bincount(torch.tensor(sample(logits.repeat(6000, 1), sequences)), minlength=4) / 6000
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
    assert isinstance(pick_kernels(HeadShape(4, 2, 32), row), CpuKernels)
    assert not isinstance(pick_kernels(HeadShape(4, 2, 20), row), CpuKernels)
    assert not isinstance(pick_kernels(HeadShape(32, 1, 32), row), CpuKernels)
    assert not isinstance(pick_kernels(HeadShape(4, 2, 32), row.half()), CpuKernels)
