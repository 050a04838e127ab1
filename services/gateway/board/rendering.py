"""Pages from templates (Jinja), which escape all that they are given, and the words and figures on them."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse

HERE = Path(__file__).parent
STATIC = {path.name: path for path in sorted((HERE / "static").iterdir())}
RELEASE = hashlib.sha256(b"".join(path.read_bytes() for path in STATIC.values())).hexdigest()[:12]
"""What stands in the addresses of static files: browsers keep them until they are others."""
COLORS = 10
"""How many colours a plan tells jobs apart by (`.color-N` in board.css)."""


def moment(seconds: float | None) -> Markup:
    """Return a time as an element; scripts show it in the reader's own zone."""
    if seconds is None:
        return Markup("&ndash;")
    at = datetime.fromtimestamp(seconds, UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        at.strftime("%Y-%m-%dT%H:%M:%SZ"), at.strftime("%d %b %H:%M UTC")
    )


def duration(seconds: float) -> str:
    """Return a length of time, as short as it may be told: `< 1 s`, `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 or not seconds else "< 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count(number: float) -> str:
    """Return a number with its thousands apart, by narrow spaces that no line breaks at."""
    return f"{number:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def size(number: float) -> str:
    """Return bytes in the unit that reads best."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def color(name: str) -> int:
    """Return the number of a name's colour, the same on every page and at every look."""
    return hashlib.sha256(name.encode()).digest()[0] % COLORS


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["release"] = RELEASE
    made.filters.update(moment=moment, duration=duration, count=count, size=size, color=color)
    return made


_templates = _environment()


def fragment(template: str, **context: Any) -> str:
    """Return a part of a page."""
    return _templates.get_template(template).render(context)


def page(template: str, request: Request, viewer: Any, *, status: int = 200, **context: Any) -> HTMLResponse:
    """Return a page for a viewer (None: nobody has logged in)."""
    return HTMLResponse(fragment(template, path=request.url.path, viewer=viewer, **context), status)
