"""`python -m tests.benchmarks.gpu.inside_generation`: where a step of `make bench-gpu` goes; nothing of it has a bar.

On a GPU: attention for several shapes of program, against the memory's bandwidth; steps of prompts and of decoding by
kernel; one sequence alone. On a CPU, at a small size, it only tries itself out. Table in build/bench/gpu-inside.json.
"""

import statistics
import sys
import tempfile
import time
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from services.worker.engine.kernels.kernels import BLOCK_TOKENS, HeadShape, Span, plan_layout
from services.worker.engine.loading import load_model
from services.worker.protocol import ModelSpec, Request, SamplingParams
from tests.benchmarks.gpu.bench_generation import SETTINGS, Setting, bandwidth, make_model, wait_for
from tests.benchmarks.table import Table

PROGRAMS = ((64, 4), (64, 2), (128, 4), (128, 8), (32, 4))
"""Keys at a time, and warps."""
CALLS = 50
KERNELS = 8
TOKENS_ALONE = 64


class Inside:
    """One engine over the benchmark's model."""

    def __init__(self, setting: Setting, directory: str, device: str) -> None:
        self._setting, self._device = setting, device
        spec = ModelSpec("ours", "causal_lm", directory, dtype="bfloat16", context_length=2048)
        self._engine = load_model(spec, f"{device}:0", setting.requests * (setting.prompt + setting.answer))

    def add(self, requests: int, answer: int, seed: int) -> None:
        params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
        for number, job in enumerate(self._setting.jobs(seed)[:requests]):
            self._engine.add(Request(number, "complete", prompts=[job.prompt], params=params))

    def steps(self, most: int | None = None) -> tuple[list[float], dict[int, str]]:
        """Step until nothing is left, or so often; return seconds of each step, and the answers' texts."""
        seconds, texts = [], {}
        while self._engine.scheduler.has_work and (most is None or len(seconds) < most):
            started = time.perf_counter()
            responses = self._engine.step().responses
            seconds.append(time.perf_counter() - started)
            texts |= {response.id: response.choices[0][0] for response in responses}
        return seconds, texts

    def kernels(self, answer: int, before: int) -> tuple[float, dict[str, float]]:
        """Return milliseconds of a step after `before` others, and of the kernels that take most of it."""
        self.add(self._setting.requests, answer, seed=3)
        self.steps(before)
        wait_for(self._device)
        kind = ProfilerActivity.CUDA if self._device == "cuda" else ProfilerActivity.CPU
        with profile(activities=[kind]) as found:
            seconds, _ = self.steps(3)
            wait_for(self._device)
        self.steps()
        name = "self_device_time_total" if self._device == "cuda" else "self_cpu_time_total"
        times = {event.key: getattr(event, name) / 1000 / len(seconds) for event in found.key_averages()}
        most = sorted(times, key=times.__getitem__, reverse=True)[:KERNELS]
        return 1000 * statistics.median(seconds), {key: times[key] for key in most}


def measure_attention(table: Table, setting: Setting) -> None:
    """Every sequence at the middle of its answer, its blocks in no order."""
    from services.worker.engine.kernels import gpu

    shape = HeadShape(setting.shape["num_attention_heads"], setting.shape["num_key_value_heads"], 128, scale=0.09)
    keys, device = setting.prompt + setting.answer // 2, torch.device("cuda")
    width = -(-keys // BLOCK_TOKENS)
    kernels = gpu.GpuKernels()
    pool = kernels.new_pool(setting.requests * width, shape, torch.bfloat16, device)
    tables = torch.randperm(setting.requests * width, generator=torch.Generator().manual_seed(0)).view(-1, width)
    spans = [Span(own, keys - 1, row, 1) for row, own in enumerate(tables.tolist())]
    queries = torch.randn(setting.requests, shape.heads, shape.size, device=device, dtype=torch.bfloat16)
    for block, warps in PROGRAMS:
        with mock.patch.multiple(gpu, BLOCK_KEYS=block, ATTENTION_WARPS=warps):
            layout = plan_layout(spans)
            kernels.attend(queries, shape, pool, layout)
            wait_for("cuda")
            started = time.perf_counter()
            for _ in range(CALLS):
                kernels.attend(queries, shape, pool, layout)
            wait_for("cuda")
            seconds = (time.perf_counter() - started) / CALLS
        read = setting.requests * keys * shape.kv_heads * shape.size * 4 / seconds / 1e12
        what = f"attention of {setting.requests} tokens to {keys} keys each, {block} keys at a time, {warps} warps"
        table.add(f"gpu-inside-attention-{block}-{warps}", what, read, "TB/s", "said", True)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting, table = SETTINGS[device], Table("gpu-inside")
    with tempfile.TemporaryDirectory(prefix="lamplighter-inside-gpu-") as directory:
        make_model(setting, directory, device)
        table.add("gpu-inside-memory", "a copy's reading and writing", bandwidth(device) / 1e12, "TB/s", "said", True)
        if device == "cuda":
            torch.cuda.empty_cache()
            measure_attention(table, setting)
        inside = Inside(setting, directory, device)
        inside.add(setting.requests, TOKENS_ALONE, seed=0)
        _, together = inside.steps()
        inside.add(1, TOKENS_ALONE, seed=0)
        seconds, alone = inside.steps()
        table.add(
            "gpu-inside-alone", "one sequence alone, a token", 1000 * statistics.median(seconds), "ms", "said", True
        )
        same = alone[0] == together[0]
        table.add("gpu-inside-same", "its tokens are those that it had among all", float(same), "", "1", same)
        for name, answer, before in (("prompts", 1, 0), ("decoding", setting.answer // 2, setting.answer // 4)):
            step, kernels = inside.kernels(answer, before)
            table.add(f"gpu-inside-{name}", f"a step of {name}", step, "ms", "said", True)
            for number, (kernel, milliseconds) in enumerate(kernels.items(), 1):
                table.add(f"gpu-inside-{name}-{number}", f"of it, {kernel[:80]}", milliseconds, "ms", "said", True)
    table.write()
    table.show()
    return 0 if table.holds else 1


if __name__ == "__main__":
    sys.exit(main())
