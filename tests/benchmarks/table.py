"""The table that every benchmark prints and writes to build/bench/NAME.json (contracts.md)."""

import json
import os
import platform
import subprocess
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable


class Table:
    """Rows `{id, what, value, unit, bar, holds, samples, command}`."""

    def __init__(self, name: str, command: str) -> None:
        self.name, self.command = name, command
        self.rows: list[dict] = []

    @property
    def holds(self) -> bool:
        return all(row["holds"] for row in self.rows)

    def add(
        self, identifier: str, what: str, value: float, unit: str, bar: str, holds: bool, samples: list | None = None
    ) -> None:
        """Add a row; `samples` are what was measured, in order."""
        row = {"id": identifier, "what": what, "value": value, "unit": unit, "bar": bar, "holds": bool(holds)}
        self.rows.append(row | {"samples": samples or [value], "command": self.command})
        print(f"  {identifier}: {value:.4g} {unit} (bar {bar}) {'holds' if holds else 'MISSED'}", flush=True)

    def write(self) -> None:
        """Print the table and write its JSON."""
        view = RichTable(title=self.name)
        for column in ("id", "what", "value", "bar", "holds"):
            view.add_column(column, overflow="fold")
        for row in self.rows:
            view.add_row(
                row["id"], row["what"], f"{row['value']:.4g} {row['unit']}", row["bar"], "yes" if row["holds"] else "NO"
            )
        Console(width=150).print(view)
        path = Path("build/bench") / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"commit": _commit(), "machine": machine(), "rows": self.rows}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _commit() -> str:
    answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def machine() -> dict:
    """Return what the figures were measured on."""
    try:
        from importlib.metadata import version

        torch = version("torch")
    except ImportError:
        torch = None
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch, "threads": os.cpu_count()}
