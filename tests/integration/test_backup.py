"""A backup of a running stack, restored where nothing was: every job, result, event and file of it, verified by digest."""

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID, uuid4

import openai
import psycopg
import pytest
from sqlalchemy import text

from lamplighter import Client
from services.local.ports import free_port
from services.local.stack import Stack, StackOptions
from services.scheduler.store_audit import audit
from services.worker.trainer.checkpoint import write_product_manifest
from shared.db import files, model_registry
from shared.db.session import connect_engine, tenant_transaction
from shared.store import Store, file_path, index_path
from tests.conftest import FAST
from tools import backup as backup_tool
from tests.support.batches import chat_line, chat_lines, jsonl, submit, wait_for
from tests.support.servers import ROOT, wait_until
from tests.support.task_rows import DIGIT_TASKS, digit_rows, with_files


def tool(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "backup.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def started(data):
    stack = Stack(StackOptions(data, device="cpu", environment=FAST))
    stack.start()
    return stack


def talk_to(stack):
    key = (stack.directory / "admin.key").read_text().strip()
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key), Client(stack.url, key)


def rows(stack, statement):
    with psycopg.connect(stack.database_url("superuser")) as connection:
        return set(connection.execute(statement).fetchall())


RESULTS = "SELECT line_no, body, recorded_at FROM result WHERE job_id = '{}'"
FILES = "SELECT file_id, bytes, sha256, store_path FROM file"
KEYS = "SELECT key_id FROM api_key"


def test_a_stack_is_backed_up_in_the_middle_of_work_and_restored(scratch):
    """The disk is lost after a backup that was made while a batch ran: with the backup it is as it was then, and the
    batch goes on to its end, each line once."""
    data, folder = scratch / "backed-up", scratch / "backup"
    stack = started(data)
    try:
        sdk, native = talk_to(stack)
        with sdk, native:
            done = submit(sdk, chat_lines(300))
            wait_for(sdk, done.id, "completed")
            text = sdk.files.content(sdk.batches.retrieve(done.id).output_file_id).text
            told = [event["message"] for event in native.request("GET", f"/v1/jobs/{done.id}/events")["data"]]
            # Most are answered before the backup, the last ones long after it.
            delays = [200] * 350 + [12_000] * 50
            lines = [chat_line(f"line-{i}", delay_ms=delay) for i, delay in enumerate(delays)]
            running = submit(sdk, lines)
            wait_until(lambda: sdk.batches.retrieve(running.id).request_counts.completed > 20, 30)
            saved = tool("save", folder, "--data", data)
            assert saved.returncode == 0, saved.stderr
            assert sdk.batches.retrieve(running.id).status == "in_progress", "the backup was made too late"
        of_done = RESULTS.format(done.id.removeprefix("batch_"))
        before = [rows(stack, statement) for statement in (of_done, FILES, KEYS)]
    finally:
        stack.shut_down()
    shutil.rmtree(data)
    restored = tool("restore", folder, "--data", data)
    assert restored.returncode == 0, restored.stderr
    assert "4 objects of the store" in restored.stdout  # two files and their line indexes
    stack = started(data)
    try:
        beside = tool("restore", folder, "--only", "store", "--data", data)
        assert beside.returncode == 1 and "stop `lamplighter up` first" in beside.stderr
        sdk, native = talk_to(stack)
        with sdk, native:
            wait_for(sdk, running.id, "completed")
            assert sdk.files.content(sdk.batches.retrieve(done.id).output_file_id).text == text
            assert [e["message"] for e in native.request("GET", f"/v1/jobs/{done.id}/events")["data"]] == told
            ended = sdk.batches.retrieve(running.id)
            lines = [json.loads(line) for line in sdk.files.content(ended.output_file_id).text.splitlines()]
            assert [line["custom_id"] for line in lines] == [f"line-{i}" for i in range(400)]
            assert ended.request_counts.failed == 0
            later = sdk.files.create(file=("later.jsonl", jsonl(chat_lines(1))), purpose="batch")
        after = [rows(stack, statement) for statement in (of_done, FILES, KEYS)]
    finally:
        stack.shut_down()
    assert before[0] == after[0] and len(after[0]) == 300
    assert before[1] <= after[1]  # what the running batch rendered came later
    assert before[2] < after[2]  # the new directory has an admin's key of its own
    # The store alone is lost: Postgres stays as it is, and what came since the backup is named.
    shutil.rmtree(data / "store")
    only = tool("restore", folder, "--only", "store", "--data", data)
    assert only.returncode == 0, only.stderr
    assert "restored; 4 objects of the store" in only.stdout and "2 things are not" in only.stdout
    missing = [line for line in only.stderr.splitlines() if line.endswith(": missing")]
    assert len(missing) == 2 and all(later.id.removeprefix("file-") in line for line in missing)
    assert sum(path.is_file() for path in (data / "store" / "files").rglob("*")) == 4
    # Postgres alone is lost: the store stays, with what nobody knows of any more.
    (data / "store" / "newer").write_text("precious")
    shutil.rmtree(data / "postgres")
    only = tool("restore", folder, "--only", "postgres", "--data", data)
    assert only.returncode == 0, only.stderr
    assert "restored; 4 objects of the store" in only.stdout and "are not" not in only.stdout
    assert (data / "store" / "newer").read_text() == "precious"


@pytest.fixture
def backup(tmp_path):
    """A folder as `save` leaves it; of its archives only that of the secrets is one."""
    folder = tmp_path / "folder"
    folder.mkdir()
    parts = {}
    for name in ("postgres.tar", "store.tar"):
        (folder / name).write_bytes(name.encode())
    (tmp_path / "postgres.json").write_text('{"superuser": "x"}')
    (tmp_path / "postgres.json").chmod(0o600)
    subprocess.run(["tar", "-C", tmp_path, "-cf", folder / "secrets.tar", "postgres.json"], check=True)
    for path in folder.iterdir():
        content = path.read_bytes()
        parts[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(
        json.dumps({"format": 3, "kind": "lamplighter up", "made_at": "2026-01-01", "parts": parts})
    )
    return folder


def test_a_backup_that_is_not_what_was_written_is_not_restored(backup, tmp_path):
    assert tool("check", backup).returncode == 0
    (backup / "store.tar").write_bytes(b"store.taR")
    refused = tool("restore", backup, "--data", tmp_path / "data")
    assert refused.returncode == 1 and "store.tar is not what was written" in refused.stderr
    assert not (tmp_path / "data" / "postgres").exists()


def test_a_backup_that_was_cut_off_is_none(backup):
    (backup / "manifest.json").unlink()
    assert "cut off" in tool("check", backup).stderr


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "store.tar").unlink(), "store.tar is missing."),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 3}'), "is damaged: KeyError('parts')"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "is damaged"),
    ],
)
def test_a_backup_that_cannot_be_looked_at_is_told_in_a_sentence(backup, spoil, said):
    spoil(backup)
    refused = tool("check", backup)
    assert refused.returncode == 1 and said in refused.stderr and "Traceback" not in refused.stderr


def test_a_disk_that_fails_in_the_middle_of_an_archive_is_told_by_its_file(backup, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(backup_tool, "hashlib", SimpleNamespace(sha256=lambda: SimpleNamespace(update=fail)))
    with pytest.raises(SystemExit, match=r"/\w+.tar cannot be read: Input/output error"):
        backup_tool.check(backup)


def test_a_backup_of_another_kind_is_refused_before_anything_is_written(backup, tmp_path):
    manifest = json.loads((backup / "manifest.json").read_text())
    (backup / "manifest.json").write_text(json.dumps(manifest | {"kind": "docker-compose.yml"}))
    refused = tool("restore", backup, "--data", tmp_path / "data")
    assert refused.returncode == 1 and "is of docker-compose.yml, and not of lamplighter up" in refused.stderr
    assert not (tmp_path / "data").exists()


def test_a_postgres_that_ended_without_a_word_hinders_no_restore(backup, tmp_path):
    """Its file names a process that is somebody else's by now, and a port where nobody answers."""
    pid_file = tmp_path / "data" / "postgres" / "postmaster.pid"
    pid_file.parent.mkdir(parents=True)
    pid_file.write_text(f"{os.getpid()}\n{pid_file.parent}\n0\n{free_port()}\n")
    tried = tool("restore", backup, "--only", "store", "--data", tmp_path / "data")
    assert "stop `lamplighter up`" not in tried.stderr and "tar" in tried.stderr  # the archive is none


def test_a_compose_that_cannot_look_is_not_a_volume_that_is_full(tmp_path, capfd):
    (tmp_path / ".env").write_text("")
    deployment = backup_tool.Composed("sh -c 'echo no engine >&2; exit 1'", tmp_path / ".env")
    with pytest.raises(SystemExit, match="postgres.tar: nobody could look at its volume, for the reason above"):
        deployment.require_empty("postgres.tar")
    assert "no engine" in capfd.readouterr().err
    full = backup_tool.Composed("sh -c 'echo building; echo is full'", tmp_path / ".env")
    with pytest.raises(SystemExit, match="store.tar: its volume is not empty"):
        full.require_empty("store.tar")
    assert capfd.readouterr().err == "building\n"
    backup_tool.Composed("sh -c 'echo is empty'", tmp_path / ".env").require_empty("store.tar")


@pytest.mark.parametrize(
    ("written", "meant"),
    [("/srv/m", "/srv/m"), ('"/srv/my models"', "/srv/my models"), ("/srv/m # of us", "/srv/m"), ("'/a#b' ", "/a#b")],
)
def test_variables_are_read_as_compose_reads_them(tmp_path, monkeypatch, written, meant):
    (tmp_path / ".env").write_text(f"LAMPLIGHTER_MODELS=/of/before\nLAMPLIGHTER_MODELS={written}\n")
    deployment = backup_tool.Composed("docker-compose", tmp_path / ".env")
    assert str(deployment._named("LAMPLIGHTER_MODELS", "models")) == meant
    monkeypatch.setenv("LAMPLIGHTER_MODELS", "/of/the/shell")
    assert str(deployment._named("LAMPLIGHTER_MODELS", "models")) == "/of/the/shell"
    monkeypatch.delenv("LAMPLIGHTER_MODELS")
    (tmp_path / ".env").write_text("LAMPLIGHTER_MODELS=${HOME}/models\n")
    with pytest.raises(SystemExit, match=r"LAMPLIGHTER_MODELS: write it without \$"):
        deployment._named("LAMPLIGHTER_MODELS", "models")


def test_models_are_put_in_their_places_whole_and_those_that_are_there_stay(tmp_path):
    """A restore that was cut off in the middle of a model, once more."""
    packed, models = tmp_path / "packed", tmp_path / "models"
    for name in ("first", "second"):
        (packed / name / "part").mkdir(parents=True)
        (packed / name / "part" / "weights").write_text(f"of {name}")
    (models / ".restoring" / "second").mkdir(parents=True)
    (models / ".restoring" / "second" / "weights").write_text("of sec")
    (models / "first").mkdir()
    (models / "first" / "own").write_text("mine")
    (tmp_path / ".env").write_text(f"LAMPLIGHTER_MODELS={models}\n")
    (packed / ".restoring" / "half").mkdir(parents=True)  # of another one, saved with the rest
    subprocess.run(["sh", "-c", f"({backup_tool.PACK.format(packed)}) > {tmp_path}/models.tar"], check=True)
    with (tmp_path / "models.tar").open("rb") as archive:
        backup_tool.Composed("docker-compose", tmp_path / ".env").unpack("models.tar", archive)
    assert (models / "second" / "part" / "weights").read_text() == "of second"
    assert [path.name for path in (models / "first").iterdir()] == ["own"]
    assert not (models / ".restoring").exists()


def test_nothing_is_restored_over_what_is_there(backup, tmp_path):
    there = tmp_path / "data" / "store" / "files" / "of-somebody"
    there.parent.mkdir(parents=True)
    there.write_text("precious")
    secrets = tmp_path / "data" / "postgres.json"
    secrets.write_text("{}")
    refused = tool("restore", backup, "--data", tmp_path / "data")
    assert refused.returncode == 1 and "not empty" in refused.stderr
    assert there.read_text() == "precious" and secrets.read_text() == "{}"
    assert not (tmp_path / "data" / "postgres").exists(), "something was unpacked before everything was looked at"


def test_secrets_are_read_by_their_owner_alone(scratch, backup):
    data = scratch / "owner"
    tool("restore", backup, "--data", data)  # whose archives are none; the secrets come before them
    assert (data / "postgres.json").read_text() == '{"superuser": "x"}'
    assert stat.S_IMODE((data / "postgres.json").stat().st_mode) == 0o600 and stat.S_IMODE(data.stat().st_mode) == 0o700


def test_save_over_a_backup_or_without_a_stack_is_refused(backup, tmp_path):
    assert tool("save", backup, "--data", tmp_path / "nothing").returncode != 0
    refused = tool("save", tmp_path / "new", "--data", tmp_path / "nothing")
    assert refused.returncode == 1 and "Postgres does not run" in refused.stderr
    assert tool("check", tmp_path / "new").returncode == 1


@pytest.fixture
def held(database, tmp_path):
    """A store with two files and a trained model, as Postgres knows them."""
    store = Store(str(tmp_path / "store"))
    written = {}
    for content in (b'{"a":1}\n{"a":2}\n', b'{"b":1}\n'):
        file_id, count = uuid4(), content.count(b"\n")
        paths = file_path("default", file_id), index_path("default", file_id)
        for path, stored in zip(paths, (content, bytes(8 * (count + 1))), strict=True):
            writer = store.writer(path)
            writer.write(stored)
            writer.commit()
        digest = (
            subprocess.run(["sha256sum"], input=content, capture_output=True, check=True).stdout.decode().split()[0]
        )
        with tenant_transaction(database.engine("gateway"), "default") as connection:
            files.add(
                connection, tenant_id="default", file_id=file_id, purpose="batch", filename="x", bytes=len(content),
                sha256=digest, store_path=paths[0], index_path=paths[1], lines=count, validation=None,
                expires_after_seconds=None,
            )  # fmt: skip
        written[file_id] = tmp_path / "store" / paths[0]
    elsewhere = tmp_path / "local-model"
    elsewhere.mkdir()
    model = tmp_path / "store" / "training" / "default" / uuid4().hex / "model"
    model.mkdir(parents=True)
    (model / "adapter.safetensors").write_bytes(b"weights")
    write_product_manifest(model)
    with psycopg.connect(database.cluster.url("superuser", database.name)) as connection:
        connection.execute(
            "INSERT INTO model (tenant_id, name, kind, base, source, dtype)"
            " VALUES ('default', 'ft:x', 'adapter', 'echo', %s, 'float32'),"
            " ('default', 'hub', 'causal_lm', NULL, 'org/name', 'float32'),"
            " ('default', 'local', 'causal_lm', NULL, %s, 'float32')",
            (str(model), str(elsewhere)),
        )
    return database.engine("scheduler"), store, list(written.values()), model


def test_what_postgres_names_is_found_whole(held):
    found = audit(held[0], held[1])
    assert found.wrong == [] and found.objects == 5


def test_a_store_that_is_reached_through_a_link_is_compared_too(held, tmp_path):
    """Models name their directories in full, and the store's is another name of the same."""
    engine, _, _, model = held
    (tmp_path / "link").symlink_to(tmp_path / "store")
    through = Store(str(tmp_path / "link"))
    assert audit(engine, through).objects == 5
    (model / "adapter.safetensors").write_bytes(b"weightz")
    found = audit(engine, through)
    assert "SHA-256" in found.wrong[0] and found.objects == 4
    assert found.bytes == sum(
        path.stat().st_size for path in (tmp_path / "store" / "files").rglob("*") if path.is_file()
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda paths, _: paths[0].unlink(), "missing"),
        (lambda paths, _: paths[0].write_bytes(paths[0].read_bytes()[:-1]), "bytes, not"),
        (lambda paths, _: paths[0].write_bytes(paths[0].read_bytes().replace(b"1", b"3")), "SHA-256"),
        (lambda paths, _: paths[0].with_name(f"{paths[0].name}.lines").write_bytes(b""), "0 bytes, not"),
        (lambda _, model: (model / "adapter.safetensors").write_bytes(b"weightz"), "SHA-256"),
        (lambda _, model: shutil.rmtree(model), "manifest is missing"),
        (lambda _, model: (model / "manifest.json").write_text("[]"), "manifest cannot be read"),
        (lambda _, model: (model / "manifest.json").write_text("{"), "manifest cannot be read"),
        (lambda _, model: (model.parents[4] / "local-model").rmdir(), "model local: there is no directory"),
    ],
)
def test_what_is_not_as_it_was_written_is_named(held, spoil, said):
    engine, store, paths, model = held
    spoil(paths, model)
    (sentence,) = audit(engine, store).wrong
    assert said in sentence


def test_what_is_deleted_while_the_audit_reads_is_not_missing(held, monkeypatch):
    """It had read the row before, and finds no content afterwards: it looks at the row again."""
    engine, store, paths, _ = held
    read = store.read

    def deleting(path):
        if path.endswith(paths[0].name):
            with engine.begin() as connection:
                file_id = UUID(paths[0].name)
                connection.execute(text("UPDATE file SET deleted_at = now() WHERE file_id = :f"), {"f": file_id})
            paths[0].unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(store, "read", deleting)
    found = audit(engine, store)
    assert found.wrong == [] and found.objects == 3


def test_a_model_from_before_there_were_manifests_is_told_and_not_wrong(held):
    engine, store, _, model = held
    (model / "manifest.json").unlink()
    found = audit(engine, store)
    assert found.wrong == [] and "trained before" in found.unknown[0]


def test_another_formats_backup_is_refused(backup):
    manifest = json.loads((backup / "manifest.json").read_text())
    (backup / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    assert "format 1, which another release" in tool("check", backup).stderr
    del manifest["kind"]  # as the format before this one had none
    (backup / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    assert "of lamplighter up on" in tool("check", backup).stdout


def test_a_command_that_fails_or_says_nothing_is_no_archive(tmp_path):
    for command in (["false"], ["true"], ["sh", "-c", "echo some; exit 1"]):
        with pytest.raises(SystemExit, match="this is no backup"):
            backup_tool._collect(command, tmp_path / uuid4().hex)


def test_tar_that_saw_something_go_is_an_archive_and_one_that_failed_is_none(tmp_path):
    there = tmp_path / "store"
    there.mkdir()
    (there / "a").write_text("a")
    (there / "b.part").write_text("unfinished")
    packed = subprocess.run(["sh", "-c", backup_tool.PACK.format(there)], capture_output=True, check=False)
    assert packed.returncode == 0 and b"unfinished" not in packed.stdout
    gone = subprocess.run(["sh", "-c", backup_tool.PACK.format(tmp_path / "no")], capture_output=True, check=False)
    assert gone.returncode != 0


def test_secrets_of_another_deployment_are_not_written_over(tmp_path, backup):
    """A rehearsal whose variables lie beside a living deployment's secrets."""
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "redis_password").write_text("of-the-living")
    (backup / "env").write_text("LAMPLIGHTER_SECRETS=./secrets\nLAMPLIGHTER_PORT=1\n")
    deployment = backup_tool.Composed("docker-compose", tmp_path / "rehearsal.env")
    with pytest.raises(SystemExit, match="another deployment's"):
        deployment.install_secrets(backup, [])
    assert (tmp_path / "secrets" / "redis_password").read_text() == "of-the-living"
    apart = backup_tool.Composed("docker-compose", tmp_path / "apart" / "rehearsal.env")
    apart.install_secrets(backup, [])
    text = (tmp_path / "apart" / "rehearsal.env").read_text()
    assert text == f"LAMPLIGHTER_PORT=1\nLAMPLIGHTER_SECRETS={tmp_path / 'apart' / 'secrets'}\n"
    assert (tmp_path / "apart" / "secrets" / "postgres.json").exists()


def test_checkpoints_manifests_are_what_postgres_knows_of_them(scratch, stack, sdk, native):
    """Whoever changes a checkpoint's weights and manifest alike is found as well."""
    rows, validation = digit_rows()
    ids = [native.upload("rows.jsonl", jsonl(part[:100]), "fine-tune")["id"] for part in (rows, validation)]
    asked = {"n_epochs": 2, "batch_size": 16}
    job = native.training.create(model="vector:64:8", tasks=with_files(DIGIT_TASKS, *ids), hyperparameters=asked)
    assert native.wait(job["id"])["status"] == "succeeded"
    engine = connect_engine(stack.settings("scheduler"))
    store = Store(str(stack.directory / "store"))
    with engine.connect() as connection:
        known = {model.name: model for model in model_registry.sources(connection)}
    product = known[job["produces"]]
    steps = [model for name, model in known.items() if name.startswith(f"{job['produces']}:ckpt-step-")]
    assert product.manifest_sha256 is None and steps and all(model.manifest_sha256 for model in steps)
    whole = audit(engine, store)
    assert not [sentence for sentence in whole.wrong if "/training/" in sentence]
    manifest = Path(steps[0].source).parent / "manifest.json"
    content = manifest.read_bytes()
    try:
        manifest.write_bytes(content + b" ")
        assert [s for s in audit(engine, store).wrong if "manifest.json: not the bytes" in s]
    finally:
        manifest.write_bytes(content)
    state = manifest.with_name("optimizer.safetensors")
    content = state.read_bytes()
    try:
        state.write_bytes(content[:-1])
        assert [s for s in audit(engine, store).wrong if "optimizer.safetensors" in s]
    finally:
        state.write_bytes(content)
        engine.dispose()
