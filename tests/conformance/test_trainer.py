"""The trainer against plain loops of torch, transformers and peft: the same weights at the end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.worker.trainer.cross_entropy import summed_cross_entropy
from services.worker.trainer.data import PreparedData, micro_batches
from services.worker.trainer.errors import BaseRefused, LossNotFinite
from services.worker.trainer.language_model import load_language_model
from services.worker.trainer.lora import LoraLinear
from services.worker.trainer.trainer import Trainer
from tests.support.models import KINDS, make_tiny, make_tiny_llama, tiny_tokenizer
from tests.support.trainer_oracle import (
    CPU,
    STEPS,
    asked,
    largest_difference,
    our_run,
    plain_model,
    plain_run,
    share_of_movement,
)
from tests.support.trainer_runs import random_examples, write_prepared

pytestmark = [
    pytest.mark.engine,
    # peft 0.21.2 reads a property that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

PADDED = {"gemma2"}
"""Kinds whose attention does what packed attention does not: their examples are padded."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a function that makes the directory of a tiny model of a kind."""

    def make(kind):
        directory = tmp_path_factory.getbasetemp() / f"base-{kind}"
        return directory if directory.exists() else make_tiny(kind, directory)

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return PreparedData(write_prepared(tmp_path_factory.mktemp("data"), *random_examples(30)))


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_weights_are_those_of_a_plain_loop(bases, data, kind, full):
    hyperparameters = asked(full=full, dtype="float64", micro_batch_tokens=64)
    ours, metrics, model = our_run(bases(kind), data, hyperparameters)
    first, theirs, losses = plain_run(bases(kind), data, hyperparameters, padded=kind in PADDED)
    assert model.is_packed == (kind not in PADDED)
    assert ours.keys() == theirs.keys()
    assert largest_difference(ours, theirs) <= 1e-8
    assert largest_difference(first, theirs) > 1e-3
    assert [m.means.loss for m in metrics] == pytest.approx(losses, abs=1e-8)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_float32_weights_differ_by_little_of_how_far_they_moved(bases, data, kind, full):
    hyperparameters = asked(full=full)
    ours, _, _ = our_run(bases(kind), data, hyperparameters)
    first, theirs, _ = plain_run(bases(kind), data, hyperparameters)
    assert share_of_movement(ours, theirs, first) <= 0.005


def gradients(base, data, *, packed, budget, **fields):
    hyperparameters = asked(dtype="float64", **fields)
    model = load_language_model(base, "tiny", hyperparameters, CPU, seed=3)
    with torch.no_grad():  # an adapter's B is zero at first, and A has no gradient then
        generator = torch.Generator().manual_seed(1)
        for name, weight in model.trainable.items():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.1)
    if not packed:
        model._plain.set_attn_implementation("sdpa")
    loss, correct = 0.0, 0
    for batch in micro_batches(data, np.arange(16), budget, packed=packed):
        summed, right = model.losses(batch)
        summed.backward()
        loss, correct = loss + summed.item(), correct + int(right)
    return {name: weight.grad for name, weight in model.trainable.items()}, loss, correct


@pytest.mark.parametrize(
    "fields", [{}, {"full": True}, {"gradient_checkpointing": True}], ids=["lora", "full", "checkpointing"]
)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gpt2"])
def test_packed_gradients_are_padded_gradients(bases, data, kind, fields):
    require_alike(bases(kind), data, **fields)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_packed_gradients_of_neighbours_of_one_length_are_padded_gradients(bases, tmp_path, kind):
    """They attend as one batch: grouped heads, and a window that is shorter than an example, come along."""
    examples = random_examples(12, shortest=24, longest=24)[0] + random_examples(4, shortest=9, longest=9)[0]
    require_alike(bases(kind), PreparedData(write_prepared(tmp_path, examples)))


def require_alike(base, data, **fields):
    packed, loss, correct = gradients(base, data, packed=True, budget=150, **fields)
    is_full = fields.get("full", False)
    padded, other_loss, other_correct = gradients(base, data, packed=False, budget=10_000, full=is_full)
    assert loss == pytest.approx(other_loss, abs=1e-8) and correct == other_correct
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, padded[name], rtol=1e-7, atol=1e-9, msg=name)
    assert any(gradient.abs().max() > 1e-3 for gradient in packed.values())


def test_neither_passes_nor_checkpointing_change_the_run(bases, data):
    runs = [
        our_run(bases("llama"), data, asked(dtype="float64", **fields))
        for fields in ({}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 50}, {"gradient_checkpointing": True})
    ]
    for weights, metrics, _ in runs[1:]:
        assert all((weights[name] - runs[0][0][name]).abs().max() < 1e-9 for name in weights)
        assert [m.means.accuracy for m in metrics] == [m.means.accuracy for m in runs[0][1]]


@pytest.mark.parametrize("fields", [{}, {"lora_dropout": 0.3}, {"full": True}], ids=["lora", "dropout", "full"])
def test_the_same_seed_gives_the_same_bits_whatever_ran_before(bases, data, fields):
    first, metrics, _ = our_run(bases("llama"), data, asked(**fields))
    torch.rand(17)
    second, again, _ = our_run(bases("llama"), data, asked(**fields))
    assert metrics == again
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_that_remembers_otherwise_than_by_attention_is_padded(tmp_path, data):
    from transformers import MambaConfig

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=260, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    tiny_tokenizer().save_pretrained(tmp_path / "mamba")
    weights, metrics, model = our_run(tmp_path / "mamba", data, asked(full=True), steps=3)
    assert not model.is_packed and metrics[-1].means.loss > 0


def test_lora_is_pefts(bases):
    """Another forward pass of peft's layer: the same values and gradients, in float64 to 1e-12."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8, bias=False)).double()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"], init_lora_weights=False)
    theirs = get_peft_model(plain, config)
    ours_config = LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"], init_lora_weights=False)
    ours_config._register_custom_module({nn.Linear: LoraLinear})
    torch.manual_seed(0)
    ours = get_peft_model(nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8, bias=False)).double(), ours_config)
    ours.load_state_dict(theirs.state_dict())
    assert sum(isinstance(module, LoraLinear) for module in ours.modules()) == 2
    inputs = [torch.randn(2, 5, 12, dtype=torch.float64).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [model(x) for model, x in zip((theirs, ours), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    compared = 0
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12, msg=name)
            compared += 1
    assert compared == 4


def test_cross_entropy_is_torchs():
    torch.manual_seed(0)
    logits = torch.randn(7, 11, dtype=torch.float64).requires_grad_()
    targets = torch.randint(11, (7,))
    loss, correct = summed_cross_entropy(logits, targets)
    (loss / 3).backward()
    other = logits.detach().clone().requires_grad_()
    expected = functional.cross_entropy(other, targets, reduction="sum")
    (expected / 3).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-12, atol=1e-12)
    assert int(correct) == int((other.argmax(-1) == targets).sum())


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_bfloat16_learns_and_keeps_what_is_trained_in_float32(bases, data, full):
    weights, metrics, model = our_run(bases("llama"), data, asked(full=full, dtype="bfloat16"))
    _, expected, _ = our_run(bases("llama"), data, asked(full=full))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    frozen = {weight.dtype for weight in model._plain.parameters() if not weight.requires_grad}
    assert frozen == (set() if full else {torch.bfloat16})
    assert [m.means.loss for m in metrics] == pytest.approx([m.means.loss for m in expected], rel=0.03)


def test_an_adapter_loads_in_peft_and_computes_what_was_trained(bases, data, tmp_path):
    _, _, model = our_run(bases("llama"), data, asked())
    model.save(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny" and config["inference_mode"] is True
    assert str(tmp_path.parent) not in json.dumps(config)
    base = AutoModelForCausalLM.from_pretrained(bases("llama"))
    tokens = torch.tensor(data.tokens(1).astype(int))[None]
    before = base(input_ids=tokens).logits
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        after = loaded(input_ids=tokens).logits
        model._plain.set_attn_implementation("sdpa")
        model.train(False)
        torch.testing.assert_close(after, model._model(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_model_loads_in_transformers_with_its_tokenizer(bases, data, tmp_path, dtype):
    weights, _, model = our_run(bases("llama"), data, asked(full=True, dtype=dtype))
    model.save(tmp_path / "checkpoint")
    model.save_product(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {weight.dtype for weight in loaded.parameters()} == {getattr(torch, dtype)}
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, weights[name].to(weight.dtype))
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert all(torch.equal(weight, weights[name]) for name, weight in exact.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer("good evening")["input_ids"]) == "good evening"
    for path in (tmp_path / "model").glob("*.json"):
        assert str(tmp_path.parent) not in path.read_text()


def test_a_loss_that_is_no_number_leaves_the_weights_as_they_were(bases, data):
    hyperparameters = asked(full=True, learning_rate=1e30, warmup_ratio=0.0)
    model = load_language_model(bases("llama"), "tiny", hyperparameters, CPU, seed=3)
    trainer = Trainer(model, data, hyperparameters, seed=3)
    before = {}
    with pytest.raises(LossNotFinite) as failure:
        for _ in range(STEPS):
            before = {name: weight.detach().clone() for name, weight in model.trainable.items()}
            trainer.train_step()
    assert f"Step {trainer.state.step + 1}:" in failure.value.message
    assert all(torch.equal(weight, before[name]) for name, weight in model.trainable.items())


def test_a_validation_loss_that_is_no_number_ends_the_run(bases, data, tmp_path):
    """As one of training does; it was told as if it were one, and the checkpoint kept."""
    validation = PreparedData(write_prepared(tmp_path / "validation", *random_examples(3, seed=5)))
    model = load_language_model(bases("llama"), "tiny", asked(full=True), CPU, seed=3)
    trainer = Trainer(model, data, asked(full=True), seed=3)
    trainer.train_step()
    with torch.no_grad():
        next(iter(model.trainable.values())).fill_(float("nan"))
    with pytest.raises(LossNotFinite, match="Step 1: the validation loss is nan"):
        trainer.evaluate(validation)
    assert trainer.state.evaluated_step is None and "full_valid_loss" not in trainer.state.metrics


def test_evaluation_changes_nothing_and_is_the_mean_over_all_targets(bases, data, tmp_path):
    validation = PreparedData(write_prepared(tmp_path / "validation", *random_examples(9, seed=5)))
    hyperparameters = asked(lora_dropout=0.5, micro_batch_tokens=50)
    model = load_language_model(bases("llama"), "tiny", hyperparameters, CPU, seed=3)
    trainer = Trainer(model, data, hyperparameters, seed=3)
    means = trainer.evaluate(validation)
    plain = plain_model(bases("llama"), hyperparameters).eval()
    total = count = 0
    for example in range(len(validation)):
        tokens = torch.tensor(validation.tokens(example).astype(int))
        keep = torch.tensor(validation.targets(example))[1:]
        with torch.no_grad():
            logits = plain(input_ids=tokens[None]).logits[0, :-1]
        total += functional.cross_entropy(logits[keep], tokens[1:][keep], reduction="sum").item()
        count += int(keep.sum())
    assert means.targets == count and means.loss == pytest.approx(total / count, rel=1e-5)
    evaluated = [trainer.train_step() for _ in range(3)]
    weights, metrics, _ = our_run(bases("llama"), data, hyperparameters, steps=3)
    assert evaluated == metrics
    assert all(torch.equal(weight, weights[name]) for name, weight in model.trainable.items())


def test_an_example_without_targets_is_read_and_not_learnt(bases, tmp_path):
    examples, weights = random_examples(4)
    silent = PreparedData(write_prepared(tmp_path / "silent", [*examples, [9] * 30], [*weights, [0] * 30]))
    without = PreparedData(write_prepared(tmp_path / "without", examples, weights))
    runs = [gradients_of_all(bases("llama"), data) for data in (silent, without)]
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], rtol=1e-7, atol=1e-9)


def gradients_of_all(base, data):
    model = load_language_model(base, "tiny", asked(dtype="float64", full=True), CPU, seed=3)
    for batch in micro_batches(data, np.arange(len(data)), 10_000, packed=True):
        model.losses(batch)[0].backward()
    return {name: weight.grad for name, weight in model.trainable.items()}


def test_bases_that_cannot_be_trained_are_refused_with_the_reason(bases, tmp_path):
    with pytest.raises(BaseRefused, match="'tiny'"):
        load_language_model(tmp_path, "tiny", asked(), CPU, seed=0)
    with pytest.raises(BaseRefused, match="no_such_module"):
        load_language_model(bases("llama"), "tiny", asked(lora_targets=("no_such_module",)), CPU, seed=0)


def test_weights_that_lie_unaligned_in_their_file_are_moved(tmp_path):
    base = make_tiny_llama(tmp_path / "base")
    model = load_language_model(Path(base), "tiny", asked(), CPU, seed=0)
    assert all(weight.data_ptr() % 64 == 0 for weight in model._model.parameters())
