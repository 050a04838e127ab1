"""What users have today: `KIND MODEL DTYPE`, KIND `continuous` (transformers' own batching) or `threads` (a pool of
eight around `generate()`, as tutorials show). Greedy, no end token, token ids in and out.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from tests.benchmarks.peers.rounds import Answers, serve_rounds

NO_EOS = -1
POOL = 8


def continuous(model):
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_EOS, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=32,
            num_blocks=1024,
            max_batch_tokens=512,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        ),
    )
    manager.start()
    rounds = 0

    def run(jobs: list[dict]) -> Answers:
        nonlocal rounds
        rounds += 1
        names = [f"{rounds}:{number}" for number in range(len(jobs))]
        for name, job in zip(names, jobs, strict=True):
            manager.add_request(job["prompt"], request_id=name, max_new_tokens=job["max_tokens"])
        answers = {}
        while len(answers) < len(jobs):
            result = manager.get_result(timeout=1.0)
            if result is None and not manager.is_running():
                raise RuntimeError("its thread has ended")
            if result is not None and result.is_finished():
                answers[result.request_id] = list(result.generated_tokens)
        return [answers[name] for name in names]

    return run


def threads(model):
    def one(job: dict) -> list[int]:
        prompt = torch.tensor([job["prompt"]])
        with torch.inference_mode():
            out = model.generate(
                prompt, max_new_tokens=job["max_tokens"], do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return out[0, prompt.shape[1] :].tolist()

    def run(jobs: list[dict]) -> Answers:
        with ThreadPoolExecutor(POOL) as pool:
            return list(pool.map(one, jobs))

    return run


def main() -> None:
    kind, directory, dtype = sys.argv[1:4]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    serve_rounds({"continuous": continuous, "threads": threads}[kind](model))


if __name__ == "__main__":
    main()
