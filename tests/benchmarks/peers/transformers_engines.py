"""What users have today: `KIND MODEL DTYPE`, KIND `continuous` (transformers' own batching) or `threads` (a pool of
eight around `generate()`, as tutorials show). Greedy, no end token, token ids in and out.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from tests.benchmarks.peers.rounds import serve_rounds

NO_EOS = -1


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

    def run(jobs):
        nonlocal rounds
        rounds += 1
        for number, job in enumerate(jobs):
            manager.add_request(job["prompt"], request_id=f"{rounds}:{number}", max_new_tokens=job["max_tokens"])
        done = tokens = 0
        while done < len(jobs):
            result = manager.get_result(timeout=1.0)
            if result is not None and result.is_finished():
                done += 1
                tokens += len(result.generated_tokens)
        return tokens

    return run


def threads(model):
    def one(job):
        prompt = torch.tensor([job["prompt"]])
        with torch.inference_mode():
            out = model.generate(
                prompt, max_new_tokens=job["max_tokens"], do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return out.shape[1] - prompt.shape[1]

    def run(jobs):
        with ThreadPoolExecutor(8) as pool:
            return sum(pool.map(one, jobs))

    return run


def main() -> None:
    kind, directory, dtype = sys.argv[1:4]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    serve_rounds({"continuous": continuous, "threads": threads}[kind](model))


if __name__ == "__main__":
    main()
