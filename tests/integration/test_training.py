"""The whole life of a multi-task job over HTTP, by our own client against the whole stack, to its predictions."""

import csv
import io
import json
import os
import signal
import time

import openai
import psycopg
import pytest

from lamplighter.errors import ApiError
from tests.support.models import make_trunk
from tests.support.servers import wait_until
from tests.support.task_rows import CAUSAL, DIGIT_TASKS, SEQ2SEQ, TEXT_TASKS, digit_rows, text_rows, with_files
from tests.support.trainer_runs import trainers_of

ENDED = ("succeeded", "failed", "cancelled")


def upload(native, rows, name="rows.jsonl"):
    content = b"".join(json.dumps(row).encode() + b"\n" if not isinstance(row, bytes) else row for row in rows)
    return native.upload(name, content, "fine-tune")["id"]


@pytest.fixture(scope="module")
def digits(native):
    training, validation = digit_rows()
    return upload(native, training), upload(native, validation[:200])


@pytest.fixture(scope="module")
def bases(native, scratch):
    for kind in ("bert", "llama", "t5"):
        directory = make_trunk(kind, scratch / f"trunk-{kind}")
        native.request("POST", "/v1/models", json={"name": f"{kind}-trunk", "source": str(directory)})
    return {"bert": "bert-trunk", "llama": "llama-trunk", "t5": "t5-trunk"}


@pytest.fixture(scope="module")
def digit_model(native, digits):
    return wait_for(native, create(native, digits, hyper={"max_steps": 2})["id"])["model_name"]


def create(native, digits, tasks=DIGIT_TASKS, **fields):
    asked = {"max_steps": 60, "batch_size": 32, "learning_rate": 3e-2, "eval_steps": 20}
    body = {"model": "vector:64:32", "tasks": with_files(tasks, *digits), "seed": 3}
    return native.training.create(**body | {"hyperparameters": asked | fields.pop("hyper", {})} | fields)


def wait_for(native, job_id, states=ENDED, seconds=120):
    def look():
        job = native.training.retrieve(job_id)
        return job if job["status"] in states else None

    return wait_until(look, seconds, f"the job is one of {states}")


def told(native, job_id):
    return native.request("GET", f"/v1/training/jobs/{job_id}/events", params={"limit": 100})["data"]


def content_of(native, file_id):
    """Return a file's bytes, as the client's download has them."""
    return b"".join(native._content(f"/v1/files/{file_id}/content"))


def test_a_job_from_files_to_predictions(native, digits):
    job = create(native, digits, suffix="digits", metadata={"team": "a"})
    assert job["object"] == "job" and job["kind"] == "training" and job["status"] == "validating"
    assert job["model_name"] is None and [task["metrics"] for task in job["tasks"]] == [{}] * 4
    job = wait_for(native, job["id"])
    assert job["status"] == "succeeded", (job["error"], told(native, job["id"]))
    assert job["progress"] == {"done": 60, "failed": 0, "total": 60, "unit": "steps"}
    assert job["model_name"].startswith("ft:vector-64-32:default:digits:") and job["metadata"] == {"team": "a"}
    tasks = {task["name"]: task for task in job["tasks"]}
    assert tasks["digit"]["metrics"]["accuracy"] > 0.5 and tasks["parity"]["metrics"]["macro_f1"] > 0.6
    assert tasks["ink"]["metrics"]["r2"] > 0 and tasks["shape"]["metrics"]["exact_match"] > 0.3
    assert all(task["best_step"] in (20, 40, 60) and not task["stopped"] for task in job["tasks"])

    plan = job["plan"]
    assert plan["sources"] == [{"tasks": list(tasks), "rows": 300, "tokens": 300, "validation_rows": 200}]
    heads = {head["name"]: head for head in plan["heads"]}
    assert heads["digit"]["labels"] == [str(digit) for digit in range(10)] and sum(heads["digit"]["counts"]) == 300
    assert heads["shape"]["labels"] == ["loop", "round", "straight"] and heads["ink"]["deviation"] > 0.5

    steps = [event for event in told(native, job["id"]) if event["type"] == "metrics"]
    assert [event["data"]["step"] for event in steps] == list(range(60, 0, -1))
    assert set(steps[0]["data"]["tasks"]) == set(tasks) and steps[0]["data"]["tasks"]["digit"]["valid_loss"] > 0
    validated = {event["data"]["step"] for event in steps if event["data"].get("valid_loss") is not None}
    assert validated == {20, 40, 60}
    assert steps[0]["data"]["train_loss"] < steps[-1]["data"]["train_loss"] / 2

    names = {native.request("GET", f"/v1/files/{each}")["filename"]: each for each in job["result_files"]}
    assert set(names) == {"step_metrics.csv", "loss.png", "weights.png"}
    content = content_of(native, names["loss.png"])
    assert content.startswith(b"\x89PNG")
    rows = list(csv.DictReader(io.StringIO(content_of(native, names["step_metrics.csv"]).decode())))
    assert len(rows) == 60 and float(rows[0]["digit_loss"]) > float(rows[-1]["digit_loss"])

    checkpoints = native.request("GET", f"/v1/training/jobs/{job['id']}/checkpoints")["data"]
    served = {each["step_number"]: each["fine_tuned_model_checkpoint"] for each in checkpoints}
    assert {task["best_step"] for task in job["tasks"]} <= set(served)

    held = digit_rows()[1][200:400]
    answer = native.predict(job["model_name"], [row["text"] for row in held])
    assert answer["object"] == "prediction.list" and len(answer["data"]) == 200
    predictions = [each["predictions"] for each in answer["data"]]
    right = sum(p["digit"]["label"] == str(row["digit"]) for p, row in zip(predictions, held, strict=True))
    assert right / 200 == pytest.approx(tasks["digit"]["metrics"]["accuracy"], abs=0.12)
    assert abs(sum(predictions[0]["digit"]["probabilities"].values()) - 1) < 1e-5
    errors = [p["ink"]["value"] - row["ink"] for p, row in zip(predictions, held, strict=True)]
    assert sum(error * error for error in errors) / 200 < 1.0
    assert set(predictions[0]["shape"]) == {"labels", "probabilities"}
    one = native.predict(job["model_name"], held[0]["text"], tasks=["ink"])
    assert one["data"][0]["predictions"] == {"ink": {"value": pytest.approx(predictions[0]["ink"]["value"], abs=1e-5)}}
    earlier = native.predict(served[min(served)], held[0]["text"])
    assert set(earlier["data"][0]["predictions"]) == set(tasks)


def test_a_batch_of_predictions(native, digits):
    name = wait_for(native, create(native, digits)["id"])["model_name"]
    rows = digit_rows()[1][:40]
    requests = [{"model": name, "input": row["text"], "tasks": ["digit", "ink"]} for row in rows]
    requests.append({"model": name, "input": [1.0, 2.0]})
    requests.append({"model": name, "input": rows[0]["text"], "tasks": ["nothing"]})
    batch = native.submit(requests, "/v1/predictions")
    job = native.wait(batch["id"])
    assert job["status"] == "succeeded"
    lines = {line["custom_id"]: line["response"]["body"] for line in native.results(batch["id"])}
    assert len(lines) == 40
    alone = native.predict(name, rows[0]["text"])["data"][0]["predictions"]
    first = lines["request-0"]["data"][0]["predictions"]
    assert set(first) == {"digit", "ink"} and first["digit"]["label"] == alone["digit"]["label"]
    errors = [json.loads(line) for line in content_of(native, job["error_file_id"]).splitlines()]
    assert [line["response"]["status_code"] for line in errors] == [400, 400]
    assert "vectors of 64 numbers" in errors[0]["response"]["body"]["error"]["message"]
    assert errors[1]["response"]["body"]["error"]["param"] == "tasks[0]"


@pytest.mark.parametrize("sharing", ["full", "lora"])
def test_a_causal_head_also_chats(native, sdk, bases, sharing):
    """One model: a language model for the API's generation, and heads for predictions."""
    file = upload(native, text_rows(24))
    tasks = with_files([TEXT_TASKS[0], TEXT_TASKS[3], CAUSAL], file)
    hyper = {"max_steps": 12, "batch_size": 8, "learning_rate": 5e-3}
    job = native.training.create(
        model=bases["llama"], sharing=sharing, tasks=tasks, hyperparameters=hyper, seed=1, suffix=sharing
    )
    job = wait_for(native, job["id"])
    assert job["status"] == "succeeded", job["error"]
    ask = {"prompt": "the river", "temperature": 0, "max_tokens": 8}
    tuned = sdk.completions.create(model=job["model_name"], **ask).choices[0].text
    assert tuned and tuned != sdk.completions.create(model=bases["llama"], **ask).choices[0].text
    answer = native.predict(job["model_name"], ["the river runs", "a short note to all"])
    first = answer["data"][0]["predictions"]
    assert set(first) == {"first", "sizes"} and first["first"]["label"] in ("a", "t", "other")
    assert [word["text"] for word in first["sizes"]["tokens"]] == ["the", "river", "runs"]
    assert [(word["start"], word["end"]) for word in first["sizes"]["tokens"]] == [(0, 3), (4, 9), (10, 14)]
    with pytest.raises(ApiError, match="language model"):
        native.predict(job["model_name"], "x", tasks=["text"])
    with pytest.raises(openai.NotFoundError):
        sdk.embeddings.create(model=job["model_name"], input="x")


def test_an_encoder_decoder_writes_and_judges(native, sdk, bases):
    file = upload(native, text_rows(24))
    tasks = with_files([TEXT_TASKS[0], SEQ2SEQ], file)
    job = native.training.create(model=bases["t5"], tasks=tasks, hyperparameters={"max_steps": 6, "batch_size": 8})
    job = wait_for(native, job["id"])
    assert job["status"] == "succeeded", job["error"]
    first = native.predict(job["model_name"], "bread and salt")["data"][0]["predictions"]
    assert isinstance(first["reverse"]["text"], str) and first["first"]["label"] in ("a", "t", "other")
    for name in (job["model_name"], bases["t5"]):
        with pytest.raises(openai.NotFoundError):
            sdk.chat.completions.create(model=name, messages=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([[1.0] * 64] * 2049, "at most 2048"),
        ([1e39] * 64, "numbers from -1e.30 to 1e.30"),
        (["a", 1], "a text, a list of numbers"),
        ([True] * 64, "a text, a list of numbers"),
        ([], "a text, a list of numbers"),
        ([[1.0] * 64, [1.0]], "vectors of 64 numbers"),
        ("text", "vectors of 64 numbers"),
    ],
)
def test_odd_inputs_are_refused_by_name(native, digit_model, given, says):
    with pytest.raises(ApiError, match=says) as refused:
        native.predict(digit_model, given)
    assert refused.value.status == 400 and refused.value.param == "input"


def test_models_of_other_kinds_make_no_predictions(native, bases):
    for name in ("echo", bases["bert"], bases["llama"]):
        with pytest.raises(ApiError) as refused:
            native.predict(name, "x")
        assert refused.value.status == 404


def trainer_of(native, job_id):
    """Return the trainer child of a running job."""
    (worker,) = {attempt["worker"] for attempt in native.request("GET", f"/v1/jobs/{job_id}/attempts")["data"]}
    children = trainers_of()
    assert worker
    return children


def test_paused_killed_resumed_it_ends_as_undisturbed(native, digits):
    """The same seed: the same losses, task by task, whatever happened on the way."""
    hyper = {"max_steps": 1200, "eval_steps": 300}
    body = {"balancing": "uncertainty", "hyper": hyper}
    whole = wait_for(native, create(native, digits, **body)["id"])
    job = create(native, digits, **body)
    wait_until(lambda: native.job(job["id"])["progress"]["done"] > 50, 60, "it trains")
    children = trainer_of(native, job["id"])
    assert children
    for child in children:
        child.send_signal(signal.SIGKILL)
    time.sleep(1)
    wait_for(native, job["id"], (*ENDED, "running"))
    paused = native.request("POST", f"/v1/training/jobs/{job['id']}/pause")
    assert paused["status"] == "paused", "it was not done before it could be paused"
    native.request("POST", f"/v1/training/jobs/{job['id']}/resume")
    ended = wait_for(native, job["id"])
    assert ended["status"] == "succeeded" and ended["tasks"] == whole["tasks"]
    files = [content_of(native, next(iter(each["result_files"]))) for each in (whole, ended)]
    assert files[0] == files[1]


def test_cancelled_it_ends(native, digits):
    job = create(native, digits, hyper={"max_steps": 100_000})
    wait_until(lambda: native.job(job["id"])["status"] == "running", 60, "it runs")
    native.request("POST", f"/v1/training/jobs/{job['id']}/cancel")
    assert wait_for(native, job["id"])["status"] == "cancelled"


def test_compared_with_each_task_alone(native, digits):
    job = create(native, digits, DIGIT_TASKS[:2], compare_single_task=True, hyper={"max_steps": 40})

    def look():
        found = native.training.retrieve(job["id"])
        return found if (found["comparison"] or {}).get("mean_change") is not None else None

    found = wait_until(look, 120, "all are compared")
    rows = found["comparison"]["tasks"]
    assert [row["task"] for row in rows] == ["digit", "parity"] and {row["metric"] for row in rows} == {"accuracy"}
    for row in rows:
        assert row["change"] == pytest.approx((row["together"] - row["alone"]) / row["alone"])
        single = native.training.retrieve(row["job"])
        assert [task["name"] for task in single["tasks"]] == [row["task"]]
        assert single["metadata"]["compared_with"] == job["id"]
    changes = [row["change"] for row in rows]
    assert found["comparison"]["mean_change"] == pytest.approx(sum(changes) / 2)

    def plots():
        files = [
            native.request("GET", f"/v1/files/{each}") for each in native.training.retrieve(job["id"])["result_files"]
        ]
        return [file for file in files if file["filename"] == "comparison.png"]

    (plot,) = wait_until(plots, 30, "the comparison is drawn")
    assert content_of(native, plot["id"]).startswith(b"\x89PNG")


def test_a_dry_run_says_what_it_would_take(native, bases):
    file = upload(native, text_rows(30))
    job = native.training.create(
        model=bases["bert"], tasks=with_files(TEXT_TASKS, file), dry_run=True, hyperparameters={"n_epochs": 2}
    )
    job = wait_for(native, job["id"])
    assert job["status"] == "succeeded" and job["model_name"] is None and job["progress"]["total"] == 0
    plan = job["plan"]
    # Two sources: texts, and words.
    assert plan["steps"] == 2 * -(-60 // 16) and len(plan["sources"]) == 2 and plan["memory_bytes"] > 100_000
    assert {head["name"]: head.get("labels") for head in plan["heads"]}["sizes"] == ["O", "long"]
    assert not native.request("GET", f"/v1/jobs/{job['id']}/attempts")["data"]


GOOD = [{"text": f"row {number}", "label": "a" if number % 2 else "b", "n": number} for number in range(12)]
TASK = {"name": "topic", "kind": "classification", "label_field": "label"}


@pytest.mark.parametrize(
    ("task", "training", "validation", "code", "line", "says"),
    [
        (TASK, [{"text": "x", "label": "a"}] * 5, None, "one_class", None, "only 'a'"),
        (
            TASK | {"kind": "multilabel"},
            [{"text": "x", "label": ["a", "b"]}] * 5,
            None,
            "one_class",
            None,
            "every row has every label",
        ),
        (TASK, GOOD, [{"text": "x", "label": "c"}], "unknown_label", 1, "'c' does not occur in the training file"),
        (TASK, GOOD[:1], None, "invalid_n_examples", None, "at least 2 rows"),
        (TASK, [*GOOD, {"text": "no label"}], None, "missing_field", 13, "The field 'label' is missing"),
        (TASK, [*GOOD, {"label": "a"}], None, "missing_field", 13, "The field 'text' is missing"),
        (TASK, [*GOOD, b"{broken\n"], None, "invalid_json_line", 13, "not parseable"),
        (TASK, [*GOOD, {"text": "x", "label": "nul\0"}], None, "invalid_label", 13, "1 to 200 characters"),
        (TASK, [{"text": "x", "label": f"l{n}"} for n in range(4200)], None, "too_many_labels", None, "at most 4096"),
        (
            {"name": "size", "kind": "regression", "label_field": "n"},
            [*GOOD, {"text": "x", "n": "seven"}],
            None,
            "invalid_target",
            13,
            "must be a number; it is seven",
        ),
        (
            {"name": "size", "kind": "regression", "label_field": "n"},
            [*GOOD, {"text": "x", "n": 1e300}],
            None,
            "invalid_target",
            13,
            "between -1e+100 and 1e+100",
        ),
        (
            {"name": "tags", "kind": "token_classification", "label_field": "tags"},
            [{"text": ["a", "b"], "tags": ["X", "Y"]}, {"text": ["a", "b"], "tags": ["X"]}],
            None,
            "unequal_lengths",
            2,
            "1 labels for 2 words",
        ),
        (TASK, [*GOOD, {"text": "word " * 300, "label": "a"}], None, "example_too_long", 13, "at most 256"),
    ],
)
def test_bad_data_is_refused_with_task_file_and_line(native, bases, task, training, validation, code, line, says):
    files = (upload(native, training), upload(native, validation) if validation else None)
    job = native.training.create(model=bases["bert"], tasks=with_files([task], *files))
    job = wait_for(native, job["id"])
    assert job["status"] == "failed" and job["error"]["code"] == code, job["error"]
    which = "validation_file" if validation else "training_file"
    assert job["error"]["param"] == f"tasks[0].{which}"
    fault = job["errors"]["data"][0]
    assert fault["line"] == line and says in fault["message"] and repr(task["name"]) in job["error"]["message"]
    assert not native.request("GET", f"/v1/jobs/{job['id']}/attempts")["data"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tasks": []}, "tasks"),
        ({"tasks": [TASK, TASK]}, "tasks"),
        ({"tasks": [TASK | {"kind": "poetry"}]}, "tasks.0.kind"),
        ({"tasks": [{"name": "x", "kind": "classification"}]}, "tasks.0"),
        ({"tasks": [TASK | {"training_file": "file-0"}]}, "tasks[0].training_file"),
        ({"tasks": [TASK | {"weight": 0}]}, "tasks.0.weight"),
        ({"tasks": [{"name": "one", "kind": "causal_lm"}, {"name": "two", "kind": "causal_lm"}]}, None),
        ({"tasks": [TASK | {"kind": "causal_lm"}]}, "tasks[0].kind"),
        ({"tasks": [TASK | {"kind": "seq2seq"}]}, "tasks[0].kind"),
        ({"model": "nobody"}, "model"),
        ({"model": "echo"}, "model"),
        ({"model": "vector:8"}, "model"),
        ({"model": "vector:8:4", "sharing": "lora"}, None),
        ({"sampling": {"strategy": "temperature"}}, "sampling"),
        ({"sampling": {"strategy": "uniform", "cap": 5}}, "sampling"),
        ({"sampling": {"rehearsal": 0.5}}, None),
        ({"sampling": {"strategy": "weights"}, "tasks": [TASK, TASK | {"name": "b", "weight": 5}]}, None),
        ({"balancing": "magic"}, "balancing"),
        ({"balancing": "torchjd:NashMTL"}, "balancing"),
        ({"hyperparameters": {"n_epochs": 1, "max_steps": 4}}, "hyperparameters"),
        ({"hyperparameters": {"leaning_rate": 1.0}}, "hyperparameters.leaning_rate"),
        ({"parallelism": {"tensor": 2}, "sharing": "lora"}, "parallelism"),
        ({"parallelism": {"tensor": 2, "data": 2}}, "parallelism.tensor"),
        ({"parallelism": {"data": 2, "fsdp": True}, "balancing": "pcgrad"}, "parallelism"),
        ({"parallelism": {"data": 2, "fsdp": True}, "model": "vector:8:4"}, "parallelism"),
        ({"early_stop_patience": 2}, None),
        ({"compare_single_task": True}, "compare_single_task"),
        ({"sharin": "full"}, "sharin"),
    ],
)
def test_an_impossible_specification_is_refused_at_once(native, bases, change, param):
    file = upload(native, GOOD)
    body = {"model": bases["bert"], "tasks": [TASK]} | change
    body["tasks"] = [{"training_file": file} | task for task in body["tasks"]]
    with pytest.raises(ApiError) as refused:
        native.training.create(**body)
    assert refused.value.status == 400 and refused.value.param == param, refused.value


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"sharing": "last_layers", "hyperparameters": {"n_layers": 50}}, "hyperparameters.n_layers", "has 2 layers"),
        ({"mode": "sequential", "hyperparameters": {"max_steps": 1}}, "hyperparameters.max_steps", "would have none"),
    ],
)
def test_what_does_not_fit_its_base_or_data_is_refused_before_it_is_queued(native, bases, change, param, words):
    file = upload(native, GOOD)
    tasks = [TASK | {"training_file": file}, TASK | {"name": "other", "training_file": file}]
    job = native.training.create(**{"model": bases["bert"], "tasks": tasks} | change)
    failed = wait_for(native, job["id"])
    assert failed["status"] == "failed" and failed["started_at"] is None
    assert failed["error"]["param"] == param and words in failed["error"]["message"]


def test_the_schema_is_published(native):
    schema = native.request("GET", "/v1/training/schema")
    assert schema["additionalProperties"] is False and set(schema["required"]) == {"model", "tasks"}


def test_files_of_an_open_job_stay(native, stack, digits):
    """A task's file that is deleted while its job waits is still read."""
    training, validation = digit_rows(4)
    files = upload(native, training), upload(native, validation[:50])
    job = create(native, files, DIGIT_TASKS[:1], hyper={"max_steps": 30})
    for file in files:
        native.request("DELETE", f"/v1/files/{file}")
    assert wait_for(native, job["id"])["status"] == "succeeded"


def test_another_tenant_sees_nothing_of_it(native, stack, digits):
    from lamplighter.client import Client

    native.request("POST", "/v1/tenants", json={"id": "outsider"})
    key = native.request("POST", "/v1/keys", json={"tenant": "outsider"})["key"]
    job = wait_for(native, create(native, digits, hyper={"max_steps": 5})["id"])
    with Client(stack.url, key) as other:
        for call in (
            lambda: other.training.retrieve(job["id"]),
            lambda: other.request("GET", f"/v1/training/jobs/{job['id']}/events"),
            lambda: other.request("POST", f"/v1/training/jobs/{job['id']}/cancel"),
            lambda: other.predict(job["model_name"], [0.0] * 64),
        ):
            with pytest.raises(ApiError) as refused:
                call()
            assert refused.value.status == 404
        with pytest.raises(ApiError) as refused:
            create(other, digits)
        assert refused.value.param == "tasks[0].training_file"
