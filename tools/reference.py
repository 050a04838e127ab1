"""Writes docs/reference: the API by its OpenAPI document, the client by its docstrings, the command line by Typer; and
the table of settings in docs/configuration.md.

`make reference` writes them; `make check` runs it with `--check`, and fails on a page that is not what the code says.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lamplighter
import typer
from lamplighter import cli, errors
from lamplighter.training import Training
from typer.cli import get_docs_for_click

from services.gateway.app import create_app
from services.gateway.openapi import REFUSALS
from shared.settings import RemoteSettings, Settings

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = {"database_url": "postgresql://nobody@127.0.0.1:1/none", "redis_url": "redis://127.0.0.1:1/0"}
REF = "#/components/schemas/"
SUBJECTS = {
    "chat": "Online calls", "completions": "Online calls", "embeddings": "Online calls", "predictions": "Online calls",
    "files": "Files", "batches": "Batches", "fine_tuning": "Fine-tuning", "training": "Multi-task training",
    "jobs": "Jobs of every kind", "plan": "The night", "estimate": "The night", "workers": "The night",
    "usage": "The night", "schedules": "Schedules", "models": "Models", "webhook_event_types": "Webhooks",
    "webhook_endpoints": "Webhooks", "keys": "Keys and tenants", "tenants": "Keys and tenants",
    "erasures": "Keys and tenants", "retention": "Keys and tenants",
}  # fmt: skip
"""What a path is about, by its first part after /v1."""
REST = "Health and metrics"
ABOUT_API = """Made by `make reference` of what a gateway answers at `/openapi.json`: load that one into your tools.
Unless it says otherwise, a call takes and answers JSON, and wants `Authorization: Bearer KEY`."""
ABOUT_ERRORS = """Every refusal is `{"error": {"message", "type", "param", "code"}}`; `param` names the field or line
that it is about, and the header `x-request-id` is the call's name in the server's logs."""
ABOUT_CLIENT = """Made by `make reference` of `client/src/lamplighter`. It has Lamplighter's own calls; for OpenAI's,
take OpenAI's SDK. `AsyncClient` has the same methods, to be awaited."""


def document() -> dict[str, Any]:
    """Return what a gateway answers at /openapi.json; none is started."""
    return create_app(Settings(**NOWHERE, store_url="/nonexistent")).openapi()  # type: ignore[arg-type]


def api_page(openapi: dict[str, Any]) -> str:
    """Return the API as a page: calls by subject, then errors, then the objects that they name."""
    by_subject: dict[str, list[str]] = {}
    for path, operations in openapi["paths"].items():
        part = path.removeprefix("/v1/").split("/")[0] if path.startswith("/v1/") else ""
        for method, operation in operations.items():
            by_subject.setdefault(SUBJECTS.get(part, REST), []).append(_call(method, path, operation))
    subjects = list(dict.fromkeys([*SUBJECTS.values(), REST]))
    links = [f"[{title}](#{_anchor(title)})" for title in (*subjects, "Errors", "Objects")]
    lines = ["# The HTTP API", ABOUT_API, " · ".join(links)]
    for subject in subjects:
        lines += [f"## {subject}", *by_subject[subject]]
    lines += ["## Errors", *_errors(), "## Objects"]
    lines += [_object(name, schema) for name, schema in sorted(openapi["components"]["schemas"].items())]
    return "\n\n".join(lines) + "\n"


def _call(method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [f"### `{method.upper()} {path}`", operation.get("description", "")]
    parameters = [each for each in operation.get("parameters", []) if each["name"] not in path]
    if parameters:
        rows = [[f"`{p['name']}`", p["in"], _type(p["schema"]), _about(p, p["schema"])] for p in parameters]
        parts.append(_table(["parameter", "in", "type", "meaning"], rows))
    if body := operation.get("requestBody"):
        kinds = (f"{_type(content['schema'])} (`{kind}`)" for kind, content in body["content"].items())
        parts.append(f"Body: {', '.join(kinds)}")
    for status, answer in operation["responses"].items():
        if "content" in answer and not status.startswith(("4", "5")):
            kinds = (f"{_type(content.get('schema', {}))} (`{kind}`)" for kind, content in answer["content"].items())
            parts.append(f"Answers {status}: {', '.join(kinds)}")
    refused = [status for status, answer in operation["responses"].items() if "$ref" in answer]
    if refused:
        parts.append(f"Refuses with {', '.join(sorted(refused))}.")
    return "\n\n".join(part for part in parts if part)


def _errors() -> Iterator[str]:
    yield ABOUT_ERRORS
    yield _table(["status", "meaning"], [[status, meaning] for status, (_, meaning) in REFUSALS.items()])


def _object(name: str, schema: dict[str, Any]) -> str:
    parts = [f"### {name}", schema.get("description", "")]
    if "enum" in schema:
        parts.append("One of " + ", ".join(f"`{value}`" for value in schema["enum"]) + ".")
    elif fields := schema.get("properties"):
        needed = schema.get("required", [])
        rows = [
            [f"`{field}`" + (" (required)" if field in needed else ""), _type(kind), _about(kind, kind)]
            for field, kind in fields.items()
        ]
        parts.append(_table(["field", "type", "meaning"], rows))
    else:
        parts.append(_type(schema))
    return "\n\n".join(part for part in parts if part)


def _type(schema: dict[str, Any]) -> str:
    """Return a type in a few words, with links to objects."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(REF)
        return f"[{name}](#{_anchor(name)})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_type(each) for each in schema[several]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return _format(schema)


def _format(schema: dict[str, Any]) -> str:
    kind = schema.get("type", "anything")
    text = kind if isinstance(kind, str) else " or ".join(kind)
    bounds = [f"{word} {schema[key]}" for key, word in BOUNDS.items() if key in schema]
    return f"{text}, {', '.join(bounds)}" if bounds else text


BOUNDS = {
    "minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "maxLength": "characters ≤",
    "maxItems": "entries ≤",
}  # fmt: skip


def _about(outer: dict[str, Any], inner: dict[str, Any]) -> str:
    said = outer.get("description") or inner.get("description") or ""
    default = inner.get("default", outer.get("default"))
    return f"{said} Default: `{json.dumps(default)}`.".strip() if default is not None else said


def _table(titles: list[str], rows: list[list[str]]) -> str:
    cells = [[re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [titles, ["---"] * len(titles), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _anchor(title: str) -> str:
    """Return the anchor that renderers give a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def client_page() -> str:
    """Return the Python client: what it can do, and how it fails."""
    lines = [
        "# The Python client",
        ABOUT_CLIENT,
        *_class(lamplighter.Client),
        "## `Client.training`",
        *_methods(Training),
        "## Errors",
        "All are `LamplighterError`.",
    ]
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]
    rows = [[f"`{kind.__name__}`", f"`{kind.__mro__[1].__name__}`", inspect.getdoc(kind) or ""] for kind in kinds]
    lines.append(_table(["error", "is a", "when"], rows))
    return "\n\n".join(lines) + "\n"


def _class(kind: type) -> Iterator[str]:
    yield f"## `{kind.__name__}{_signature(kind.__init__)}`"
    yield inspect.getdoc(kind) or ""
    yield from _methods(kind)


def _methods(kind: type) -> Iterator[str]:
    for name, method in vars(kind).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            yield f"### `{name}{_signature(method)}`"
            yield inspect.getdoc(method) or ""


def _signature(method: Callable[..., Any]) -> str:
    known = inspect.signature(method)
    own = [parameter for name, parameter in known.parameters.items() if name != "self"]
    text = str(known.replace(parameters=own)).removesuffix(" -> None")
    return text.replace("pathlib.", "").replace("collections.abc.", "").replace("typing.", "").replace("'", "")


def cli_page() -> str:
    """Return the command line's own help as a page."""
    command = typer.main.get_command(cli.app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="lamplighter"), name="lamplighter")
    codes = (cli.__doc__ or "").removeprefix("The command line. ")
    about = f"Made by `make reference` of what `--help` says. {codes}"
    text = text.replace(cli.__doc__ or "", "", 1)
    return (
        re.sub(r"\n{3,}", "\n\n", text.replace("# `lamplighter`", f"# The command line\n\n{about}", 1)).rstrip() + "\n"
    )


def settings_page(page: str) -> str:
    """Return docs/configuration.md with the table of settings as the code has them."""
    rows = [
        [f"`LAMPLIGHTER_{name.upper()}`", _default(field), field.description or ""]
        for name, field in sorted(
            Settings.model_fields.items(), key=lambda each: each[0] in RemoteSettings.model_fields
        )
    ]
    table = _table(["variable", "default", "meaning"], rows)
    return re.sub(r"^\| variable \|.*?\n\n", lambda _: f"{table}\n\n", page, count=1, flags=re.MULTILINE | re.DOTALL)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else "none" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail on pages that are not as they would be"
    )
    is_check = parser.parse_args().check
    docs = ROOT / "docs"
    pages = {
        docs / "reference" / "api.md": api_page(document()),
        docs / "reference" / "client.md": client_page(),
        docs / "reference" / "cli.md": cli_page(),
        docs / "configuration.md": settings_page((docs / "configuration.md").read_text()),
    }
    for path, text in pages.items():
        if not is_check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path.relative_to(ROOT)} is not what the code says: make reference")


if __name__ == "__main__":
    main()
