"""transformers' Trainer on the same model, examples and settings as ours, with examples grouped by length.

`python -m tests.benchmarks.peers.trainer_loop MODEL DATA full|lora float32|bfloat16 STEPS`
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

BATCH_SIZE = 8
"""transformers' default, and ours."""
LEARNING_RATE = 1e-4


def serve(train: Callable[[], tuple[int, float]]) -> None:
    """Print `ready`; then for every line on stdin train once, and print real tokens, seconds and their ratio."""
    print("ready", flush=True)
    for _ in sys.stdin:
        tokens, seconds = train()
        print(json.dumps({"tokens": tokens, "seconds": seconds, "rate": tokens / seconds}), flush=True)


def pad(rows: list[dict], taken: list[int]) -> dict:
    """Return a batch; note how many of its tokens are real."""
    longest = max(len(row["input_ids"]) for row in rows)
    taken.append(sum(len(row["input_ids"]) for row in rows))
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.int64),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.int64),
        "labels": torch.full((len(rows), longest), -100),
    }
    for number, row in enumerate(rows):
        end = len(row["input_ids"])
        batch["input_ids"][number, :end] = row["input_ids"]
        batch["attention_mask"][number, :end] = 1
        batch["labels"][number, :end] = row["labels"]
    return batch


def main(model_directory: str, data_directory: str, method: str, dtype: str, steps: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from services.worker.trainer.data import PreparedData

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    data = PreparedData(Path(data_directory))
    examples = []
    for number in range(len(data)):
        tokens = torch.tensor(data.tokens(number).astype("int64"))
        examples.append({"input_ids": tokens, "labels": tokens.where(torch.tensor(data.targets(number)), -100)})
    is_full, is_half = method == "full", dtype == "bfloat16"
    # As users do it: full fine-tuning keeps float32 weights and casts products, LoRA loads the base in bfloat16.
    loaded = torch.bfloat16 if is_half and not is_full else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=loaded)
    if not is_full:
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)

    class Clock(TrainerCallback):
        """Times the steps and what lies between them, not the set-up of a run."""

        def on_train_begin(self, *_args, **_kwargs):
            self.started = time.perf_counter()

        def on_train_end(self, *_args, **_kwargs):
            self.seconds = time.perf_counter() - self.started

    def train() -> tuple[int, float]:
        clock, taken = Clock(), []
        # The library prints its summary; stdout is the answers' alone.
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
            arguments = TrainingArguments(
                directory,
                per_device_train_batch_size=BATCH_SIZE,
                max_steps=int(steps),
                learning_rate=LEARNING_RATE,
                bf16=is_half and is_full,
                train_sampling_strategy="group_by_length",
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            )
            collate = lambda rows: pad(rows, taken)  # noqa: E731
            Trainer(model, arguments, train_dataset=examples, data_collator=collate, callbacks=[clock]).train()
        return sum(taken[: int(steps)]), clock.seconds

    serve(train)


if __name__ == "__main__":
    main(*sys.argv[1:])
