"""The engine's promises on a GPU: the kernels against their reference, and each row the same in any company."""

import pytest
import torch

from services.worker.engine.kernels.kernels import HeadShape, Span, plan_layout
from services.worker.engine.kernels.reference import TorchKernels
from services.worker.engine.kernels.varlen import VarlenKernels, torch_attention
from services.worker.engine.loading import load_model
from services.worker.protocol import ModelSpec, Request, SamplingParams
from tests.support.models import make_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
SHAPES = [
    HeadShape(32, 8, 128, scale=0.09),
    HeadShape(8, 8, 64, scale=0.125),
    HeadShape(4, 1, 128, scale=0.1, window=20),
]
DEVICE = torch.device("cuda:0")


def kernels():
    attention = torch_attention()
    if attention is None:
        pytest.skip("this torch has no varlen attention that serves")
    return VarlenKernels(attention)


def attend(kernels, shape, steps):
    """Return what each step's tokens attend; a step is (spans, qkv)."""
    pool = kernels.new_pool(400, shape, torch.bfloat16, DEVICE)
    outs = []
    for spans, qkv in steps:
        layout = plan_layout(spans)
        queries = kernels.prepare_heads(qkv, shape, None, None, pool, layout)
        outs.append(kernels.attend(queries, shape, pool, layout))
    return outs


def random_rows(count, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, shape.qkv_width, generator=generator).bfloat16().to(DEVICE)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_the_references(shape):
    tables = [[7, 3, 9, 1, 5], [11, 2]]
    steps = [
        ([Span(tables[0], 0, 0, 70), Span(tables[1], 0, 70, 20)], random_rows(90, shape, 1)),
        ([Span(tables[0], 70, 0, 1), Span(tables[1], 20, 1, 5)], random_rows(6, shape, 2)),
    ]
    for ours, theirs in zip(attend(kernels(), shape, steps), attend(TorchKernels(), shape, steps), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 3, 7, 16])
def test_a_tokens_attention_is_the_same_in_any_company(shape, size):
    table, rows = [7, 3, 9, 1, 5], random_rows(70, shape, 2)
    (whole,) = attend(kernels(), shape, [([Span(table, 0, 0, 70)], rows)])
    others = random_rows(600, shape, 3)
    steps = []
    for start in range(0, 70, size):
        count = min(size, 70 - start)
        company = [Span(list(range(20, 58)), 0, 0, 600)]
        steps.append(([*company, Span(table, start, 600, count)], torch.cat([others, rows[start : start + count]])))
    parts = torch.cat([out[600:] for out in attend(kernels(), shape, steps)])
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_tokens_do_not_depend_on_the_batch(tmp_path, kind):
    directory = make_tiny(kind, tmp_path / kind)
    engine = load_model(ModelSpec(kind, "causal_lm", str(directory), dtype="bfloat16"), "cuda:0")

    def run(numbers):
        for number in numbers:
            params = SamplingParams(max_tokens=24, temperature=1.0, seed=number, ignore_eos=True)
            engine.add(Request(number, "complete", prompts=[[5 + number, 9, 40 + number]], params=params))
        answers = {}
        while len(answers) < len(numbers):
            answers |= {response.id: response.choices for response in engine.step().responses}
        return answers

    together = run(range(48))
    alone = {number: run([number])[number] for number in range(0, 48, 7)}
    engine.check_integrity()
    assert {number: together[number] for number in alone} == alone
