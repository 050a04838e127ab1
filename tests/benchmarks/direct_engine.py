"""Drives the engine of `services.worker.engine` with nothing around it; prints tokens/s of each round asked for.

`python -m tests.benchmarks.direct_engine MODEL REQUESTS.jsonl`, then one line on stdin a round.
"""

import json
import os
import sys
import time

from services.worker.engine.loading import load_model
from services.worker.protocol import ModelSpec, Request, SamplingParams


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    spec = ModelSpec("direct", "causal_lm", sys.argv[1], dtype="float32", context_length=2048)
    engine = load_model(spec, "cpu:0")
    with open(sys.argv[2]) as file:
        bodies = [json.loads(line)["body"] for line in file]
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for index, body in enumerate(bodies):
            params = SamplingParams(max_tokens=body["max_tokens"], temperature=0, ignore_eos=True)
            engine.add(Request(index, "complete", prompts=[body["prompt"]], params=params))
        done, tokens = 0, 0
        while done < len(bodies):
            for response in engine.step().responses:
                done += 1
                tokens += response.completion_tokens
            time.sleep(engine.wait_seconds() or 0)
        print(tokens / (time.perf_counter() - started), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
