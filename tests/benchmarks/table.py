"""The table that every benchmark prints and writes to build/bench/NAME.json (contracts.md)."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable


class Table:
    """Rows `{id, what, value, unit, bar, holds, samples, command, commit}`; `holds` is null where nothing was measured.

    Rows are written as soon as `write` is called; those of earlier runs stay, each with its own command and commit,
    until they are measured again.
    """

    def __init__(self, name: str) -> None:
        self.name, self.command = name, " ".join(["python -m", *_module_and_arguments()])
        self.commit = _commit()
        self.rows: list[dict] = []

    @property
    def holds(self) -> bool:
        """Whether every row that was measured holds."""
        return all(row["holds"] is not False for row in self.rows)

    def add(
        self,
        identifier: str,
        what: str,
        value: float,
        unit: str,
        bar: str,
        holds: bool | None,
        samples: list | None = None,
    ) -> None:
        """Add a row; `samples` are what was measured, in order."""
        holds = None if holds is None else bool(holds)
        row = {"id": identifier, "what": what, "value": value, "unit": unit, "bar": bar, "holds": holds}
        made_by = {"command": self.command, "commit": self.commit}
        self.rows.append(row | {"samples": samples or [value]} | made_by)
        print(f"  {identifier}: {value:.4g} {unit} (bar {bar}) {_HOLDS[holds]}", flush=True)

    def write(self) -> None:
        """Write what was measured until now to the table's JSON file."""
        path = Path("build/bench") / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        measured = {row["id"] for row in self.rows}
        earlier = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [row for row in earlier if row["id"] not in measured] + self.rows
        rows.sort(key=lambda row: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row["id"])])
        content = {"commit": self.commit, "machine": machine(), "rows": rows}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def show(self) -> None:
        """Print the rows of this run."""
        view = RichTable(title=f"{self.name}, {self.command}")
        for column in ("id", "what", "value", "bar", "holds"):
            view.add_column(column, overflow="fold")
        for row in self.rows:
            value = "–" if row["holds"] is None else f"{row['value']:.4g} {row['unit']}"
            view.add_row(row["id"], row["what"], value, row["bar"], _HOLDS[row["holds"]])
        Console(width=150).print(view)


_HOLDS = {True: "holds", False: "MISSED", None: "not measured"}


def _module_and_arguments() -> list[str]:
    main = sys.modules["__main__"]
    return [main.__spec__.name if main.__spec__ else Path(sys.argv[0]).name, *sys.argv[1:]]


def _commit() -> str:
    """Return the commit that is measured, with `-dirty` where the tree has other changes."""
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
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
