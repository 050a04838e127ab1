"""Prepared data sets, and trainer children as a worker runs them."""

import contextlib
import functools
import json
import os
import queue
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil

from services.worker import trainer_child
from services.worker.protocol import (
    CheckpointWritten,
    Failed,
    Finished,
    Hyperparameters,
    Listening,
    Pause,
    Place,
    Progress,
    Resume,
    Stop,
    Stopped,
    Train,
)
from tests.support.servers import wait_until

ENDS = (Finished, Failed, Stopped)


def write_prepared(directory: Path, examples, weights=None, vocabulary=260, name="data") -> Path:
    """Write examples (lists of token ids) in the prepared format; by default all of their tokens are targets."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = weights or [[1] * len(example) for example in examples]
    lengths = [len(example) for example in examples]
    np.concatenate([np.asarray(example) for example in examples]).astype("<u4").tofile(directory / "tokens.bin")
    flat = np.concatenate([np.asarray(weight) for weight in weights]).astype(np.uint8)
    flat.tofile(directory / "weights.bin")
    np.cumsum([0, *lengths]).astype("<i8").tofile(directory / "offsets.bin")
    manifest = {
        "version": 1,
        "examples": len(lengths),
        "tokens": sum(lengths),
        "trained_tokens": int(flat.sum()),
        "longest": max(lengths),
        "vocabulary": vocabulary,
        "pad_token": 0,
        "data_sha256": name,
        "tokenizer_sha256": "",
        "template_sha256": "",
        "max_length": max(lengths),
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def random_examples(count=40, *, seed=0, vocabulary=260, shortest=2, longest=40):
    """Return examples of various lengths, and weights that leave the first half of each out, as a prompt's are."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest, longest + 1, count)
    examples = [generator.integers(1, vocabulary, length) for length in lengths]
    weights = [[0] * (length // 2) + [1] * (length - length // 2) for length in lengths]
    return examples, weights


@functools.cache
def shared_template(device, threads):
    """One template for all children of a device with so many threads, as a worker has; it ends with this process."""
    return trainer_child.trainer_template(device, {"OMP_NUM_THREADS": str(threads)})


def trainers_of(process: psutil.Process | None = None):
    """Return the trainer children below a process, or all; their template has their command line, and another name."""
    below = psutil.process_iter() if process is None else process.children(recursive=True)
    found = []
    for each in below:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "services.worker.trainer.process" in each.cmdline() and each.name() == "trainer":
                found.append(each)
    return found


def worker_of(trainer: psutil.Process):
    """Return the worker that has a trainer, by its template or without."""
    parent = trainer.parent()
    return parent.parent() if parent.name() == "template" else parent


class TrainerChild(trainer_child.TrainerChild):
    """A trainer child that remembers what it said."""

    def __init__(self, *, hang_seconds=60.0, threads=1, device="cpu:0", template=None):
        super().__init__(template or shared_template(device, threads), hang_seconds=hang_seconds)
        self.said = []

    def send(self, message):
        with self._lock:
            assert self._living().send(message)

    def train(self, spec: Train):
        self.send(spec)

    def pause(self):
        self.send(Pause())

    def resume(self):
        self.send(Resume())

    def stop(self):
        self.send(Stop())

    def next(self, *kinds, seconds=60):
        """Return the next message of these kinds, or None when the child is gone before."""
        ends_at = time.monotonic() + seconds
        while True:
            message = self.inbox.get(timeout=max(0.01, ends_at - time.monotonic()))
            if message is None or isinstance(message, kinds):
                return message

    def finish(self, seconds=120):
        """Return how the job ended."""
        return self.next(*ENDS, seconds=seconds)

    def _receive(self, life, message):
        self.said.append(message)
        super()._receive(life, message)


def one_job(child):
    """Yield a child to a test; what is left of its job afterwards goes with it."""
    yield child
    if not child.said or not isinstance(child.said[-1], Finished | Failed):
        child.kill()
        wait_until(lambda: child.pid is None, 20)
    with contextlib.suppress(queue.Empty):
        while True:
            child.inbox.get(timeout=0.3)
    child.said.clear()


def metrics_of(messages):
    """Return {step: progress without its time} of a run; a step that was told twice must have been told alike."""
    steps = {}
    for message in messages:
        if isinstance(message, Progress):
            fields = {name: getattr(message, name) for name in message.__struct_fields__ if name != "seconds"}
            if not message.tasks:  # of one task
                del fields["tasks"]
            assert steps.setdefault(message.step, fields) == fields
    return steps


def checkpoints_of(messages):
    return [message for message in messages if isinstance(message, CheckpointWritten)]


def weights_of(directory: Path):
    """Return all weights of an adapter's or a model's directory."""
    from safetensors.torch import load_file

    files = sorted(Path(directory).glob("*.safetensors"))
    assert files
    return {name: weight for file in files for name, weight in load_file(file).items()}


def spec(base, data, output, *, token="lease-1", base_name="tiny", seed=0, **fields) -> Train:
    """Return a job; keywords that are hyperparameters go there."""
    asked = {name: fields.pop(name) for name in list(fields) if name in Hyperparameters.__struct_fields__}
    return Train(
        base=os.fspath(base),
        base_name=base_name,
        data=os.fspath(data),
        output=os.fspath(output),
        lease_token=token,
        hyperparameters=Hyperparameters(**asked),
        seed=seed,
        **fields,
    )


def train_together(first, second, wanted: Train, *, sharding="none", memory_bytes=(None, None)) -> None:
    """Have two children begin a job together, as their workers do."""
    first.train(msgspec.structs.replace(wanted, place=Place(0, 2, sharding=sharding), memory_bytes=memory_bytes[0]))
    place = Place(1, 2, port=first.next(Listening).port, sharding=sharding)
    second.train(msgspec.structs.replace(wanted, place=place, memory_bytes=memory_bytes[1]))
