"""`make chaos`: the long fault runs. Prints seeds and counts, and writes build/bench/chaos.json."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.table import Table
from tests.chaos import scenarios

LINES = 10_000


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
        "postgres": lambda d: scenarios.postgres_kills(d, seed=seed, lines=lines, times=20 // share),
        "scheduler": lambda d: scenarios.scheduler_kills(d, seed=seed, lines=lines, times=20 // share),
        "gateway": lambda d: scenarios.gateway_kills(d, times=50 // share),
        "zombies": lambda d: scenarios.zombies(d, seed=seed, lines=lines, times=50 // share),
        "control": lambda d: scenarios.zombies(
            d, seed=seed, lines=lines // 2, times=10 // min(share, 3), unfenced=True
        ),
        "poison": lambda d: scenarios.poison(d, seed=seed, lines=lines),
        "hung": lambda d: scenarios.hung_child(d, seed=seed, lines=lines // 10),
    }
    table = Table("chaos", command=f"python -m tests.chaos.run {' '.join(sys.argv[1:])}")
    for name, run in runs.items():
        if arguments.only and arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory(prefix=f"lamplighter-chaos-{name}-") as directory:
            Path(directory).chmod(0o711)
            outcome = run(Path(directory))
        print(outcome, flush=True)
        _add_rows(table, name, outcome)
    table.write()
    return 0 if table.holds else 1


def _add_rows(table: Table, name: str, outcome) -> None:
    if name == "gateway":
        bad = outcome.unfound + outcome.doubled + outcome.missing
        table.add(f"chaos-{name}", str(outcome), bad, "jobs", "= 0", bad == 0)
        return
    if name == "control":
        table.add(f"chaos-{name}", str(outcome), outcome.twice, "lines twice", "> 0", outcome.twice > 0)
        return
    allowed = 1 if name == "poison" else 0
    clean = (outcome.lost, outcome.twice, outcome.failed, outcome.findings) == (0, 0, allowed, 0)
    table.add(f"chaos-{name}", str(outcome), outcome.lost + outcome.twice, "lines lost or twice", "= 0", clean)
    if name == "zombies":
        table.add(
            f"chaos-{name}-seen",
            "stale writes seen and rejected",
            outcome.stale_writes,
            "writes",
            "> 0",
            outcome.stale_writes > 0,
        )
    if name == "workers":
        kills = sum(outcome.kills.values())
        table.add(
            f"chaos-{name}-recomputed",
            "lines recomputed a kill",
            outcome.recomputed / max(1, kills),
            "lines",
            "≤ 64 (one flush of each slice)",
            outcome.recomputed <= 64 * kills,
        )
    for what, seconds in outcome.slowest.items():
        bar = {"re-dispatch after a wipe": 5, "work after Postgres is back": 15}.get(what, 45)
        table.add(f"chaos-{name}-time", what, round(seconds, 2), "s", f"≤ {bar}", seconds <= bar)


if __name__ == "__main__":
    sys.exit(main())
