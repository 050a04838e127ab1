"""Charts as SVG (pygal), drawn where the figures are: pages need no script for them, and each has a table beside it."""

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from xml.etree import ElementTree as ET

from pygal import XY, Config, Graph, StackedBar
from pygal.style import Style

# Its finder of plug-ins, of which we have none, is of a kind that Python has given up, and would be asked about each
# module that is imported from now on.
sys.meta_path[:] = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]

MOST_POINTS = 400
"""Of a curve: more than a screen has room for are averaged."""

_STYLE = Style(
    background="transparent",
    plot_background="transparent",
    font_family="system-ui, sans-serif",
    label_font_size=13,
    major_label_font_size=13,
    legend_font_size=13,
    title_font_size=15,
    colors=("#2f5fb3", "#b3472f", "#2f8a4f", "#8a5a00", "#7a3fb0", "#00788a", "#a8326e", "#5c6b00"),
)


def _config(title: str, **more: Any) -> Config:
    config = Config(
        title=title,
        width=820,
        height=340,
        style=_STYLE,
        legend_at_bottom=True,
        legend_at_bottom_columns=4,
        no_data_text="Nothing yet",
        show_dots=False,
        **more,
    )
    config.js = []  # neither a script from elsewhere nor any other
    return config


def _document(chart: Graph) -> bytes:
    """Return a chart without the script that pygal puts its configuration into."""
    tree = chart.render_tree()
    for parent in list(tree.iter()):
        for child in [each for each in parent if str(each.tag).endswith("script")]:
            parent.remove(child)
    document: bytes = ET.tostring(tree, "utf-8", xml_declaration=True)
    return document


def loss_curves(metrics: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the loss of a job's steps, in training and validation, as an SVG document; of each task, where it has
    several.
    """
    chart = XY(_config("Loss by step", stroke_style={"width": 2}, x_title="step"))
    for name, points in _curves(metrics).items():
        chart.add(name, thinned(points))
    return _document(chart)


def _curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in metrics:
        found = {"training": row.get("train_loss"), "validation": row.get("valid_loss")}
        found |= {task: figures.get("loss") for task, figures in (row.get("tasks") or {}).items()}
        for name, loss in found.items():
            if isinstance(loss, int | float):
                curves.setdefault(name, []).append((row["step"], loss))
    return curves


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return a curve of at most `most` points, each the mean of its neighbours."""
    width = -(-len(points) // most)
    if width <= 1:
        return list(points)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]


def usage_bars(rows: Sequence[Mapping[str, Any]], days: Sequence[datetime]) -> bytes:
    """Return the device hours of each day, by tenant, as an SVG document."""
    chart = StackedBar(_config("Device hours by day", x_label_rotation=30))
    chart.x_labels = [day.strftime("%d %b") for day in days]
    for tenant in sorted({row["tenant"] for row in rows}):
        by_day = dict.fromkeys(days, 0.0)
        for row in rows:
            if row["tenant"] == tenant:
                by_day[row["at"]] += row["device_seconds"] / 3600
        chart.add(tenant, [round(hours, 5) for hours in by_day.values()])
    return _document(chart)
