"""`make bench-engine`: our generation engine beside what users have, and what its promises cost.

Peers need the extra `bench` (llama.cpp is compiled while it is installed); a row whose peer is missing does not hold.
Sides of a ratio run alternately; ratios are of medians. Rows about GPUs: `tests/benchmarks/gpu`.
"""

import argparse
import sys
import time

from tests.benchmarks.engine_adapters import bench_adapters
from tests.benchmarks.engine_correctness import bench_correctness
from tests.benchmarks.engine_encoder import bench_encoder
from tests.benchmarks.engine_inside import bench_overhead, bench_prefix, bench_structured
from tests.benchmarks.engine_invariance import bench_cost, bench_invariance
from tests.benchmarks.engine_memory import bench_memory
from tests.benchmarks.engine_online import bench_online, bench_online_stack
from tests.benchmarks.engine_speed import bench_speed
from tests.benchmarks.engine_workloads import SHAPES
from tests.benchmarks.table import Table

PARTS = (
    "speed",
    "correctness",
    "invariance",
    "online",
    "prefix",
    "adapters",
    "memory",
    "overhead",
    "structured",
    "encoder",
)
"""In the order of the issue's rows."""
NOT_MEASURED = -1.0


def run_part(part: str, table: Table, arguments: argparse.Namespace) -> None:
    rounds, is_quick = arguments.rounds, arguments.quick
    if part == "speed":
        bench_speed(table, rounds, shapes=arguments.shapes, is_quick=is_quick)
    elif part == "correctness":
        bench_correctness(table, is_quick=is_quick)
    elif part == "invariance":
        bench_invariance(table, is_quick=is_quick)
        bench_cost(table, rounds, is_quick=is_quick)
    elif part == "online":
        step_seconds = bench_online(table, is_quick=is_quick)
        bench_online_stack(table, step_seconds, is_quick=is_quick)
    elif part == "prefix":
        bench_prefix(table, is_quick=is_quick)
    elif part == "adapters":
        bench_adapters(table, rounds, is_quick=is_quick)
    elif part == "memory":
        bench_memory(table, is_quick=is_quick)
    elif part == "overhead":
        bench_overhead(table, rounds, is_quick=is_quick)
    elif part == "structured":
        bench_structured(table, rounds, is_quick=is_quick)
    elif part == "encoder":
        bench_encoder(table, rounds, is_quick=is_quick)


def add_gpu_row(table: Table) -> None:
    """Say of the GPU's rows that this benchmark does not measure them."""
    what = "Llama-8B's shape on a GPU: unmeasured here (make bench-gpu where there is one)"
    table.add("engine-11", what, NOT_MEASURED, "", "≥ 1.5 × transformers', ≥ 0.5 of the bandwidth limit", None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES), help="of the speed rows")
    parser.add_argument("--quick", action="store_true", help="tiny models: tries the benchmark out, measures nothing")
    arguments = parser.parse_args()
    table = Table("engine-quick" if arguments.quick else "engine")
    for part in arguments.only:
        began = time.monotonic()
        run_part(part, table, arguments)
        table.write()
        print(f"  ({part}: {time.monotonic() - began:.0f} s)", flush=True)
    if tuple(arguments.only) == PARTS:
        add_gpu_row(table)
    table.write()
    table.show()
    return 0 if table.holds else 1


if __name__ == "__main__":
    sys.exit(main())
