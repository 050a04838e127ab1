"""What `lamplighter simulate` does: the server's policy over a made-up fleet."""

from typing import Any

from shared.domain.scheduling.simulation import Report, outages, simulate, week


def run(seed: int, *, days: int, failures: float, **asked: Any) -> Report:
    """Return what comes of a fleet and its jobs (`week`'s arguments), each device failing so often a day."""
    trace = week(seed, days=days, **asked)
    _, report = simulate(trace, outages(seed, trace.lanes, days=days, per_day=failures), days=days)
    return report
