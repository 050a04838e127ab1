"""What `lamplighter doctor` looks at."""

from pathlib import Path
from typing import Any

from lamplighter.client import Client

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""What Linux calls units that multiply bfloat16: two names on x86, one on ARM."""


def findings(api: Client) -> list[dict[str, Any]]:
    """Return what was found, a check each: `check`, `ok`, `detail`. Raises ServerUnreachable, NotAuthorized."""
    ready = api.readiness()
    has_postgres, has_redis = ready["postgres"], ready["redis"]
    detail = "jobs are accepted" if has_postgres else "away: no job is accepted, and nothing else can be looked up"
    found = [_finding("Postgres", has_postgres, detail)]
    detail = "workers can be told of work" if has_redis else "away: accepted jobs wait until it is back"
    found.append(_finding("Redis", has_redis, detail))
    if has_postgres:  # every call with a key needs it, to know the key
        live = [w for w in api.request("GET", "/v1/workers")["data"] if w["state"] in ("idle", "busy")]
        detail = ", ".join(f"{w['name']} on {w['device']}" for w in live) or "none: jobs wait until one is started"
        found.append(_finding("Workers", bool(live), detail))
        names = [model["id"] for model in api.request("GET", "/v1/models")["data"]]
        found.append(_finding("Models", True, ", ".join(names)))
    found.append(_finding("This CPU", True, f"bfloat16: {bfloat16(_cpuinfo())}"))
    return found


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
