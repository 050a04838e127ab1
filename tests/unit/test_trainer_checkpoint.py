"""Checkpoints are whole or not there; the newest whole one is found; what is not kept goes; a full disk spoils nothing."""

import logging
import os

import pytest

from services.worker.protocol import CheckpointPolicy
from services.worker.trainer.checkpoint import CheckpointStore
from services.worker.trainer.errors import CheckpointMismatch, DiskFull

pytestmark = pytest.mark.engine

JOB = {"seed": "1"}


def store(root, token="lease-1", *, policy=CheckpointPolicy(), job=JOB, environment=None):
    return CheckpointStore(root, token, policy, job, environment or {"torch": "1"})


def write(content=b"weights", size=1):
    def fill(directory):
        (directory / "model").mkdir()
        (directory / "model" / "adapter.bin").write_bytes(content * size)
        (directory / "state.json").write_bytes(b"{}")

    return fill


def steps_in(root):
    return sorted(int(path.name[5:]) for path in root.glob("*/step-*"))


def test_the_newest_is_found_across_leases(tmp_path):
    store(tmp_path, "lease-1").save(3, write())
    store(tmp_path, "lease-2").save(9, write(b"newest"))
    found, damaged = store(tmp_path, "lease-3").newest()
    assert (found.step, damaged) == (9, [])
    assert (found.model / "adapter.bin").read_bytes() == b"newest"


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert store(tmp_path).newest() == (None, [])


def _flip(path):
    content = bytearray((path / "model" / "adapter.bin").read_bytes())
    content[2] ^= 1
    (path / "model" / "adapter.bin").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda path: os.truncate(path / "model" / "adapter.bin", 3),
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text('{"version": 1'),
    ],
    ids=["a bit", "cut", "missing file", "no manifest", "half a manifest"],
)
def test_a_damaged_one_is_skipped_with_a_warning(tmp_path, damage, caplog):
    saved = store(tmp_path)
    saved.save(1, write())
    newest = saved.save(2, write())
    damage(newest.path)
    with caplog.at_level(logging.WARNING):
        found, damaged = store(tmp_path, "lease-2").newest()
    assert found.step == 1 and damaged == [str(newest.path)]
    assert any(record.getMessage() == "checkpoint is damaged" for record in caplog.records)


def test_the_last_and_the_named_are_kept(tmp_path):
    saved = store(tmp_path, policy=CheckpointPolicy(keep_last=2, keep_steps=(3,)))
    for step in range(1, 8):
        saved.save(step, write())
    assert steps_in(tmp_path) == [3, 6, 7]


def test_predecessors_are_tidied_and_successors_left_alone(tmp_path):
    store(tmp_path, "old").save(1, write())
    zombie = store(tmp_path, "mine", policy=CheckpointPolicy(keep_last=1))
    successor = store(tmp_path, "next")
    successor.save(2, write())
    zombie.save(5, write())
    assert steps_in(tmp_path) == [2, 5]


def test_what_a_killed_trainer_left_half_written_is_no_checkpoint(tmp_path):
    saved = store(tmp_path)
    saved.save(1, write())

    def interrupted(directory):
        write()(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saved.save(2, interrupted)
    (tmp_path / "lease-1" / ".new-step-00000003").mkdir()
    found, damaged = store(tmp_path, "lease-2").newest()
    assert (found.step, damaged) == (1, [])
    assert [path.name for path in (tmp_path / "lease-1").iterdir()] == ["step-00000001"]


def test_a_step_may_be_saved_again(tmp_path):
    """A trainer that went on from an older one, as this one was damaged, comes here again."""
    saved = store(tmp_path)
    _flip(saved.save(4, write()).path)
    saved.save(4, write(b"again"))
    found, damaged = store(tmp_path, "lease-2").newest()
    assert damaged == [] and (found.model / "adapter.bin").read_bytes() == b"again"


def test_another_jobs_checkpoint_is_refused_by_name(tmp_path):
    store(tmp_path).save(1, write())
    with pytest.raises(CheckpointMismatch, match="another seed: 1, not 2"):
        store(tmp_path, "lease-2", job={"seed": "2"}).newest()


def test_going_on_with_other_libraries_warns(tmp_path, caplog):
    store(tmp_path).save(1, write())
    with caplog.at_level(logging.WARNING):
        assert store(tmp_path, "lease-2", environment={"torch": "2"}).newest()[0].step == 1
    assert "last bits may differ" in caplog.text


@pytest.mark.parametrize("token", ["", "..", "a/b", "x" * 200])
def test_a_token_is_a_name_of_a_directory(tmp_path, token):
    with pytest.raises(ValueError, match="lease token"):
        store(tmp_path, token)


def test_a_full_disk_spoils_nothing(small_disk):
    saved = store(small_disk)
    saved.save(1, write(size=100))
    with pytest.raises(DiskFull, match="no room"):
        saved.save(2, write(size=300_000))
    found, damaged = store(small_disk, "lease-2").newest()
    assert (found.step, damaged) == (1, [])
    assert steps_in(small_disk) == [1] and not list(small_disk.glob("*/.*"))
    saved.save(3, write(size=100))  # there is room again for what is small enough


def test_safetensors_own_word_for_a_full_disk_is_understood(small_disk):
    import torch
    from safetensors.torch import save_file

    saved = store(small_disk)
    weights = {"w": torch.zeros(1 << 19)}
    with pytest.raises(DiskFull):
        saved.save(1, lambda directory: save_file(weights, directory / "model.safetensors"))


def test_a_disk_is_not_filled_to_the_brim(tmp_path):
    saved = store(tmp_path)
    with pytest.raises(DiskFull, match="no room"):
        saved.save(1, write(), expected_bytes=1 << 60)
    assert steps_in(tmp_path) == []
