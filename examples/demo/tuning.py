"""The demo's second job: a model is taught to say from a signature what a function does, and served at once."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
from rich.console import Console

from examples.demo.docstrings import HELD_BACK, Docstring


@dataclass(frozen=True)
class Lesson:
    """How many examples are shown, and how."""

    examples: int
    hyperparameters: dict[str, Any]


@dataclass(frozen=True)
class Tuned:
    """A new model, its losses on what was held back, and pairs of answers of both models to the same signature."""

    name: str
    loss_before: float
    loss_after: float
    answers: list[tuple[str, str]]

    @property
    def fall(self) -> float:
        """By what share the loss fell."""
        return 1 - self.loss_after / self.loss_before


FOR_A_SMALL_MODEL = Lesson(
    # A million weights are all trained, at many times the rate that suits billions; an adapter of theirs learns less
    # (the loss falls by 27 % at best), as the words for the turns of a chat are new to the base.
    4000,
    {"n_epochs": 2, "batch_size": 16, "learning_rate_multiplier": 100, "full": True},
)
FOR_ANY_MODEL = Lesson(400, {"n_epochs": 1, "batch_size": 16})

ASKED, ANSWER_TOKENS = 5, 32
FIRST_LOSS = re.compile(r"Step 0: validation loss=([0-9.]+)")
LEAST_FALL = 0.30
ENDED = ("succeeded", "failed", "cancelled")

console = Console()


def fine_tune(sdk: openai.OpenAI, base: str, docstrings: list[Docstring], lesson: Lesson) -> Tuned:
    """Train `base` on `signature → first line` and print how it goes. Exits when the job does not succeed."""
    held_back, examples = docstrings[:HELD_BACK], docstrings[HELD_BACK : HELD_BACK + lesson.examples]
    started = time.monotonic()
    job = sdk.fine_tuning.jobs.create(
        model=base,
        training_file=_upload(sdk, "training", examples),
        validation_file=_upload(sdk, "validation", held_back),
        suffix="docstrings",
        seed=0,
        method={"type": "supervised", "supervised": {"hyperparameters": lesson.hyperparameters}},  # type: ignore[typeddict-item]
    )
    console.print(f"fine-tuning {base} on {len(examples)} examples: {job.id}")
    for message in _follow(sdk, job.id):
        console.print(f"  {message}", markup=False, highlight=False)
    job = sdk.fine_tuning.jobs.retrieve(job.id)
    if job.status != "succeeded" or job.fine_tuned_model is None:
        raise SystemExit(f"the fine-tuning job ended as {job.status}: {job.error}")
    before, after = _losses(sdk, job.id)
    answers = [(_answer(sdk, base, d), _answer(sdk, job.fine_tuned_model, d)) for d in held_back[:ASKED]]
    tuned = Tuned(job.fine_tuned_model, before, after, answers)
    seconds = time.monotonic() - started
    console.print(f"fine-tuning: {seconds:.1f} s; validation loss {before:.2f} → {after:.2f} (by {tuned.fall:.0%})")
    return tuned


def _upload(sdk: openai.OpenAI, name: str, docstrings: list[Docstring]) -> str:
    lines = (
        {"messages": [{"role": "user", "content": d.signature}, {"role": "assistant", "content": d.first_line}]}
        for d in docstrings
    )
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return sdk.files.create(file=(f"{name}.jsonl", content), purpose="fine-tune").id


def _follow(sdk: openai.OpenAI, job_id: str) -> Iterator[str]:
    """Yield a job's messages as they come, until it has ended."""
    seen: set[str] = set()
    while True:
        has_ended = sdk.fine_tuning.jobs.retrieve(job_id).status in ENDED
        events = list(sdk.fine_tuning.jobs.list_events(job_id, limit=100))
        for event in reversed(events):
            if event.type == "message" and event.id not in seen:
                seen.add(event.id)
                yield event.message
        if has_ended:
            return
        time.sleep(0.5)


def _losses(sdk: openai.OpenAI, job_id: str) -> tuple[float, float]:
    """Return the validation loss of the base, which an event tells, and that of the best checkpoint."""
    points = sdk.fine_tuning.jobs.checkpoints.list(job_id).data
    after = min(point.metrics.full_valid_loss for point in points if point.metrics.full_valid_loss is not None)
    messages = [event.message for event in sdk.fine_tuning.jobs.list_events(job_id, limit=100)]
    (before,) = [found[1] for message in messages if (found := FIRST_LOSS.match(message))]
    return float(before), after


def _answer(sdk: openai.OpenAI, model: str, docstring: Docstring) -> str:
    question: list[Any] = [{"role": "user", "content": docstring.signature}]
    answer = sdk.chat.completions.create(model=model, messages=question, max_tokens=ANSWER_TOKENS, temperature=0)
    return " ".join((answer.choices[0].message.content or "").split())


def show(tuned: Tuned, docstrings: list[Docstring]) -> None:
    """Print what both models say of signatures that neither has seen; exits when too little was learnt."""
    console.print(f"{tuned.name} is served; signatures that it has not seen:")
    for docstring, (before, after) in zip(docstrings, tuned.answers, strict=False):
        lines = (docstring.signature, f"  before: {before[:120]}", f"  after:  {after[:120]}")
        console.print("\n".join(f"  {line}" for line in lines), markup=False, highlight=False)
    if tuned.fall < LEAST_FALL:
        raise SystemExit(f"the validation loss fell by {tuned.fall:.0%} only; {LEAST_FALL:.0%} were expected")
