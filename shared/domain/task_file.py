"""What a line of a multi-task training file must hold, for each kind of task; faults name task and field."""

import math
import re
from typing import Any

from shared.domain.batch_file import LineError
from shared.domain.nesting import MAX_DEPTH, is_too_deep
from shared.domain.prepared_tasks import MOST_INPUT, TaskKind
from shared.domain.training_file import loads, shown

MOST_WORDS = 100_000
MOST_TARGET = 1e100
"""Of a regression's target, whose squares are added up."""
_WHOLE = re.compile(r"-?[0-9]{1,18}")


class Fault(Exception):
    """Carries what is wrong with a line."""

    def __init__(self, code: str, message: str, param: str) -> None:
        super().__init__(message)
        self.error = LineError(code, message, param=param)


def parse_row(line: bytes) -> dict[str, Any]:
    """Return a line's object. Raises Fault."""
    entry = loads(line)
    if isinstance(entry, LineError):
        raise Fault(entry.code, entry.message, "")
    if not isinstance(entry, dict):
        raise Fault("invalid_json_line", "This line is not a JSON object.", "")
    if is_too_deep(entry):
        raise Fault("nested_too_deep", f"This line is nested more than {MAX_DEPTH} levels deep.", "")
    return entry


def text_of(entry: dict[str, Any], name: str) -> str:
    """Return a field's text. Raises Fault."""
    value = _field(entry, name)
    if not isinstance(value, str) or not value.strip():
        raise Fault("invalid_text", f"This must be a text, and not an empty one; it is {shown(value)}.", name)
    return value


def words_of(entry: dict[str, Any], name: str) -> list[str]:
    """Return a field's words. Raises Fault."""
    value = _field(entry, name)
    if not isinstance(value, list) or not value or len(value) > MOST_WORDS:
        raise Fault("invalid_words", f"This must be a list of words; it is {shown(value)}.", name)
    for number, word in enumerate(value):
        if not isinstance(word, str) or not word.strip():
            raise Fault(
                "invalid_words",
                f"A word must be a text, and not an empty one; this is {shown(word)}.",
                f"{name}[{number}]",
            )
    return value


def vector_of(entry: dict[str, Any], name: str, width: int) -> list[float]:
    """Return a field's numbers. Raises Fault."""
    value = _field(entry, name)
    if not isinstance(value, list) or len(value) != width:
        found = f"{len(value)} of them" if isinstance(value, list) else shown(value)
        raise Fault("invalid_vector", f"This must be a list of {width} numbers; it is {found}.", name)
    return [_number(number, f"{name}[{index}]", "invalid_vector", MOST_INPUT) for index, number in enumerate(value)]


def target_of(entry: dict[str, Any], kind: TaskKind, name: str, words: int) -> Any:
    """Return a task's target as its kind has it, labels as texts. Raises Fault.

    words: How many the row has, for token classification.
    """
    value = _field(entry, name)
    match kind:
        case "classification":
            return _label(value, name)
        case "multilabel":
            if not isinstance(value, list):
                raise Fault("invalid_label", f"This must be a list of labels; it is {shown(value)}.", name)
            return [_label(label, f"{name}[{number}]") for number, label in enumerate(value)]
        case "regression":
            return _number(value, name, "invalid_target", MOST_TARGET)
        case "token_classification":
            if not isinstance(value, list):
                raise Fault("invalid_label", f"This must be a list of labels; it is {shown(value)}.", name)
            if len(value) != words:
                text = f"There are {len(value)} labels for {words} words; each word needs one."
                raise Fault("unequal_lengths", text, name)
            return [_label(label, f"{name}[{number}]") for number, label in enumerate(value)]
    return text_of(entry, name)


def _field(entry: dict[str, Any], name: str) -> Any:
    value = entry.get(name)
    if value is None:
        raise Fault("missing_field", f"The field {name!r} is missing.", name)
    return value


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value and len(value) <= 200 and "\0" not in value:
        return value
    raise Fault(
        "invalid_label", f"A label is a text of 1 to 200 characters, or a whole number; this is {shown(value)}.", where
    )


def _number(value: Any, where: str, code: str, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Fault(code, f"This must be a number; it is {shown(value)}.", where)
    if abs(value) > most:
        raise Fault(code, f"This must be between -{most:g} and {most:g}; it is {shown(value)}.", where)
    return float(value)


def ordered(labels: set[str]) -> list[str]:
    """Return labels in the order of their numbers: whole numbers by size, else by their characters."""
    if all(_WHOLE.fullmatch(label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)
