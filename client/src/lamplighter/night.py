"""The plan of the night, as a table and as a Gantt chart."""

from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lamplighter.errors import LamplighterError

NO_PLOTS = "Drawing needs matplotlib: pip install 'lamplighter[plot]'."


class PlotsMissing(LamplighterError):
    """matplotlib is not installed."""


def clock(moment: int | None) -> str:
    """Return a time by the clock of this machine; nothing for none."""
    return "" if moment is None else datetime.fromtimestamp(moment, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def judgement(job: dict[str, Any]) -> str:
    """Say in words whether a job will be done in time."""
    if job["ends_at"] is None:
        return "will not fit"
    if job["on_time"] is None:
        return ""
    if job["on_time"]:
        return "in time"
    deadline = job.get("deadline")
    return "at risk" if deadline is not None and job["ends_at"] <= deadline else "late"


def show_night(console: Console, plan: dict[str, Any]) -> None:
    """Print when each job begins and ends, and on which workers."""
    where: dict[str, set[str]] = {}
    for lane in plan["lanes"]:
        for block in lane["blocks"]:
            where.setdefault(block["job"], set()).add(lane["worker"])
    table = Table("job", "begins", "ends", "", "by", "workers", box=None)
    table.columns[0].overflow = "fold"  # an id that is cut off is none
    for job in plan["jobs"]:
        times = clock(job["starts_at"]), clock(job["ends_at"])
        basis = "measured" if job["confidence"] == "measured" else "a guess"
        table.add_row(job["id"], *times, judgement(job), basis, ", ".join(sorted(where.get(job["id"], ()))))
    console.print(table if plan["jobs"] else "Nothing is foretold: no job is open, or what is came a moment ago.")


def show_report(console: Console, report: Any) -> None:
    """Print what came of a simulation (the server's `services.local.simulation`)."""
    hours = 3600.0
    rows = {
        "jobs ended": f"{report.ended} of {report.jobs}",
        "days until the last": f"{report.makespan_seconds / 86_400:.2f}",
        "device hours worked": f"{report.worked_device_seconds / hours:.0f}, {report.utilisation:.1%} of the fleet's",
        "failures": f"{report.failures}, {report.done_again_seconds / hours:.1f} device hours done again",
        "deadlines met": f"{report.deadlines_met} of {report.deadlines}",
        "waited": f"{report.wait_seconds_median / 60:.0f} min at the median, {report.wait_seconds_p95 / 60:.0f} at p95",
    }
    rows |= {name: f"{seconds / hours:.0f} device hours" for name, seconds in report.device_seconds_by_tenant.items()}
    table = Table(box=None, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def draw_plan(plan: dict[str, Any], path: Path) -> None:
    """Draw workers as rows and jobs as bars, into an SVG or a PNG. Raises PlotsMissing."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        dates: Any = import_module("matplotlib.dates")  # it has no types
    except ImportError:
        raise PlotsMissing(NO_PLOTS) from None
    lanes = plan["lanes"]
    figure = Figure(figsize=(12, 1.5 + 0.5 * max(1, len(lanes))), layout="constrained")
    axes = figure.subplots()
    judged = {job["id"]: judgement(job) for job in plan["jobs"]}
    zone = datetime.now(UTC).astimezone().tzinfo
    names = list(dict.fromkeys(block["job"] for lane in lanes for block in lane["blocks"]))
    for row, lane in enumerate(lanes):
        for block in lane["blocks"]:
            start, end = (dates.date2num(datetime.fromtimestamp(block[key], UTC)) for key in ("starts_at", "ends_at"))
            late = judged.get(block["job"]) in ("late", "will not fit")
            axes.barh(
                row,
                end - start,
                left=start,
                color=f"C{names.index(block['job']) % 10}",
                edgecolor="red" if late else "white",
                hatch="//" if late else None,
            )
            axes.annotate(block["job"][-6:], ((start + end) / 2, row), ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(lanes)), [f"{lane['worker']} {lane['device']}" for lane in lanes])
    axes.invert_yaxis()
    locator = dates.AutoDateLocator(tz=zone)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator, tz=zone))
    # What was foretold a moment ago may be expected to have ended by now, and is shown all the same.
    first = min([plan["now"], *(block["starts_at"] for lane in lanes for block in lane["blocks"])])
    axes.set_xlim(left=dates.date2num(datetime.fromtimestamp(first, UTC)))
    axes.set_title(f"Plan of {clock(plan['now'])}; hatched: late")
    with rc_context({"svg.fonttype": "none"}):  # texts stay texts, to be searched and read aloud
        figure.savefig(path)
