"""The trainer's promises on a GPU: a killed job ends with the same bits, and short memory changes nothing but time."""

import os

import msgspec
import psutil
import pytest
import torch

from services.worker.protocol import CheckpointPolicy, Failed, Finished, Progress
from services.worker.trainer_child import trainer_template
from tests.support.models import make_tiny_llama, make_trunk
from tests.support.task_rows import DIGIT_TASKS, TEXT_TASKS, digit_rows, task_spec, text_rows, with_files, write_jsonl
from tests.support.trainer_runs import (
    TrainerChild,
    checkpoints_of,
    metrics_of,
    random_examples,
    spec,
    weights_of,
    write_prepared,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
EVERY_STEP = CheckpointPolicy(every_steps=1, keep_last=99)
WIDE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
}
RUN = {"batch_size": 16, "max_steps": 14, "learning_rate": 1e-3}


@pytest.fixture
def child():
    running = TrainerChild(device="cuda:0")
    yield running
    running.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("base"), **WIDE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    examples = random_examples(120, vocabulary=WIDE["vocab_size"], longest=700)
    return write_prepared(tmp_path_factory.mktemp("data"), *examples, vocabulary=WIDE["vocab_size"])


def run_killed(child, job, directory, kills=(4, 9)):
    """Run a job undisturbed, then again and kill it at these steps; return the two runs' metrics and weights."""
    runs = []
    for name, ends in (("whole", ()), ("killed", kills)):
        child.said.clear()
        for number, step in enumerate(ends):
            child.train(job(directory / name, f"lease-{number}"))
            while child.next(Progress, Failed).step < step:
                pass
            child.kill()
            assert child.next(Finished, Failed) is None
        child.train(job(directory / name, "last"))
        assert isinstance(child.finish(), Finished)
        runs.append((metrics_of(child.said), weights_of(directory / name / "model")))
    return runs


def test_forked_or_started_alone_the_bits_are_the_same(base, data, tmp_path):
    """A CUDA that the template had begun with would not survive the fork: then the child would have been started alone."""
    template, alone = (trainer_template("cuda:0", {}) for _ in range(2))
    alone.refuse("a test")
    runs = []
    for name, one in (("forked", template), ("alone", alone)):
        child = TrainerChild(template=one)
        child.train(spec(base, data, tmp_path / name, **RUN))
        parent = psutil.Process(child.pid).ppid()
        assert parent == (template.pid if one is template else os.getpid())
        assert isinstance(child.finish(), Finished)
        runs.append((metrics_of(child.said), weights_of(tmp_path / name / "model")))
        child.close()
    template.close()
    assert_same(*runs)


def assert_same(whole, killed):
    assert whole[0] == killed[0]
    assert whole[1].keys() == killed[1].keys()
    assert [name for name, weight in whole[1].items() if not torch.equal(weight, killed[1][name])] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_killed_fine_tuning_ends_with_the_same_bits(base, data, tmp_path, child, full, dtype):
    def job(output, token):
        asked = RUN | {"dtype": dtype, "lora_dropout": 0.1}
        return spec(base, data, output, token=token, full=full, checkpoints=EVERY_STEP, **asked)

    assert_same(*run_killed(child, job, tmp_path))


@pytest.mark.parametrize("balancing", ["sum", "pcgrad"])
@pytest.mark.parametrize("trunk", ["vector", "bert"])
def test_a_killed_multi_task_job_ends_with_the_same_bits(tmp_path, child, balancing, trunk):
    if trunk == "vector":
        base, model, tasks, rows = "none", "vector:64:16", DIGIT_TASKS, digit_rows()[0][:200]
    else:
        base, model, tasks, rows = make_trunk("bert", tmp_path / "base"), "tiny", TEXT_TASKS, text_rows(60)
    file = write_jsonl(tmp_path / "rows.jsonl", rows)

    def job(output, token):
        body = {"model": model, "tasks": with_files(tasks, file), "balancing": balancing}
        return task_spec(base, body, output, token=token, checkpoints=EVERY_STEP, **RUN)

    assert_same(*run_killed(child, job, tmp_path))


def test_out_of_memory_computes_less_at_a_time_with_the_same_result(base, data, tmp_path, child):
    job = RUN | {"batch_size": 64, "max_steps": 3, "dtype": "float64", "checkpoints": EVERY_STEP}

    def train(name, memory_bytes):
        """Return how many tokens the last step computed at a time, and the weights it came to."""
        child.train(spec(base, data, tmp_path / name, memory_bytes=memory_bytes, **job))
        assert isinstance(child.finish(), Finished)
        with open(f"{checkpoints_of(child.said)[-1].path}/state.json", "rb") as state:
            return msgspec.json.decode(state.read())["micro_batch_tokens"], weights_of(tmp_path / name / "model")

    at_once, free = train("free", None)
    # How much is too little is the card's and the libraries' affair.
    for mebibytes in (500, 350, 250, 180, 130):
        fewer, tight = train(f"tight-{mebibytes}", mebibytes << 20)
        if fewer < at_once:
            break
    assert fewer < at_once
    for name, weight in free.items():
        torch.testing.assert_close(tight[name], weight, rtol=1e-6, atol=1e-8)
