"""The engine alone, in a process of its own: for each line on standard input, one streamed request; prints seconds."""

import sys
import time

from services.worker.engine.loading import load_model
from services.worker.protocol import ModelSpec, Request, SamplingParams


def main() -> None:
    spec = ModelSpec("tiny", "causal_lm", sys.argv[1], dtype="float32", context_length=256)
    engine = load_model(spec, "cpu:0")
    messages = [{"role": "user", "content": "go"}]
    for number, _ in enumerate(sys.stdin):
        params = SamplingParams(max_tokens=8, temperature=0)
        started = time.perf_counter()
        engine.add(Request(number, "chat", messages=messages, params=params, is_streamed=True))
        first = None
        while True:
            output = engine.step()
            if output.deltas and first is None:
                first = time.perf_counter() - started
            if output.responses:
                break
            time.sleep(engine.wait_seconds() or 0)
        print(first if first is not None else time.perf_counter() - started, flush=True)
    engine.close()  # or its thread would outlive this


if __name__ == "__main__":
    main()
