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
