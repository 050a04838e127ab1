"""`make chaos`: the long fault runs. Prints seeds and counts, and writes build/bench/chaos.json."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from tests.benchmarks.table import Table
from tests.chaos import scenarios, training
from tests.support.servers import ROOT

LINES = 10_000
BARS = {"re-dispatch after a wipe": 5, "work after Postgres is back": 15}
"""Seconds, from the issue; what has no bar there must not take longer than OTHER_BAR."""
OTHER_BAR = 45
DEFAULT_LINES = 6000
"""Of the runs with default settings: more slices than both workers take at once, so that some always wait."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="the full numbers; otherwise a tenth of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="part of a scenario's name")
    arguments = parser.parse_args()
    share = 1 if arguments.long else 10
    lines, seed = LINES // share, arguments.seed
    runs = {
        "workers": lambda d: scenarios.worker_kills(d, seed=seed, lines=lines, times=200 // share),
        "redis": lambda d: scenarios.redis_wipes(d, seed=seed, lines=lines, times=30 // share),
        "redis-default": lambda d: scenarios.redis_wipes_by_default(d, seed=seed, lines=DEFAULT_LINES, times=3),
        "postgres": lambda d: scenarios.postgres_kills(d, seed=seed, lines=lines, times=20 // share),
        "postgres-default": lambda d: scenarios.postgres_kills_by_default(d, seed=seed, lines=DEFAULT_LINES, times=3),
        "scheduler": lambda d: scenarios.scheduler_kills(d, seed=seed, lines=lines, times=20 // share),
        "gateway": lambda d: scenarios.gateway_kills(d, times=50 // share),
        "zombies": lambda d: scenarios.zombies(d, seed=seed, lines=lines, times=50 // share),
        "control": lambda d: scenarios.zombies(
            d, seed=seed, lines=lines // 2, times=10 // min(share, 3), unfenced=True
        ),
        "poison": lambda d: scenarios.poison(d, seed=seed, lines=lines),
        "hung": lambda d: scenarios.hung_child(d, seed=seed, lines=lines // 10),
        "training": lambda d: training.trainer_kills(
            d, seed=seed, examples=600 // share, times=24 if share == 1 else 6
        ),
        "machine": lambda _: machine(seed=seed, steps=10_000 // share),
    }
    table = Table("chaos")
    for name, run in runs.items():
        if arguments.only and arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory(prefix=f"lamplighter-chaos-{name}-") as directory:
            Path(directory).chmod(0o711)
            try:
                outcome = run(Path(directory))
            except Exception as error:  # the other runs still say what they saw
                traceback.print_exc()
                table.add(f"chaos-{name}", f"{name} broke off: {error}", -1, "", "ends", False)
                continue
        if name == "machine":
            table.add("chaos-machine", *outcome)
            continue
        print(outcome, flush=True)
        _add_rows(table, name, outcome)
    table.write()
    table.show()
    return 0 if table.holds else 1


def machine(*, seed: int, steps: int) -> tuple[str, float, str, str, bool]:
    """Run the state machine of the lease protocol for about `steps` steps; return its row of the table."""
    examples = steps // 90 + 1  # some end early
    more = {"LAMPLIGHTER_MACHINE_EXAMPLES": str(examples), "LAMPLIGHTER_MACHINE_STEPS": "100"}
    more["LAMPLIGHTER_MACHINE_SEED"] = str(seed)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "tests/integration/test_lease_machine.py", "--timeout=1800"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True, check=False)
    found = re.search(r"(\d+) steps of the lease machine", done.stdout)
    taken = int(found[1]) if found else 0
    if done.returncode != 0:
        print(done.stdout[-5000:], flush=True)
    what = f"steps of the lease protocol in any order, invariants checked after each (seed {seed})"
    return what, taken, "steps", f"≥ {steps}, all of them", taken >= steps and done.returncode == 0


def _add_rows(table: Table, name: str, outcome) -> None:
    """Add an outcome's rows; a run that did not kill as often as it was to has proved nothing."""
    if name == "gateway":
        holds = outcome.bad == 0 and outcome.is_complete
        table.add(f"chaos-{name}", str(outcome), outcome.bad, "jobs", "= 0, every kill done", holds)
        return
    if name == "training":
        bar = "= 0, every kill done"
        table.add("chaos-training", str(outcome), outcome.bad, "faults", bar, outcome.bad == 0 and outcome.is_complete)
        few = outcome.worst <= outcome.interval
        what = "steps of a training job computed again after one kill, at most"
        table.add("chaos-training-again", what, outcome.worst, "steps", f"≤ {outcome.interval}, a checkpoint's", few)
        return
    if name == "control":
        holds = outcome.twice > 0 and outcome.is_complete
        table.add(f"chaos-{name}", str(outcome), outcome.twice, "lines twice", "> 0, every kill done", holds)
        return
    allowed = 1 if name == "poison" else 0
    clean = (outcome.lost, outcome.twice, outcome.failed, outcome.findings) == (0, 0, allowed, 0)
    wrong = outcome.lost + outcome.twice
    bar = "= 0, every kill done"
    table.add(f"chaos-{name}", str(outcome), wrong, "lines lost or twice", bar, clean and outcome.is_complete)
    if name == "zombies":
        what = f"{outcome.size}: stale writes seen and rejected"
        table.add(f"chaos-{name}-seen", what, outcome.stale_writes, "writes", "> 0", outcome.stale_writes > 0)
    if name == "workers":
        mean = outcome.recomputed / max(1, outcome.killed)
        what = f"{outcome.size}: lines that one kill had recomputed, at most ({mean:.2f} on average)"
        bar = f"≤ a flush of each slice it ended ({max(outcome.flushes.values(), default=0)} at most)"
        most = max(outcome.costs.values(), default=0)
        table.add(f"chaos-{name}-recomputed", what, most, "lines", bar, outcome.worst_excess <= 0)
    for what, seconds in outcome.slowest.items():
        bar = BARS.get(what, OTHER_BAR)
        text = f"{outcome.size}: {what}, slowest"
        table.add(f"chaos-{name}-time", text, round(seconds, 2), "s", f"≤ {bar}", seconds <= bar)


if __name__ == "__main__":
    sys.exit(main())
