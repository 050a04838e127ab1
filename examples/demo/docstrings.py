"""Real text that every machine has: the docstrings of Python's own standard library, read from its source files."""

import ast
import sysconfig
from dataclasses import dataclass
from pathlib import Path

SHORTEST_CHARACTERS = 60
HELD_BACK = 200
"""The first of the list, which no model of the demo is trained on."""


@dataclass(frozen=True)
class Docstring:
    """`name` is such as `json.decoder.decode`; `signature` a `def` or `class` line; `raises`: whether its body does."""

    name: str
    signature: str
    text: str
    raises: bool = False

    @property
    def first_line(self) -> str:
        return self.text.splitlines()[0].strip()


def collect(limit: int | None = None) -> list[Docstring]:
    """Return docstrings of functions and classes, in a fixed order, each text once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Docstring] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if relative.parts[0] in ("test", "site-packages", "idlelib", "lib2to3") or "tests" in relative.parts:
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for docstring in _of_file(path, module):
            found.setdefault(docstring.text, docstring)
    # Files differ much in style: every 7th first, and so on, so that a prefix of the list is a fair sample.
    ordered = [docstring for start in range(7) for docstring in list(found.values())[start::7]]
    return ordered[:limit]


def _of_file(path: Path, module: str) -> list[Docstring]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a few files exist to be broken
        return []
    docstrings = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node)
        if text and len(text) >= SHORTEST_CHARACTERS:
            raises = any(isinstance(part, ast.Raise) for part in ast.walk(node))
            docstrings.append(Docstring(f"{module}.{node.name}", _signature(node), text, raises))
    return docstrings


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    return f"def {node.name}({ast.unparse(node.args)})"
