"""Rows of several LoRA adapters in one batch: each as peft's merged model answers, and as it would alone."""

import json
import threading
import time

import numpy as np
import pytest
import torch

from services.worker.engine.adapters import adapter_bytes, route
from services.worker.engine.kernels.cpu import CpuKernels
from services.worker.engine.kernels.kernels import AdapterRows, LoraPart
from services.worker.engine.kernels.reference import TorchKernels
from services.worker.engine.loading import model_bytes
from services.worker.model_cache import AdapterHost
from services.worker.protocol import ModelSpec
from shared.domain.errors import ModelRefused
from tests.support.adapters import write_adapter
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

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

RANKS = (4, 8, 16, 32, 64)
DTYPES = [torch.float32, torch.bfloat16]
ATTENTION = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}
"""Attention's own matrices, where they are not q_proj and v_proj."""


def attention_of(name):
    return ATTENTION.get(name, ["q_proj", "v_proj"])


def with_adapters(directory, name, dtype=torch.float32, *, targets=None, ranks=RANKS, **config):
    """Return an engine, its adapters' directories ("" for the base), and for each the model that answers as it does."""
    engine, models, sources = make_engine(make_model(name, dtype), **config), [make_model(name, dtype)], [""]
    for number, rank in enumerate(ranks):
        source = directory / f"adapter-{number}"
        # One in three scales by the root of its rank (rsLoRA).
        models.append(write_adapter(make_model(name, dtype), source, seed=100 + number, rank=rank, targets=targets,
                                    use_rslora=number % 3 == 1))  # fmt: skip
        sources.append(str(source))
        engine.attach(str(source), engine.load_adapter(str(source)))
    return engine, sources, models


def asked(texts, sources, **params):
    """Return requests for the sources in turn."""
    wanted = requests(texts, **params)
    for request in wanted:
        request.adapter = sources[request.id % len(sources)]
    return wanted


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma", "gemma3", "phi3"])
def test_answers_are_those_of_merged_weights(tmp_path, name, targets):
    """Ranks 4 to 64 and the base in one batch: greedy tokens are generate()'s, log-probabilities within 1e-4."""
    engine, sources, models = with_adapters(
        tmp_path, name, targets=attention_of(name) if targets == "attention" else targets
    )
    is_fused = type(engine._decoder).__name__ == "FusedDecoder"
    assert isinstance(engine, AdapterHost) and is_fused == (name not in ("gemma3", "phi3"))
    texts = prompts(18)
    answers = run(engine, asked(texts, sources, logprobs=1))
    for i, text in enumerate(texts):
        model, found = models[i % len(models)], tokens(answers[i])
        wanted = generate(model, text, 24)
        assert found == wanted or is_tie(model, text, wanted, found), i
        logprobs = logits_after(model, text, found).log_softmax(-1)
        said = [each.logprob for each in answers[i].logprobs[0]]
        assert max(abs(float(row[token]) - one) for row, token, one in zip(logprobs, found, said, strict=True)) < 1e-4
    alike = run(engine, asked([texts[8]] * len(sources), sources, logprobs=1)).values()
    own = {tuple((each.token, each.logprob) for each in answer.logprobs[0]) for answer in alike}
    assert len(own) == len(sources), "each has an answer of its own"


def test_patterns_give_modules_ranks_and_scales_of_their_own(tmp_path):
    engine = make_engine(make_model("llama"))
    merged = write_adapter(
        make_model("llama"), tmp_path, seed=3, rank=8, targets="all-linear",
        rank_pattern={"down_proj": 2, "layers.1.self_attn.q_proj": 16}, alpha_pattern={"^model.layers.0.mlp.up_proj": 40},
    )  # fmt: skip
    engine.attach("x", engine.load_adapter(str(tmp_path)))
    (text,) = prompts(1, seed=6)
    answer = tokens(run(engine, asked([text], ["x"]))[0])
    wanted = generate(merged, text, 24)
    assert answer == wanted or is_tie(merged, text, wanted, answer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(each, marks=pytest.mark.long) for each in ("gpt2", "gemma3", "phi3"))]
)
def test_the_same_answer_in_every_company(tmp_path, name, dtype):
    """Alone; among others of the same adapter, of all, and of the base, in batches of 2 to 64; in chunks; preempted."""
    sources = with_adapters(tmp_path, name, dtype, targets="all-linear")[1]
    wanted = asked(prompts(48), sources, temperature=0.9, top_p=0.95, logprobs=1)

    def answers(batch, order=None, **config):
        engine = make_engine(make_model(name, dtype), **config)
        for source in sources[1:]:
            engine.attach(source, engine.load_adapter(source))
        found, todo = {}, wanted if order is None else sorted(wanted, key=order)
        for start in range(0, len(todo), batch):
            found |= run(engine, todo[start : start + batch])
        return {i: [(each.token, each.logprob) for each in answer.logprobs[0]] for i, answer in found.items()}, engine

    alone = answers(1)[0]
    for batch in (2, 3, 17, 64):
        assert answers(batch)[0] == alone, batch
    assert answers(8, order=lambda request: request.adapter)[0] == alone  # a batch is all of one adapter, or nearly
    assert answers(64, step_tokens=5, online_step_tokens=5, fewest_prompt_tokens=5)[0] == alone
    crowded, engine = answers(64, blocks=13)
    assert engine.scheduler.preemptions > 20 and crowded == alone
    never = make_engine(make_model(name, dtype))
    base = [request for request in wanted if not request.adapter]
    without = {i: [(each.token, each.logprob) for each in a.logprobs[0]] for i, a in run(never, base).items()}
    assert without == {i: alone[i] for i in without} and len(without) == 8


def test_a_step_without_adapters_is_the_bases_alone(tmp_path, monkeypatch):
    engine, sources, _ = with_adapters(tmp_path, "llama", ranks=(4,))
    calls = []
    kernels = engine._decoder._kernels
    monkeypatch.setattr(kernels, "add_adapters", lambda *_: calls.append(1))
    run(engine, asked(prompts(6), [""]))
    assert calls == [] and route([(None, 3), (None, 1)]) is None
    run(engine, asked(prompts(6), sources))
    assert calls


def test_a_prefix_is_shared_within_an_adapter_and_with_nobody_else(tmp_path):
    engine, sources, _ = with_adapters(tmp_path, "llama", ranks=(4, 4))
    text = prompts(9)[8] * 3

    def cached(source, namespace=""):
        (request,) = asked([text], [source], max_tokens=2)
        request.namespace = namespace
        return run(engine, [request])[0].cached_tokens

    assert [cached(source) for source in sources] == [0, 0, 0]
    shared = (len(text) - 1) // 16 * 16
    assert [cached(source) for source in sources] == [shared] * 3
    assert cached(sources[1], "another tenant") == 0
    engine.detach(sources[1])
    engine.attach(sources[1], engine.load_adapter(sources[1]))
    assert cached(sources[1]) == shared  # the same content, whenever it was loaded


def test_what_adapters_take_is_accounted_for_exactly(tmp_path):
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        engine = make_engine(make_model("llama", getattr(torch, dtype)))
        before = engine.weight_bytes
        source = tmp_path / dtype
        write_adapter(make_model("llama"), source, seed=1, rank=16)
        adapter = engine.load_adapter(str(source))
        engine.attach(str(source), adapter)
        # q is [64, 64], v [32, 64], in three layers.
        expected = 3 * 16 * (64 + 64 + 64 + 32) * width
        assert adapter.bytes == engine.weight_bytes - before == adapter_bytes(source, width) == expected
        spec = ModelSpec("a", "causal_lm", "/base", dtype=dtype, base="b", adapter=str(source))
        assert model_bytes(spec) == expected
        engine.detach(str(source))
        assert engine.weight_bytes == before
    small = tmp_path / "small"
    write_adapter(make_model("llama"), small, seed=1, rank=3, targets="all-linear")
    assert engine.load_adapter(str(small)).bytes <= adapter_bytes(small, 2)  # which is what room is made for


def test_an_adapter_that_does_not_fit_or_is_damaged_is_refused_with_the_reason(tmp_path):
    engine = make_engine(make_model("llama"))

    def reason(source):
        with pytest.raises(ModelRefused) as caught:
            engine.load_adapter(str(source))
        return caught.value.message

    write_adapter(make_model("gpt2"), tmp_path / "other", seed=1, rank=4)
    assert "no layer 'transformer.h.0.attn.c_attn'" in reason(tmp_path / "other")
    write_adapter(make_model("qwen3"), tmp_path / "wider", seed=1, rank=4)
    assert "for a matrix of [128, 64]; its base's has [64, 64]" in reason(tmp_path / "wider")
    write_adapter(make_model("llama"), tmp_path / "head", seed=1, rank=4, targets=["lm_head"])
    assert "lm_head" in reason(tmp_path / "head")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    write_adapter(make_model("llama"), tmp_path / "cut", seed=1, rank=4)
    weights.write_bytes(weights.read_bytes()[:-8])
    assert reason(tmp_path / "cut") == "adapter_model.safetensors is cut off."
    weights.unlink()
    assert "There is no adapter_model.safetensors" in reason(tmp_path / "cut")
    assert "There is no adapter_config.json" in reason(tmp_path / "nowhere")
    assert run(engine, requests(prompts(2)))  # and everything else goes on


def test_loading_goes_on_beside_the_engines_steps(tmp_path):
    """An adapter is read in a thread of its own, whole, while others generate."""
    engine, sources, models = with_adapters(tmp_path, "llama", ranks=(8,))
    write_adapter(make_model("llama"), tmp_path / "late", seed=9, rank=64, targets="all-linear")
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(engine.load_adapter(str(tmp_path / "late"))))
    for request in asked(prompts(8), sources):
        engine.add(request)
    engine.step()
    thread.start()
    answers, deadline = {}, time.monotonic() + 60
    while len(answers) < 8:
        answers |= {response.id: response for response in engine.step().responses}
        assert time.monotonic() < deadline
    thread.join()
    engine.attach("late", loaded[0])
    (text,) = prompts(1)
    assert tokens(run(engine, asked([text], ["late"]))[0]) != generate(models[0], text, 24)


def test_a_model_with_code_of_its_own_or_experts_adapts_what_sees_every_row(tmp_path):
    """A router sends a token to some of the experts: what is adapted there would be adapted for other tokens."""
    engine = make_engine(make_model("gemma3"))
    names = {part.module for linear in engine._decoder._products for part in linear.parts}
    assert "model.layers.0.mlp.down_proj" in names and "lm_head" not in names
    assert len(names) == 3 * 7


# The kernels


def lora(dtype, inputs, columns, rank, start=0, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inputs, generator=generator), torch.randn(columns, rank, generator=generator)
    return LoraPart(start, (a / inputs**0.5).to(dtype), b.to(dtype), scale)


def adapters_for(kernels, dtype, inputs=72):
    """Return adapters of a product [inputs, 96 + 32 + 21], of which each changes other parts."""
    return [
        kernels.pack_adapter([[], parts])
        for parts in (
            [lora(dtype, inputs, 96, 4), lora(dtype, inputs, 21, 4, start=128, seed=1)],
            [lora(dtype, inputs, 96, 33), lora(dtype, inputs, 32, 16, 96, 2), lora(dtype, inputs, 21, 1, 128, 3, 2.0)],
            [lora(dtype, inputs, 149, 64, 0, 4)],
            [],
        )
    ]


def step_of(adapters, owners):
    """Return the routing of rows to adapters, by number; -1 for the base."""
    rows = [np.array([r for r, owner in enumerate(owners) if owner == n], np.int32) for n in range(len(adapters))]
    present = [n for n in range(len(adapters)) if len(rows[n])]
    return AdapterRows([adapters[n] for n in present], [rows[n] for n in present], frozenset({1}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_adds_what_torch_adds(dtype):
    generator = torch.Generator().manual_seed(1)
    owners = [n % 5 - 1 for n in range(60)] + [2] * 40
    x, base = (torch.randn(100, width, generator=generator).to(dtype) for width in (72, 149))
    results = []
    for kernels in (CpuKernels(), TorchKernels()):
        out = base.clone()
        kernels.add_adapters(out, x, 1, step_of(adapters_for(kernels, dtype), owners))
        results.append(out)
    close = {"atol": 2e-5, "rtol": 2e-5} if dtype is torch.float32 else {"atol": 4e-2, "rtol": 4e-2}
    torch.testing.assert_close(*results, **close)
    for row, owner in enumerate(owners):
        assert torch.equal(results[0][row], base[row]) == (owner in (-1, 3)), row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", [CpuKernels, TorchKernels])
def test_a_row_is_the_same_in_any_grouping(kernels, dtype):
    """Alone, among 1 to 40 rows of its adapter, among others', at any place: the same bits."""
    kernels = kernels()
    adapters = adapters_for(kernels, dtype)
    generator = torch.Generator().manual_seed(2)
    x, base = (torch.randn(64, width, generator=generator).to(dtype) for width in (72, 149))

    def result(row, owner, company):
        order = [row, *(r for r in range(64) if r != row)][: len(company) + 1]
        owners = [owner, *company]
        shuffle = np.random.default_rng(len(company) + row).permutation(len(order))
        rows = [order[place] for place in shuffle]
        out = base[rows].clone()
        kernels.add_adapters(out, x[rows].clone(), 1, step_of(adapters, [owners[place] for place in shuffle]))
        return out[rows.index(row)]

    for owner in range(3):
        for row in range(4):
            alone = result(row, owner, [])
            for others in range(1, 41):
                assert torch.equal(result(row, owner, [owner] * others), alone), others
            assert torch.equal(result(row, owner, [(n % 5) - 1 for n in range(50)]), alone)


def test_reading_holds_the_files_number_types(tmp_path):
    """peft writes float32 beside a bfloat16 base; the adapter is held in its base's number type."""
    write_adapter(make_model("llama", torch.bfloat16), tmp_path, seed=1, rank=8)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    engine = make_engine(make_model("llama", torch.bfloat16))
    packed = engine.load_adapter(str(tmp_path)).packed
    assert {tensor.dtype for tensor in packed._tensors} == {torch.bfloat16}
