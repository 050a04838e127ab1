"""How deep a JSON value may nest. Whatever walks through it afterwards may recurse: it ends before the stack does."""

from typing import Any

from shared.domain.errors import InvalidRequest

MAX_DEPTH = 100
"""Containers within one another, the outermost counted. Nothing that anybody asks for comes near."""


def is_too_deep(value: Any) -> bool:
    """Return whether a JSON value has containers more than MAX_DEPTH deep; looks level by level, without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return False
        level = [child for node in level for child in _children(node) if isinstance(child, dict | list)]
    return bool(level)


def refuse_deep(value: Any) -> None:
    """Raise InvalidRequest for a JSON value that `is_too_deep`."""
    if is_too_deep(value):
        raise InvalidRequest(f"The body is nested more than {MAX_DEPTH} levels deep.", code="invalid_value")


def cut_deep(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return a JSON value with every container below `depth` levels replaced by None: what still can be written out."""
    if not isinstance(value, dict | list):
        return value
    if depth == 0:
        return None
    if isinstance(value, dict):
        return {key: cut_deep(child, depth - 1) for key, child in value.items()}
    return [cut_deep(child, depth - 1) for child in value]


def _children(node: dict[str, Any] | list[Any]) -> Any:
    return node.values() if isinstance(node, dict) else node
