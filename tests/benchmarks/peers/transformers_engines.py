"""What users have today: `KIND MODEL DTYPE [DEVICE]`. Greedy, no end token, token ids in and out. Kinds:

`continuous` (transformers' own batching), `threads` (a pool of eight around `generate()`, as tutorials show), `alone`
(`generate()`, one after another), `static` (batches of 16 in the order of their coming), `sorted` (one batch of all).
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


CPU_SETTINGS = {
    "page_size": 32,
    "num_blocks": 1024,
    "max_batch_tokens": 512,
    "use_async_batching": False,
    "use_cuda_graph": False,
    "auto_switch_to_flash": False,
}
"""On a GPU it has its own."""


def continuous(model):
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_EOS, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(**(CPU_SETTINGS if model.device.type == "cpu" else {})),
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


def static(model, size: int | None):
    """Batches padded on the left, each as long as its longest answer; None: one batch of all, sorted by length."""

    def batch(jobs: list[dict]) -> Answers:
        longest = max(len(job["prompt"]) for job in jobs)
        ids = torch.tensor([[0] * (longest - len(job["prompt"])) + job["prompt"] for job in jobs])
        mask = torch.tensor([[0] * (longest - len(job["prompt"])) + [1] * len(job["prompt"]) for job in jobs])
        most = max(job["max_tokens"] for job in jobs)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=most, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return [row[longest : longest + job["max_tokens"]].tolist() for row, job in zip(out, jobs, strict=True)]

    def run(jobs: list[dict]) -> Answers:
        order = list(range(len(jobs)))
        if size is None:
            order.sort(key=lambda place: len(jobs[place]["prompt"]))
        answers = {}
        step = size or len(jobs)
        for start in range(0, len(order), step):
            places = order[start : start + step]
            answers |= zip(places, batch([jobs[place] for place in places]), strict=True)
        return [answers[place] for place in range(len(jobs))]

    return run


KINDS = {
    "continuous": continuous,
    "threads": threads,
    "alone": lambda model: static(model, 1),
    "static": lambda model: static(model, 16),
    "sorted": lambda model: static(model, None),
}


def main() -> None:
    kind, directory, dtype, *device = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    model = model.to(device[0] if device else "cpu")
    serve_rounds(KINDS[kind](model))


if __name__ == "__main__":
    main()
