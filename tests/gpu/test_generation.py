"""The engine's promises on a GPU: tokens do not depend on the batch."""

import pytest
import torch

from services.worker.engine.loading import load_model
from services.worker.protocol import ModelSpec, Request, SamplingParams
from tests.support.models import make_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


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
    assert {number: together[number] for number in alone} == alone
