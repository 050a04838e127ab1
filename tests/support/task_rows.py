"""Multi-task specifications and their prepared rows, from rows in memory; and the numbers of scikit-learn's digits."""

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from services.preprocessor.task_rows import PreparedSource, Reading, Source, prepare_source
from services.preprocessor.tokenization import TokenizerFiles
from services.worker.protocol import Hyperparameters, SourcePlan, TaskPlan, TrainTasks
from shared.domain.multi_task import TrainingCreate
from shared.domain.prepared_tasks import vector_shape


def write_jsonl(path: Path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare_tasks(body: TrainingCreate, base: Path, out: Path) -> list[PreparedSource]:
    """Prepare what a specification names; its files are paths."""
    shape = vector_shape(body.model)
    asked = body.hyperparameters
    files = None if shape else TokenizerFiles.read(base)
    length = 1 if shape else min(asked.max_length or files.row_tokens, files.row_tokens)
    reading = Reading(shape[0] if shape else 0, files, length, asked.truncate)
    prepared = []
    for group in body.sources():
        tasks = tuple(body.tasks[number] for number in group)
        with ExitStack() as stack:
            names = (tasks[0].training_file, tasks[0].validation_file)
            files_ = [stack.enter_context(open(name, "rb")) if name else None for name in names]
            prepared.append(prepare_source(Source(group, tasks, *files_), reading, out))
    return prepared


def task_spec(base, body, output, *, token="lease-1", seed=0, **fields) -> TrainTasks:
    """Return the job of a specification whose files are paths, prepared under `output`'s parent."""
    create = TrainingCreate.model_validate(body)
    out = Path(output).parent / "prepared"
    prepared = prepare_tasks(create, Path(base), out)
    asked = {name: fields.pop(name) for name in list(fields) if name in Hyperparameters.__struct_fields__}
    sampling = create.sampling
    return TrainTasks(
        base=str(base),
        base_name=create.model,
        output=str(output),
        lease_token=token,
        hyperparameters=Hyperparameters(**{"full": create.sharing != "lora"} | asked),
        seed=seed,
        sharing=create.sharing,
        tasks=[
            TaskPlan(name=task.name, kind=task.kind, weight=task.weight, loss=task.loss or "mse")
            for task in create.tasks
        ],
        sources=[
            SourcePlan(tasks=group, data=str(one.training), validation=str(one.validation) if one.validation else None)
            for group, one in zip(create.sources(), prepared, strict=True)
        ],
        mode=create.mode,
        strategy=sampling.strategy,
        temperature=sampling.temperature or 1.0,
        cap=sampling.cap,
        rehearsal=sampling.rehearsal or 0.0,
        is_mixed=sampling.batches == "mixed",
        balancing=create.balancing,
        patience=create.early_stop_patience,
        **fields,
    )


DIGIT_TASKS = [
    {"name": "digit", "kind": "classification", "label_field": "digit"},
    {"name": "parity", "kind": "classification", "label_field": "parity"},
    {"name": "shape", "kind": "multilabel", "label_field": "shape"},
    {"name": "ink", "kind": "regression", "label_field": "ink"},
]


def digit_rows(seed=0, scale=1.0):
    """Return (300 training rows, 600 validation rows) of scikit-learn's digits with four targets.

    `shape`: round, has a loop, has a straight line; `ink`: how dark the image is, in standard units, times `scale`.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = data.data / 16.0
    ink = images.sum(1)
    ink = (ink - ink.mean()) / ink.std() * scale
    kinds = {"round": {0, 2, 3, 5, 6, 8, 9}, "loop": {0, 6, 8, 9}, "straight": {1, 4, 5, 7}}
    order = np.random.default_rng(seed).permutation(len(images))
    rows = [
        {
            "text": [round(float(value), 4) for value in images[i]],
            "digit": int(data.target[i]),
            "parity": int(data.target[i] % 2),
            "shape": [name for name, digits in kinds.items() if data.target[i] in digits],
            "ink": float(ink[i]),
        }
        for i in order
    ]
    return rows[:300], rows[300:900]


def run_tasks(spec: TrainTasks):
    """Run a job in this process; return the job, what it said, and how it ended."""
    import torch

    from services.worker.trainer.gate import Gate, Pulse
    from services.worker.trainer.multi_task_job import MultiTaskJob
    from services.worker.trainer.ranks import Ranks

    said = []
    job = MultiTaskJob(spec, torch.device("cpu"), said.append, Gate(), Pulse(), Ranks())
    finished = job.run()
    return job, said, finished


TEXTS = [
    "the river runs to the sea",
    "a short note",
    "nobody saw the lamp go out in the night",
    "bread and salt",
    "it rained",
    "the train from the north was late again today",
    "five small boats",
    "she counted the stairs twice",
    "open the window",
    "the clock in the hall has stopped",
]


def text_rows(count=20):
    """Return rows with a target for every kind of task."""
    rows = []
    for number in range(count):
        text = f"{TEXTS[number % len(TEXTS)]} {number}"
        words = text.split()
        rows.append(
            {
                "text": text,
                "words": words,
                "first": text[0] if text[0] in "ta" else "other",
                "has": [letter for letter in "rsx" if letter in text],
                "length": len(text),
                "sizes": ["long" if len(word) > 4 else "O" for word in words],
                "reversed": text[::-1][:12],
            }
        )
    return rows


TEXT_TASKS = [
    {"name": "first", "kind": "classification", "label_field": "first"},
    {"name": "has", "kind": "multilabel", "label_field": "has"},
    {"name": "length", "kind": "regression", "label_field": "length"},
    {"name": "sizes", "kind": "token_classification", "text_field": "words", "label_field": "sizes"},
]
CAUSAL = {"name": "text", "kind": "causal_lm"}
SEQ2SEQ = {"name": "reverse", "kind": "seq2seq", "label_field": "reversed"}


def with_files(tasks, training, validation=None):
    return [task | {"training_file": training, "validation_file": validation} for task in tasks]
