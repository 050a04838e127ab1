"""What `lamplighter doctor` looks at: what it found, a check each, in words that say what to do."""

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lamplighter.client import Client
from lamplighter.errors import NotAuthorized

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""What Linux calls units that multiply bfloat16: two names on x86, one on ARM."""
FORECAST_SECONDS = 60.0
"""The scheduler foretells every few seconds while jobs are open, and every half minute while none is."""
SILENT_SECONDS = 3600.0
"""As the alert JobStuck has it."""
RETENTION_SECONDS = 3 * 3600.0
"""The scheduler looks each hour."""
DAYS = 3
LEAST_FREE = 0.1
"""Of the store, as the alert StoreNearlyFull has it."""
_SAMPLE = re.compile(r"^lamplighter_(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.MULTILINE)


class Metrics:
    """The samples of a `/metrics` page."""

    def __init__(self, page: str) -> None:
        self._samples = [(m["name"], m["labels"] or "", float(m["value"])) for m in _SAMPLE.finditer(page)]

    def values(self, name: str, label: str = "") -> list[float]:
        """Return the values of a metric, of those samples whose labels contain `label`."""
        return [value for known, labels, value in self._samples if known == name and label in labels]

    def total(self, name: str, label: str = "") -> float:
        return sum(self.values(name, label))

    def most(self, name: str, label: str = "") -> float:
        """Return the largest value; 0 where there is none."""
        return max(self.values(name, label), default=0.0)


def findings(api: Client) -> list[dict[str, Any]]:
    """Return what was found, a check each: `check`, `ok`, `detail`. Raises ServerUnreachable, NotAuthorized."""
    ready = api.readiness()
    has_postgres, has_redis = ready["postgres"], ready["redis"]
    detail = "jobs are accepted" if has_postgres else "away: no job is accepted, and nothing else can be looked up"
    found = [_finding("Postgres", has_postgres, detail)]
    detail = "workers can be told of work" if has_redis else "away: accepted jobs wait until it is back"
    found.append(_finding("Redis", has_redis, detail))
    if has_postgres:  # every call with a key needs it, to know the key
        found.append(_workers(api.request("GET", "/v1/workers")["data"]))
        names = [model["id"] for model in api.request("GET", "/v1/models")["data"]]
        found.append(_finding("Models", True, ", ".join(names)))
        found.extend(_of_an_admin(api))
    found.append(_finding("This CPU", True, f"bfloat16: {bfloat16(_cpuinfo())}"))
    return found


def _workers(known: list[dict[str, Any]]) -> dict[str, Any]:
    live = [worker for worker in known if worker["state"] in ("idle", "busy")]
    detail = ", ".join(f"{w['name']} on {w['device']}" for w in live) or "none: jobs wait until one is started"
    # A worker that was started again has its predecessor's name.
    gone = sorted({w["name"] for w in known if w["state"] == "lost"} - {w["name"] for w in live})
    return _finding("Workers", bool(live), detail + (f"; lost within the hour: {', '.join(gone)}" if gone else ""))


def _of_an_admin(api: Client) -> Iterator[dict[str, Any]]:
    """Yield what only an admin's key may look at."""
    try:
        metrics = Metrics(api.metrics())
        days = api.request("GET", "/v1/retention", params={"limit": DAYS})["data"]
    except NotAuthorized:
        yield _finding("Scheduler", True, "not looked at, nor the store and the night: that takes an admin's key")
        return
    yield from of_metrics(metrics)
    yield of_retention(days, time.time())


def of_retention(days: list[dict[str, Any]], now: float) -> dict[str, Any]:
    """Return whether what has had its time is gone, by the newest look; `days` as `GET /v1/retention` has them."""
    looks = [day for day in days if day["checked_at"] is not None]
    last = max(looks, key=lambda day: day["checked_at"], default=None)
    if last is None or now - last["checked_at"] > RETENTION_SECONDS:
        since = "yet" if last is None else f"for {(now - last['checked_at']) / 3600:.0f} hours"
        return _finding("Retention", False, f"nobody has looked {since} for what is past its time: see the scheduler")
    said = ", ".join(f"{count} {what}" for what, count in sorted(last["overdue"].items()) if count)
    return _finding("Retention", not said, f"past their time and still there: {said}" if said else "nothing overdue")


def of_metrics(metrics: Metrics) -> Iterator[dict[str, Any]]:
    """Yield what metrics say: is anything silent, stuck, broken, full or late?"""
    open_jobs = metrics.total("open_jobs")
    age = metrics.most("forecast_age_seconds")
    since = "has never been at work" if age == math.inf else f"silent for {age:.0f} s"
    detail = f"{since}: jobs neither begin nor end; see its log, start it" if age > FORECAST_SECONDS else "at work"
    yield _finding("Scheduler", age <= FORECAST_SECONDS, detail)
    silence = metrics.most("running_slice_silent_seconds")
    stuck = f"something that runs has recorded nothing for {silence:.0f} s: see its job's attempts on the board"
    yield _finding("Jobs", silence <= SILENT_SECONDS, stuck if silence > SILENT_SECONDS else f"{open_jobs:.0f} open")
    late = metrics.most("jobs_with_deadline", 'expected="late"')
    night = f"{late:.0f} jobs will miss their deadlines: see the plan" if late else "every deadline can be met"
    yield _finding("Tonight", late == 0, night)
    given_up = metrics.most("dead_lettered_lines_in_last_hour")
    lines = f"{given_up:.0f} given up within the hour: their jobs' error files say why" if given_up else "none given up"
    yield _finding("Lines", True, lines)
    broken = metrics.most("audit_findings")
    rules = f"{broken:.0f} broken: a fault of ours; the table audit_finding has them" if broken else "none broken"
    yield _finding("Invariants", broken == 0, rules)
    if sizes := metrics.values("store_size_bytes"):
        free = metrics.most("store_free_bytes") / max(sizes)
        room = f"{free:.0%} of its disk is free"
        yield _finding("Store", free >= LEAST_FREE, room if free >= LEAST_FREE else f"{room}: uploads will be refused")


def _finding(check: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"check": check, "ok": ok, "detail": detail}


def _cpuinfo() -> str:
    try:
        return CPUINFO.read_text()
    except OSError:  # not Linux
        return ""


def bfloat16(cpuinfo: str) -> str:
    """Return how a CPU computes in bfloat16, from the text of /proc/cpuinfo: a model may be registered as bfloat16."""
    for line in cpuinfo.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, ARM; the cores of a machine are alike
            return "native" if BFLOAT16_FLAGS & set(flags.split()) else "emulated, slow"
    return "unknown"
