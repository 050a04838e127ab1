"""llama.cpp through its low-level batch API, all sequences in one context: `MODEL DTYPE SETTINGS` (JSON of `Settings`).

The model is a transformers directory; it is written as GGUF beside itself first. Greedy, as the other peers.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np

from tests.benchmarks.peers.gguf_models import write_gguf
from tests.benchmarks.peers.rounds import Answers, serve_rounds

MOST_SEQUENCES = 48
MOST_TOKENS = 640
"""Of one sequence."""


@dataclass(frozen=True)
class Settings:
    """What the benchmark tries. `batch` and `ubatch`: tokens that a call takes, and that are computed at once.

    `flash`: its fused attention. `unified`: one buffer of keys for all sequences, in place of one for each.
    """

    threads: int
    batch: int
    ubatch: int
    flash: bool
    unified: bool


class Batched:
    """Every step: a token of each running sequence, then as much of the waiting prompts as the batch has room for."""

    def __init__(self, path: Path, settings: Settings) -> None:
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_SILENT, None)
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self._context = llama_cpp.llama_init_from_model(self._model, _context_params(settings))
        if not self._context:
            raise RuntimeError(f"llama.cpp does not take {settings}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch_tokens = settings.batch
        self._batch = llama_cpp.llama_batch_init(settings.batch, 0, 1)

    def run(self, jobs: list[dict]) -> Answers:
        llama_cpp.llama_memory_clear(self._memory, True)
        waiting = [[number, job["prompt"], 0] for number, job in enumerate(jobs)]
        running: dict[int, list[int]] = {}  # sequence -> [last token, position]
        answers: Answers = [[] for _ in jobs]
        while waiting or running:
            wanted = self._fill(waiting, running)
            if llama_cpp.llama_decode(self._context, self._batch) != 0:
                raise RuntimeError("llama_decode failed")
            for row, sequence in wanted:
                running[sequence][0] = token = self._likeliest(row)
                answers[sequence].append(token)
                if len(answers[sequence]) == jobs[sequence]["max_tokens"]:
                    del running[sequence]
                    llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return answers

    def _fill(self, waiting, running) -> list[tuple[int, int]]:
        """Fill the batch; return (row, sequence) of those from which a token is drawn."""
        wanted, self._batch.n_tokens = [], 0
        for sequence, state in running.items():
            wanted.append((self._put(state[0], state[1], sequence, logits=True), sequence))
            state[1] += 1
        while waiting and self._batch.n_tokens < self._batch_tokens:
            entry = waiting[0]
            sequence, prompt, done = entry
            count = min(len(prompt) - done, self._batch_tokens - self._batch.n_tokens)
            for position in range(done, done + count):
                is_last = position == len(prompt) - 1
                row = self._put(prompt[position], position, sequence, logits=is_last)
                if is_last:
                    wanted.append((row, sequence))
                    running[sequence] = [0, len(prompt)]
            entry[2] += count
            if entry[2] == len(prompt):
                waiting.pop(0)
        return wanted

    def _put(self, token: int, position: int, sequence: int, *, logits: bool) -> int:
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row], batch.pos[row], batch.n_seq_id[row], batch.seq_id[row][0] = token, position, 1, sequence
        batch.logits[row] = logits
        batch.n_tokens += 1
        return row

    def _likeliest(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def _context_params(settings: Settings):
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = MOST_SEQUENCES * MOST_TOKENS, MOST_SEQUENCES
    params.n_batch, params.n_ubatch = settings.batch, settings.ubatch
    params.n_threads = params.n_threads_batch = settings.threads
    params.kv_unified = settings.unified
    params.flash_attn_type = 1 if settings.flash else 0
    return params


_SILENT = llama_cpp.llama_log_callback(lambda *_: None)


def main() -> None:
    directory, dtype, settings = sys.argv[1:4]
    serve_rounds(Batched(write_gguf(Path(directory), dtype), Settings(**json.loads(settings))).run)


if __name__ == "__main__":
    main()
