"""Multi-task training against plain loops in torch, for every kind of head and trunk."""

from pathlib import Path

import numpy as np
import pytest
import torch

from services.worker.multi_task.model import load_for_serving
from services.worker.protocol import Evaluated, Progress
from services.worker.trainer.errors import LossNotFinite
from tests.support.models import TRUNKS, make_trunk
from services.worker.trainer.task_data import PreparedRows, row_batches, share_of_rows
from services.worker.trainer.trainable_tasks import TrainableTasks
from tests.support.task_oracle import EXACT, digit_spec, first_weights, plain_run
from tests.support.task_rows import (
    CAUSAL,
    DIGIT_TASKS,
    SEQ2SEQ,
    TEXT_TASKS,
    digit_rows,
    run_tasks,
    task_spec,
    text_rows,
    with_files,
    write_jsonl,
)
from tests.support.trainer_runs import weights_of

pytestmark = [
    pytest.mark.engine,
    # peft reads what transformers is about to rename.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    directory = tmp_path_factory.mktemp("digits")
    training, validation = digit_rows()
    return write_jsonl(directory / "training.jsonl", training[:120]), write_jsonl(
        directory / "validation.jsonl", validation[:60]
    )


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trunks")
    return {kind: make_trunk(kind, directory / kind) for kind in TRUNKS}


@pytest.mark.parametrize("task", DIGIT_TASKS, ids=lambda task: task["name"])
def test_one_task_alone_is_ordinary_training(digits, tmp_path, task):
    spec = digit_spec(digits, tmp_path / "job", [task], **EXACT)
    expected = plain_run(spec, [task])
    job, _, _ = run_tasks(spec)
    for name, weight in job._model.trainable.items():
        assert torch.allclose(weight, expected[name], rtol=0, atol=1e-12), name


@pytest.mark.parametrize("method", ["sum", "pcgrad", "upgrad", "torchjd:MGDA"])
@pytest.mark.parametrize("at_a_time", [4096, 5])
def test_several_tasks_are_a_plain_loop_over_their_losses(digits, tmp_path, method, at_a_time):
    """Also computed five rows at a time."""
    body = {"balancing": method}
    spec = digit_spec(digits, tmp_path / "job", body=body, micro_batch_tokens=at_a_time, **EXACT)
    expected = plain_run(spec, DIGIT_TASKS, method=method)
    job, _, _ = run_tasks(spec)
    apart = max(float((w - expected[n]).detach().abs().max()) for n, w in job._model.trainable.items())
    assert apart < 1e-9


def test_a_tasks_weight_and_its_share_of_draws(digits, tmp_path):
    """A weight multiplies the loss; with the strategy `weights` it says how often a task is drawn instead."""
    tasks = [DIGIT_TASKS[0] | {"weight": 3.0}, DIGIT_TASKS[3]]
    _, said, _ = run_tasks(digit_spec(digits, tmp_path / "weighted", tasks))
    told = next(message for message in said if isinstance(message, Progress)).tasks
    assert told["digit"].weight == 3.0 and told["ink"].weight == 1.0
    # Other files, so that the tasks have rows of their own.
    other = write_jsonl(tmp_path / "other.jsonl", digit_rows(1)[0][:100])
    tasks = [tasks[0] | {"training_file": digits[0]}, tasks[1] | {"training_file": other}]
    body = {"sampling": {"strategy": "weights"}, "tasks": tasks}
    _, said, _ = run_tasks(digit_spec(digits, tmp_path / "drawn", body=body, max_steps=64))
    seen = {"digit": 0, "ink": 0}
    for message in said:
        for name, one in getattr(message, "tasks", {}).items() if isinstance(message, Progress) else ():
            seen[name] += one.targets
            assert one.weight == 1.0
    assert seen == {"digit": 768, "ink": 256}


@pytest.mark.parametrize("kind", list(TRUNKS))
@pytest.mark.parametrize("sharing", ["full", "lora", "last_layers"])
def test_every_head_learns_on_every_trunk(trunks, tmp_path, kind, sharing):
    """All kinds of tasks at once: their losses fall, frozen weights stay, and the product answers as the model did."""
    file = write_jsonl(tmp_path / "rows.jsonl", text_rows())
    tasks = [*TEXT_TASKS]
    tasks += [CAUSAL] if kind in ("gpt2", "llama", "qwen3") else []
    tasks += [SEQ2SEQ] if kind == "t5" else []
    rate = {"full": 3e-3, "lora": 2e-2, "last_layers": 1e-2}[sharing]
    body = {"model": "tiny", "sharing": sharing, "tasks": with_files(tasks, file, file)}
    spec = task_spec(
        trunks[kind], body, tmp_path / "job", max_steps=12, batch_size=20, learning_rate=rate, eval_steps=12,
        last_layers=1, schedule="constant",
    )  # fmt: skip
    base = {name: weight.clone() for name, weight in weights_of(trunks[kind]).items()}
    job, said, finished = run_tasks(spec)
    before, after = (message.tasks for message in said if isinstance(message, Evaluated))
    for task in tasks:
        name = task["name"]
        assert after[name].metrics["loss"] < before[name].metrics["loss"], name
    if sharing == "last_layers":
        changed = {n for n, w in weights_of(finished.model).items() if n in base and not torch.equal(w, base[n])}
        first = ("embed", "shared", "layer.0.", "layers.0.", "h.0.", "block.0.", "decoder.", "lm_head")
        inner = ".layer.0." if kind == "t5" else "nothing"  # a part of a T5 block, not the first block
        assert changed and not any(part in name.replace(inner, ".") for name in changed for part in first)
    adapter_base = trunks[kind] if sharing == "lora" else None
    from pathlib import Path

    served = load_for_serving(Path(finished.model), adapter_base, torch.float32, torch.device("cpu"))
    job._model.train(False)
    rows = job._training[0]
    batch = rows.batch(np.arange(4), rows.tasks)
    with torch.no_grad():
        mine = job._model._model.logits(batch.inputs, batch.mask, rows.tasks, batch.targets)
        theirs = served.logits(batch.inputs, batch.mask, rows.tasks, batch.targets)
    for task in rows.tasks:
        assert torch.allclose(mine[task], theirs[task], atol=2e-4 * float(mine[task].abs().max())), task


@pytest.mark.parametrize("kind", list(TRUNKS))
def test_pads_change_no_answer(trunks, tmp_path, kind):
    """A row's outputs are the same alone as beside longer rows: pooling goes by the mask."""
    file = write_jsonl(tmp_path / "rows.jsonl", text_rows())
    tasks = [task for task in TEXT_TASKS if task["kind"] != "token_classification"]
    spec = task_spec(trunks[kind], {"model": "tiny", "tasks": with_files(tasks, file)}, tmp_path / "job")
    job, _ = first_weights(spec)
    job._model.train(False)
    rows = job._training[0]
    assert len(set(rows.lengths[:6].tolist())) > 2
    expected_pooling = "last" if kind in ("gpt2", "llama", "qwen3") else "mean"
    assert job._model._model.trunk.pooling == expected_pooling
    with torch.no_grad():
        together = rows.batch(np.arange(6), rows.tasks)
        many = job._model._model.logits(together.inputs, together.mask, rows.tasks)
        for row in range(6):
            alone = rows.batch(np.asarray([row]), rows.tasks)
            one = job._model._model.logits(alone.inputs, alone.mask, rows.tasks)
            for task in rows.tasks:
                assert torch.allclose(many[task][row], one[task][0], atol=1e-5), (row, task)


def test_a_causal_task_alone_is_fine_tuning(trunks, tmp_path):
    """The same weights as the trainer of fine-tuning has after the same rows."""
    from services.worker.trainer.data import PreparedData
    from services.worker.trainer.language_model import load_language_model
    from services.worker.trainer.trainer import Trainer
    from tests.support.trainer_runs import write_prepared

    file = write_jsonl(tmp_path / "rows.jsonl", text_rows())
    body = {"model": "tiny", "tasks": with_files([CAUSAL], file)}
    spec = task_spec(trunks["llama"], body, tmp_path / "job", max_steps=8, batch_size=4, **EXACT)
    job, _, _ = run_tasks(spec)
    rows = job._training[0]
    examples = [rows._tokens[rows._span(row)].tolist() for row in range(len(rows))]
    data = PreparedData(write_prepared(tmp_path / "data", examples))
    model = load_language_model(trunks["llama"], "tiny", spec.hyperparameters, torch.device("cpu"), spec.seed)
    trainer = Trainer(model, data, spec.hyperparameters, spec.seed)
    while not trainer.is_done:
        trainer.train_step()
    for name, weight in model.trainable.items():
        mine = job._model.trainable[f"trunk.{name}"]
        assert torch.allclose(mine, weight, rtol=0, atol=1e-9), name


def test_a_task_that_learns_no_more_stops(digits, tmp_path):
    """Its rows leave the mix and its head stays as it is, while the others go on."""
    noise = [row | {"coin": int(row["text"][20] * 997) % 2} for row in digit_rows(2)[0][:100]]
    coins = write_jsonl(tmp_path / "coins.jsonl", noise[:60])
    held = write_jsonl(tmp_path / "held.jsonl", noise[60:])
    coin = {"name": "coin", "kind": "classification", "label_field": "coin"}
    tasks = [*with_files([DIGIT_TASKS[0]], *digits), *with_files([coin], coins, held)]
    body = {"tasks": tasks, "early_stop_patience": 2}
    spec = digit_spec(digits, tmp_path / "job", body=body, max_steps=120, eval_steps=5, learning_rate=2e-2)
    job, said, finished = run_tasks(spec)
    evaluations = [message for message in said if isinstance(message, Evaluated)]
    stopped = next(message.step for message in evaluations if message.tasks["coin"].is_stopped)
    assert finished.step == 120 and stopped < 100 and not evaluations[-1].tasks["digit"].is_stopped
    for message in said:
        if isinstance(message, Progress) and message.step > stopped:
            assert set(message.tasks) == {"digit"} and message.tasks["digit"].targets == 16
    best = evaluations[-1].tasks["coin"].best_step
    losses = {m.step: m.tasks["coin"].metrics["loss"] for m in evaluations if m.step <= stopped}
    assert losses[best] == min(losses.values())
    kept = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "job").rglob("step-*"))
    assert set(job.trainer.best_steps) - {0} <= set(kept)


def test_a_task_whose_phase_has_not_begun_does_not_stop(digits, tmp_path):
    """Its loss may rise meanwhile, as the trunk learns something else."""
    body = {"mode": "sequential", "tasks": with_files(DIGIT_TASKS[:3], *digits), "early_stop_patience": 1}
    spec = digit_spec(digits, tmp_path / "job", body=body, max_steps=90, eval_steps=3, learning_rate=3e-2)
    _, said, finished = run_tasks(spec)
    evaluations = [message for message in said if isinstance(message, Evaluated)]
    rising = [m.tasks["shape"].metrics["loss"] for m in evaluations if m.step <= 30]
    assert max(rising[1:]) > rising[0]
    for message in evaluations:
        assert not message.tasks["parity"].is_stopped or message.step > 30
        assert not message.tasks["shape"].is_stopped or message.step > 33
    trained = {name for m in said if isinstance(m, Progress) for name in m.tasks}
    assert trained == {"digit", "parity", "shape"} and finished.step > 60


def test_learnt_weights_move_at_the_rates_of_language_models(digits, tmp_path):
    """And only those of tasks that a step has rows of."""
    other = write_jsonl(tmp_path / "other.jsonl", digit_rows(1)[0][:100])
    tasks = [*with_files([DIGIT_TASKS[0]], *digits), *with_files([DIGIT_TASKS[3]], other)]
    body = {"balancing": "uncertainty", "tasks": tasks, "sampling": {"batches": "homogeneous"}}
    spec = digit_spec(digits, tmp_path / "job", body=body, max_steps=60, learning_rate=2e-5, schedule="constant")
    job, said, _ = run_tasks(spec)
    steps = [message.tasks for message in said if isinstance(message, Progress)]
    assert all(len(tasks) == 1 for tasks in steps)
    for name in ("digit", "ink"):
        weights = [tasks[name].weight for tasks in steps if name in tasks]
        assert weights[0] == 0.5 and abs(weights[-1] - 0.5) > 0.02
    variances = [float(each.detach()) for each in job.trainer._weights.parameters.values()]
    seen = [sum(name in tasks for tasks in steps) for name in ("digit", "ink")]
    assert all(abs(value) <= 1.01e-2 * count for value, count in zip(variances, seen, strict=True))


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
def test_a_language_head_is_its_tasks_own(trunks, tmp_path, kind):
    """What only a language task reads stays as it is in steps without its rows; what all read does not."""
    texts = write_jsonl(tmp_path / "texts.jsonl", text_rows(8))
    rows = write_jsonl(tmp_path / "rows.jsonl", text_rows(40))
    language = SEQ2SEQ if kind == "t5" else CAUSAL
    tasks = [*with_files([TEXT_TASKS[0]], rows), *with_files([language], texts)]
    body = {"model": "tiny", "tasks": tasks, "sampling": {"batches": "homogeneous"}}
    asked = {"max_steps": 50, "batch_size": 4, "weight_decay": 0.5, "warmup_ratio": 0.0}
    spec = task_spec(trunks[kind], body, tmp_path / "job", **asked)
    job, _ = first_weights(spec)
    own = job._model.own[1]
    expected = {"t5": "decoder", "gpt2": None, "llama": "lm_head"}[kind]
    assert bool(own) == (expected is not None) and all(expected in name for name in own)
    assert not own.keys() & job._model.shared.keys() and set(job._model.trainable) >= set(own)
    seen = set()
    for _ in range(6):
        before = {name: weight.detach().clone() for name, weight in job._model.trainable.items()}
        told = job.trainer.train_step().tasks
        seen |= set(told)
        stays = language["name"] not in told
        assert all(torch.equal(before[name], weight) == stays for name, weight in own.items()), told
        assert any(not torch.equal(before[name], weight) for name, weight in job._model.shared.items())
    assert len(seen) == 2, "steps of both tasks were looked at"


@pytest.mark.parametrize("method", ["pcgrad", "upgrad"])
def test_the_weights_that_are_told_are_those_of_the_method(digits, tmp_path, method):
    """They are what each task's gradient is multiplied with: of no two steps the same."""
    tasks = [DIGIT_TASKS[0] | {"weight": 2.0}, *DIGIT_TASKS[1:]]
    _, said, _ = run_tasks(digit_spec(digits, tmp_path / "job", tasks, body={"balancing": method}, max_steps=8))
    weights = [{n: one.weight for n, one in m.tasks.items()} for m in said if isinstance(m, Progress)]
    assert all(set(each) == {task["name"] for task in tasks} for each in weights)
    assert len({each["digit"] for each in weights}) > 4 and all(each["digit"] > 0 for each in weights)
    alone = digit_spec(digits, tmp_path / "alone", tasks[:1], body={"balancing": method}, max_steps=2)
    _, said, _ = run_tasks(alone)
    assert [m.tasks["digit"].weight for m in said if isinstance(m, Progress)] == pytest.approx([2.0, 2.0], rel=1e-3)


@pytest.mark.parametrize("method", ["sum", "pcgrad"])
def test_when_memory_runs_out_less_is_computed_at_a_time(trunks, tmp_path, monkeypatch, method):
    """Also where the longest row is another source's: the run ends with the same weights, to rounding."""
    long = write_jsonl(tmp_path / "long.jsonl", [row | {"text": row["text"] * 3} for row in text_rows(8)])
    rows = write_jsonl(tmp_path / "rows.jsonl", text_rows(40))
    tasks = [*with_files([TEXT_TASKS[0]], long), *with_files([TEXT_TASKS[2]], rows)]
    body = {"model": "tiny", "tasks": tasks, "balancing": method, "sampling": {"strategy": "proportional"}}
    asked = {"max_steps": 3, "batch_size": 16, "dtype": "float64"}
    spec = task_spec(trunks["bert"], body, tmp_path / "free", **asked)
    free, _, _ = run_tasks(spec)
    outcomes = TrainableTasks.outcomes

    def short_of_memory(self, batch, **more):
        if batch.inputs.numel() > 200:
            raise torch.OutOfMemoryError("made up")
        return outcomes(self, batch, **more)

    monkeypatch.setattr(TrainableTasks, "outcomes", short_of_memory)
    tight, _, _ = run_tasks(task_spec(trunks["bert"], body, tmp_path / "tight", **asked))
    assert tight.trainer.state.micro_batch_tokens <= 200 < free.trainer.state.micro_batch_tokens
    for name, weight in free._model.trainable.items():
        assert torch.allclose(weight, tight._model.trainable[name], rtol=0, atol=1e-9), name


def test_the_metrics_of_targets_far_from_zero(digits, tmp_path):
    """R² of numbers around 10⁹ whose spread is 5 is that of the same numbers around zero."""
    from services.worker.multi_task.description import HeadDescription
    from services.worker.multi_task.heads import outcome
    from services.worker.multi_task.metrics import task_metrics

    generator = np.random.default_rng(0)
    targets = 1.7e9 + 5 * generator.standard_normal(1000)
    wrong = 0.5 * generator.standard_normal(1000)
    expected = 1 - (wrong**2).sum() / ((targets - targets.mean()) ** 2).sum()
    for mean, deviation in ((targets.mean(), 5.0), (0.0, 1.0)):
        head = HeadDescription(
            name="far", kind="regression", mean=mean, deviation=deviation, center=float(targets.mean())
        )
        scaled = torch.from_numpy((targets - mean) / deviation)
        found = outcome(head, (scaled + torch.from_numpy(wrong) / deviation)[:, None], scaled, counting=True)
        metrics = task_metrics(head, float(found.loss), found.targets, found.counts.numpy())
        assert metrics["r2"] == pytest.approx(expected, abs=1e-6)
        assert metrics["mae"] == pytest.approx(np.abs(wrong).mean(), rel=1e-6)


def test_a_row_with_a_long_answer_fills_a_pass_by_it(trunks, tmp_path):
    rows = [row | {"reversed": row["text"] * 4} for row in text_rows(6)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    spec = task_spec(trunks["t5"], {"model": "tiny", "tasks": with_files([SEQ2SEQ], file)}, tmp_path / "job")
    data = PreparedRows(Path(spec.sources[0].data), 0, (0,))
    answers = np.array([len(row["reversed"]) for row in rows])
    assert (data.costs - data.lengths >= answers).all() and data.manifest.longest_target == max(
        data.costs - data.lengths
    )
    assert data.manifest.target_tokens == sum(data.costs - data.lengths)
    for batch in row_batches({0: data}, {0: np.arange(6)}, {0: (0,)}, int(1.9 * data.costs.min())):
        assert len(batch.inputs) == 1


def test_odd_inputs_are_refused_and_harm_nobody(trunks, tmp_path):
    from services.worker.engine.loading import load_model, model_bytes
    from services.worker.protocol import ModelSpec, Request

    file = write_jsonl(tmp_path / "rows.jsonl", text_rows())
    body = {"model": "tiny", "tasks": with_files(TEXT_TASKS[:1], file)}
    _, _, finished = run_tasks(task_spec(trunks["bert"], body, tmp_path / "job", max_steps=1))
    spec = ModelSpec("heads", "multi_task", finished.model, heads=finished.model)
    engine = load_model(spec, "cpu:0")
    assert model_bytes(spec) == pytest.approx(engine.weight_bytes, rel=0.2)
    vocabulary = engine._model.trunk.vocabulary
    real = engine._tokenizer

    class Odd:
        pad_token_id = real.pad_token_id

        def __call__(self, text, **more):
            return {"input_ids": [vocabulary + 3]} if text == "beyond" else real(text, **more)

    engine._tokenizer = Odd()
    for number, text in enumerate(["", "beyond", "the river"]):
        engine.add(Request(number, "predict", prompts=[text]))
    engine.add(Request(3, "embed", prompts=["x"]))
    engine.add(Request(4, "predict", vectors=[[1.0]]))
    answers = {}
    while engine.wait_seconds() is not None:
        answers |= {response.id: response for response in engine.step().responses}
    assert {number: answer.fault is None for number, answer in answers.items()} == {
        0: False, 1: False, 2: True, 3: False, 4: False,
    }  # fmt: skip
    assert all(answers[number].fault.status == 400 for number in (0, 1, 3, 4))


def test_a_pass_has_rows_of_several_sources(trunks, tmp_path):
    """And every task's loss is that of its own rows alone, whatever lies beside them."""
    rows = text_rows(24)
    tasks = [
        task | {"training_file": write_jsonl(tmp_path / f"{task['name']}.jsonl", rows[number * 6 : number * 6 + 6])}
        for number, task in enumerate([TEXT_TASKS[0], TEXT_TASKS[3], CAUSAL, TEXT_TASKS[2]])
    ]
    job, _ = first_weights(task_spec(trunks["llama"], {"model": "tiny", "tasks": tasks}, tmp_path / "job"))
    data = dict(enumerate(job._training))
    draw = {source: np.arange(6) for source in data}
    by_source = {source: rows.tasks for source, rows in data.items()}
    with torch.no_grad():
        (together,) = row_batches(data, draw, by_source, 1 << 20)
        assert together.inputs.shape[0] == 24 and len(set(together.mask.sum(1).tolist())) > 3
        many = job._model.outcomes(together)
        for source, rows in data.items():
            (task,) = rows.tasks
            one = job._model.outcomes(rows.batch(draw[source], rows.tasks))[task]
            assert one.targets == many[task].targets
            assert float(many[task].loss) == pytest.approx(float(one.loss), rel=1e-5)
    # Divided among passes and ranks each row is computed once.
    found = []
    for rank in range(3):
        for batch in row_batches(data, share_of_rows(data, draw, rank, 3), by_source, 60):
            found += [tuple(row[mask].tolist()) for row, mask in zip(batch.inputs, batch.mask, strict=True)]
    whole = [tuple(row[mask].tolist()) for row, mask in zip(together.inputs, together.mask, strict=True)]
    assert sorted(found) == sorted(whole)


def test_answers_are_bounded(trunks, tmp_path):
    """A short call has no answer that fills memories."""
    from services.worker.engine import prediction
    from services.worker.engine.loading import load_model
    from services.worker.protocol import ModelSpec, Request

    rows = [
        {"text": f"row {number}", "label": f"l{number % 150}", "words": ["a"], "tags": ["X"]} for number in range(300)
    ]
    rows[0]["tags"] = ["Y"]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    tasks = [{"name": "label", "kind": "classification", "label_field": "label"}]
    tasks += [{"name": "tags", "kind": "token_classification", "text_field": "words", "label_field": "tags"}]
    body = {"model": "tiny", "tasks": with_files(tasks, file)}
    _, _, finished = run_tasks(task_spec(trunks["bert"], body, tmp_path / "job", max_steps=1))
    engine = load_model(ModelSpec("heads", "multi_task", finished.model, heads=finished.model), "cpu:0")

    def ask(count, text="x", tasks=None):
        engine.add(Request(1, "predict", prompts=[text] * count, tasks=tasks))
        responses = []
        while engine.wait_seconds() is not None:
            responses += engine.step().responses
        return responses[0]

    named = ask(1, tasks=["label"]).predictions[0]["label"]
    assert len(named["probabilities"]) == prediction.MOST_PROBABILITIES
    assert named["label"] == max(named["probabilities"], key=named["probabilities"].get)
    assert ask(prediction.MOST_ANSWERS // 2 + 1).fault.status == 400
    assert "tokens" in ask(300, "w " * 120, tasks=["tags"]).fault.message


def test_a_model_of_cut_rows_cuts_what_it_is_asked(trunks, tmp_path):
    """At the same token: a longer text is answered as its beginning."""
    from services.worker.engine.loading import load_model
    from services.worker.protocol import ModelSpec, Request

    file = write_jsonl(tmp_path / "rows.jsonl", text_rows())
    answers = {}
    for truncate in (False, True):
        asked = {"max_length": 16, "truncate": True}
        body = {"model": "tiny", "tasks": with_files(TEXT_TASKS[:1], file), "hyperparameters": asked}
        spec = task_spec(
            trunks["bert"], body, tmp_path / f"job-{truncate}", max_steps=1, max_length=16, truncate=truncate
        )
        _, _, finished = run_tasks(spec)
        engine = load_model(ModelSpec("heads", "multi_task", finished.model, heads=finished.model), "cpu:0")
        for number, text in enumerate(["0123456789abcdef", "0123456789abcdef and more"]):
            engine.add(Request(number, "predict", prompts=[text]))
        while engine.wait_seconds() is not None:
            answers |= {(truncate, each.id): each for each in engine.step().responses}
    assert answers[False, 1].fault.code == "context_length_exceeded" and answers[False, 0].fault is None
    exact, longer = (answers[True, number].predictions[0]["first"] for number in (0, 1))
    assert longer["probabilities"] == pytest.approx(exact["probabilities"], abs=1e-6)


def test_all_tasks_stopped_end_the_run(digits, tmp_path):
    body = {"early_stop_patience": 1}
    spec = digit_spec(digits, tmp_path / "job", body=body, max_steps=2000, eval_steps=10, learning_rate=5e-2)
    job, _, finished = run_tasks(spec)
    assert finished.step < 2000 and all(task.is_stopped for task in job.trainer.state.tasks)


def test_a_loss_that_is_not_finite_is_told_by_its_task(digits, tmp_path):
    rows = digit_rows()[0][:40]
    huge = write_jsonl(tmp_path / "huge.jsonl", [row | {"ink": 1e60} for row in rows[:20]] + rows[20:])
    ink = DIGIT_TASKS[3] | {"standardize": False}
    tasks = [*with_files([DIGIT_TASKS[0]], digits[0]), *with_files([ink], huge)]
    with pytest.raises(LossNotFinite, match="task 'ink'"):
        run_tasks(digit_spec(digits, tmp_path / "job", body={"tasks": tasks}, max_steps=20))


def test_phases_train_one_task_after_another(digits, tmp_path):
    body = {"mode": "sequential", "sampling": {"rehearsal": 0.25}, "tasks": with_files(DIGIT_TASKS[:3], *digits)}
    _, said, _ = run_tasks(digit_spec(digits, tmp_path / "job", body=body, max_steps=30))
    steps = {m.step: {n: t.targets for n, t in m.tasks.items()} for m in said if isinstance(m, Progress)}
    assert all(set(steps[step]) == {"digit"} for step in range(1, 11))
    assert sum(steps[step].get("parity", 0) for step in range(11, 21)) == pytest.approx(120, abs=2)
    assert sum(steps[step].get("digit", 0) for step in range(11, 21)) == pytest.approx(40, abs=2)
    assert sum(steps[step].get("shape", 0) for step in range(21, 31)) == pytest.approx(120, abs=3)
