"""Random JSON schemas of every kind that people ask answers to follow, drawn from a seed.

All are bounded: an answer to one ends by itself, even when a model of random weights writes it.
"""

import random
import string
from typing import Any

Schema = dict[str, Any]

PATTERNS = (
    "^[a-d]{0,6}$",
    "^(red|green|blue)(-[0-9]{1,2})?$",
    "^[A-Z]{2}[0-9]{3}$",
    "^a{2,5}b?$",
    r"^\d{1,3}\.\d{2}$",
    '^[^x\\\\"\\u0000-\\u001f]{1,4}$',
    "^(ja|nein|vielleicht)$",
)
FORMATS = ("uuid", "ipv4")
"""Those that a grammar says completely: of dates and times it lets pass a 29th of February in any year, and leap seconds."""
VALUES = ("red", "grün", "雪", "", 'a "quoted" one', "back\\slash", 4, -1.5, None, True, False)


def random_schema(generator: random.Random, depth: int = 3) -> Schema:
    """Return a schema with at most `depth` levels of arrays, objects and alternatives in it."""
    return _referring(generator, depth) if generator.random() < 0.08 else _part(generator, depth)


def _part(generator: random.Random, depth: int) -> Schema:
    kinds = [_scalar, _integer, _number, _string, _pattern, _format, _choice]
    if depth:
        kinds += [_array, _tuple, _object, _object, _alternatives, _open_object]
    return generator.choice(kinds)(generator, depth)


def _scalar(generator: random.Random, _depth: int) -> Schema:
    return generator.choice(
        [{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}, {"const": generator.choice(VALUES)}]
    )


def _integer(generator: random.Random, _depth: int) -> Schema:
    low = generator.randint(-5000, 5000)
    lowest = generator.choice(["minimum", "exclusiveMinimum"])
    highest = generator.choice(["maximum", "exclusiveMaximum"])
    return {"type": "integer", lowest: low, highest: low + generator.randint(2, 3000)}


def _number(generator: random.Random, _depth: int) -> Schema:
    """A number whose decimals are bounded by what it is a multiple of."""
    low = generator.randint(-20, 20)
    return {"type": "number", "minimum": low, "maximum": low + generator.randint(1, 40), "multipleOf": 0.25}


def _string(generator: random.Random, _depth: int) -> Schema:
    least = generator.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + generator.randint(0, 4)}


def _pattern(generator: random.Random, _depth: int) -> Schema:
    return {"type": "string", "pattern": generator.choice(PATTERNS)}


def _format(generator: random.Random, _depth: int) -> Schema:
    return {"type": "string", "format": generator.choice(FORMATS)}


def _choice(generator: random.Random, _depth: int) -> Schema:
    return {"enum": generator.sample(VALUES, generator.randint(1, 5))}


def _array(generator: random.Random, depth: int) -> Schema:
    least = generator.randint(0, 2)
    return {
        "type": "array",
        "items": _part(generator, depth - 1),
        "minItems": least,
        "maxItems": least + generator.randint(0, 1),
    }


def _tuple(generator: random.Random, depth: int) -> Schema:
    items = [_part(generator, depth - 1) for _ in range(generator.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _object(generator: random.Random, depth: int) -> Schema:
    """An object some of whose properties may be left out."""
    names = generator.sample(["name", "größe", "a b", "x", "y", 'with "quotes"', "nested"], generator.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _part(generator, depth - 1) for name in names},
        "required": [name for name in names if generator.random() < 0.7],
        "additionalProperties": False,
    }


def _open_object(generator: random.Random, depth: int) -> Schema:
    """An object whose names are free and whose number of properties is not."""
    return {
        "type": "object",
        "patternProperties": {f"^[{generator.choice(string.ascii_lowercase)}]{{1,3}}$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": generator.randint(0, 2),
    }


def _alternatives(generator: random.Random, depth: int) -> Schema:
    return {"anyOf": [_part(generator, depth - 1) for _ in range(generator.randint(2, 3))]}


def _referring(generator: random.Random, depth: int) -> Schema:
    """A definition that is used twice, once within an array."""
    named = {"$ref": "#/$defs/part"}
    return {
        "$defs": {"part": _part(generator, depth - 1)},
        "type": "object",
        "properties": {"first": named, "second": {"type": "array", "items": named, "minItems": 1, "maxItems": 2}},
        "required": ["first", "second"],
        "additionalProperties": False,
    }
