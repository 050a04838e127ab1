"""Drives the engine of `services.worker.engine` with nothing around it: `MODEL [DTYPE]`.

Lists of jobs come on stdin, each `{prompt, max_tokens}` with a text or token ids; see `peers.rounds`.
"""

import os
import sys
import time
from pathlib import Path

from services.worker.engine.loading import load_model
from services.worker.protocol import ModelSpec, Request, SamplingParams
from tests.benchmarks.peers.rounds import serve_rounds
from tests.support.models import tiny_tokenizer


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    directory, dtype = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "float32"
    if not (Path(directory) / "tokenizer.json").exists():
        tiny_tokenizer().save_pretrained(directory)
    engine = load_model(ModelSpec("direct", "causal_lm", directory, dtype=dtype, context_length=2048), "cpu:0")

    def run(jobs: list[dict]) -> int:
        for index, job in enumerate(jobs):
            prompts = [job["prompt"]]
            params = SamplingParams(max_tokens=job["max_tokens"], temperature=0, ignore_eos=True)
            engine.add(Request(index, "complete", prompts=prompts, params=params))
        done = tokens = 0
        while done < len(jobs):
            for response in engine.step().responses:
                if response.fault is not None:
                    raise RuntimeError(response.fault.message)
                done += 1
                tokens += response.completion_tokens
            time.sleep(engine.wait_seconds() or 0)
        return tokens

    serve_rounds(run)


if __name__ == "__main__":
    main()
