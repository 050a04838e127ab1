"""Our engine with nothing around it, as one side of a comparison: `MODEL DTYPE [DEVICE KV_TOKENS]`; see `peers.rounds`.

The model's tokenizer writes tokens as numbers (`engine_workloads.number_tokenizer`), so that a text says which they were.
"""

import sys

from services.worker.engine.loading import load_model
from services.worker.protocol import ModelSpec, Request, SamplingParams
from shared.model_files import DEFAULT_KV_TOKENS
from tests.benchmarks.peers.rounds import Answers, serve_rounds

CONTEXT = 2048


def main() -> None:
    directory, dtype, *place = sys.argv[1:]
    device, kv_tokens = (place[0], int(place[1])) if place else ("cpu:0", DEFAULT_KV_TOKENS)
    engine = load_model(
        ModelSpec("ours", "causal_lm", directory, dtype=dtype, context_length=CONTEXT), device, kv_tokens
    )

    def run(jobs: list[dict]) -> Answers:
        for number, job in enumerate(jobs):
            params = SamplingParams(max_tokens=job["max_tokens"], temperature=0, ignore_eos=True)
            engine.add(Request(number, "complete", prompts=[job["prompt"]], params=params))
        texts: dict[int, str] = {}
        while len(texts) < len(jobs):
            for response in engine.step().responses:
                if response.fault is not None:
                    raise RuntimeError(response.fault.message)
                texts[response.id] = response.choices[0][0]
        engine.check_integrity()
        return [[int(word) for word in texts[number].split()] for number in range(len(jobs))]

    serve_rounds(run)


if __name__ == "__main__":
    main()
