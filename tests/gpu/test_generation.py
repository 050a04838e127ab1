"""The engine's promises on a GPU: tokens do not depend on the batch."""

import pytest
import torch
import transformers

from services.worker.engine.architectures import fused_weights
from services.worker.engine.decoder import FusedDecoder
from services.worker.engine.kernels.kernels import BLOCK_TOKENS, Span, plan_layout
from services.worker.engine.loading import load_model
from services.worker.protocol import ModelSpec, Request, SamplingParams
from tests.support.models import make_tiny, make_tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@torch.inference_mode()
def test_a_recorded_step_is_the_plain_one(tmp_path):
    """Beside one, two and three others, and with a sequence of two parts: bit for bit."""
    from services.worker.engine.graphs import GraphedDecoder
    from services.worker.engine.kernels.gpu import PART_KEYS, GpuKernels

    directory = make_tiny_llama(tmp_path, max_position_embeddings=2048)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).cuda()
    blocks = 4 * (PART_KEYS // BLOCK_TOKENS + 2)
    plain = FusedDecoder(fused_weights(model, 2048), GpuKernels(), blocks + 1)
    recorded = GraphedDecoder(plain, 2048, blocks)
    lengths = [7, PART_KEYS + 5, 90, 33]
    tables = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).view(4, -1).tolist()
    tokens = [(number * 31) % 250 + 1 for number in range(max(lengths))]
    for table, length in zip(tables, lengths, strict=True):
        plain.forward(torch.tensor(tokens[:length]).cuda(), plan_layout([Span(table, 0, 0, length)]), [])
    for chosen in ([0], [0, 1], [2, 3, 0], [1, 0, 2, 3], [3]):
        spans = [Span(tables[number], lengths[number], row, 1) for row, number in enumerate(chosen)]
        rows = list(range(len(chosen)))
        own = torch.tensor([tokens[number] for number in chosen]).cuda()
        expected = plain.forward(own, plan_layout(spans), rows)
        assert torch.equal(recorded.forward(own, plan_layout(spans), rows), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral", "gemma2"])
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
    assert engine.plans_ahead
    assert {number: together[number] for number in alone} == alone
