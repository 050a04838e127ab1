"""Fail when functions grow: 95 % within 40 lines, none above 80 (CONTRIBUTING.md)."""

import ast
import sys
from pathlib import Path


def function_sizes(path: Path) -> list[tuple[int, str]]:
    """Return `(lines without docstring, where)` for each function of a file."""
    sizes = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        size = node.end_lineno - node.lineno + 1
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            assert first.end_lineno is not None
            size -= first.end_lineno - first.lineno + 1
        sizes.append((size, f"{path}:{node.lineno} {node.name}"))
    return sizes


def main(roots: list[str]) -> int:
    files = [p for root in roots for p in ([Path(root)] if root.endswith(".py") else sorted(Path(root).rglob("*.py")))]
    sizes = sorted(size for path in files for size in function_sizes(path))
    long = [(size, where) for size, where in sizes if size > 40]
    share = 1 - len(long) / max(1, len(sizes))
    print(f"{len(sizes)} functions, {share:.1%} within 40 lines, longest {sizes[-1][0] if sizes else 0}")
    for size, where in long:
        print(f"  {size} lines  {where}")
    return 0 if share >= 0.95 and (not sizes or sizes[-1][0] <= 80) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
