import threading
import time

from services.worker.slices import AloneGate


def test_a_suspect_runs_alone_and_is_not_starved():
    gate, log, lock = AloneGate(), [], threading.Lock()
    together = threading.Barrier(3, timeout=5)

    def run(name, alone, wait=None):
        with gate.enter(alone=alone):
            with lock:
                log.append(("in", name))
            if wait:
                wait.wait()
            time.sleep(0.05)
            with lock:
                log.append(("out", name))

    threads = [threading.Thread(target=run, args=(f"n{i}", False, together)) for i in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    threads += [
        threading.Thread(target=run, args=("suspect", True)),
        threading.Thread(target=run, args=("late", False)),
    ]
    for thread in threads[3:]:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(5)
    at = log.index(("in", "suspect"))
    assert log[at + 1] == ("out", "suspect")
    assert log[at + 2] == ("in", "late")


def test_a_slice_that_must_stop_waits_for_no_place():
    """A suspect of a cancelled job does not hold its lease until all others on the worker have ended."""
    gate, asked, outcome = AloneGate(), threading.Event(), []
    with gate.enter(alone=False):

        def wait():
            with gate.enter(alone=True, must_stop=asked.is_set) as has_entered:
                outcome.append(has_entered)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.05)
        assert outcome == []
        asked.set()
        thread.join(3)
        assert outcome == [False]
        with gate.enter(alone=False) as has_entered:  # nobody stands behind one that has left
            assert has_entered
