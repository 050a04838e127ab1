"""Draws a comparison of tasks trained together and alone: rows as JSON on stdin, a PNG on stdout."""

import io
import json
import sys
from typing import Any

from matplotlib.figure import Figure

BAR = 0.8


def draw(rows: list[dict[str, Any]]) -> bytes:
    """Return a PNG with a bar a task: by how much its main metric is better together than alone."""
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes: Any = figure.subplots()
    changes = [100 * row["change"] for row in rows]
    names = [f"{row['task']} ({row['metric']} {row['together']:.3g} / {row['alone']:.3g})" for row in rows]
    places = range(len(rows))
    axes.barh(places, changes, height=BAR, color=["C0" if change >= 0 else "C3" for change in changes])
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=0.8)
    axes.set(title="Trained together, against each task alone", xlabel="better by, %")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


if __name__ == "__main__":
    sys.stdout.buffer.write(draw(json.load(sys.stdin)))
