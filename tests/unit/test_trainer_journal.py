"""What was told of steps can be told again, whatever cut the file that it stands in."""

from services.worker.protocol import Evaluated, Progress, TaskStep
from services.worker.trainer.journal import FILE, Journal


def progress(step, **fields):
    return Progress(step, 9, 1 / 3, 0.5, 1e-4, 1.0, 40, 10, 0.1, **fields)


def journal(root, token="lease-1"):
    (root / token).mkdir(exist_ok=True)
    return Journal(root, token)


def written(root, token, *told):
    kept = journal(root, token)
    for message in told:
        kept.note(message)
    kept.write()
    return kept


def test_what_lies_between_comes_in_order_and_once(tmp_path):
    tasks = {"a": TaskStep(0.1, 1.0, 3)}
    written(tmp_path, "lease-2", progress(3), Evaluated(3, 0.2, 0.9), progress(4, tasks=tasks))
    written(tmp_path, "lease-1", Evaluated(0, 0.3, 0.1), progress(1), progress(2), progress(3))
    found = journal(tmp_path, "lease-3").between(1, 4)
    assert found == [progress(2), progress(3), Evaluated(3, 0.2, 0.9), progress(4, tasks=tasks)]
    assert journal(tmp_path).between(4, 4) == []


def test_what_was_not_written_is_not_there(tmp_path):
    journal(tmp_path).note(progress(1))
    assert journal(tmp_path).between(0, 9) == []


def test_a_line_that_was_cut_costs_only_itself(tmp_path):
    written(tmp_path, "lease-1", progress(1), progress(2))
    path = tmp_path / "lease-1" / FILE
    path.write_bytes(path.read_bytes()[:-5])
    assert journal(tmp_path).between(0, 9) == [progress(1)]
    written(tmp_path, "lease-1", progress(2), progress(3))
    assert journal(tmp_path).between(0, 9) == [progress(1), progress(2), progress(3)]


def test_bytes_of_another_kind_are_passed_over(tmp_path):
    written(tmp_path, "lease-1", progress(1))
    with (tmp_path / "lease-1" / FILE).open("ab") as file:
        file.write(b'\xff\x00\n{"type": "stopped", "step": 2}\n')
    written(tmp_path, "lease-1", progress(3))
    assert journal(tmp_path).between(0, 9) == [progress(1), progress(3)]
