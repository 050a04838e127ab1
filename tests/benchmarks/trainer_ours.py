"""Our side of `bench_finetune`: the trainer's steps, driven directly.

`python -m tests.benchmarks.trainer_ours MODEL DATA full|lora float32|bfloat16 STEPS`
"""

import os
import sys
import time
from pathlib import Path

import torch

from services.worker.protocol import Hyperparameters
from services.worker.trainer.data import PreparedData
from services.worker.trainer.language_model import load_language_model
from services.worker.trainer.trainer import Trainer
from tests.benchmarks.peers.trainer_loop import BATCH_SIZE, LEARNING_RATE, serve


def main(model: str, data: str, method: str, dtype: str, steps: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    asked = Hyperparameters(
        full=method == "full",
        dtype=dtype,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        warmup_ratio=0.0,
        max_steps=1_000_000,
    )
    language_model = load_language_model(Path(model), "base", asked, torch.device("cpu"), seed=0)
    trainer = Trainer(language_model, PreparedData(Path(data)), asked, seed=0)

    def train() -> tuple[int, float]:
        started = time.perf_counter()
        tokens = sum(trainer.train_step().tokens for _ in range(int(steps)))
        return tokens, time.perf_counter() - started

    serve(train)


if __name__ == "__main__":
    main(*sys.argv[1:])
