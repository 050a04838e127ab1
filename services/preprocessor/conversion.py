"""Makes lines of other lines: of a batch's questions and answers what a new job reads, and of questions the same ones
to another model.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from shared.domain.batch_file import MAX_LINE_BYTES
from shared.domain.job import JobKind


def converted(
    kind: JobKind, endpoint: str, custom_id: str, request: dict[str, Any], answer: str, follow_up: str | None
) -> bytes | None:
    """Return the line that a job of a kind reads of an answer: a further question, an example, or a row.

    None of an answer to something else than one text, such as a list of prompts.
    """
    if "messages" not in request and not isinstance(request.get("prompt"), str):
        return None
    if kind is JobKind.BATCH:
        line = further_question(custom_id, endpoint, request, answer, follow_up or "")
    elif kind is JobKind.FINE_TUNING:
        line = example(request, answer)
    else:
        line = {"custom_id": custom_id, "text": asked_text(request), "answer": answer}
    return _line(line)


def _line(value: dict[str, Any]) -> bytes:
    # Not orjson, which makes numbers beyond 64 bits into others.
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which is no text and stays as it was written
        return json.dumps(value).encode() + b"\n"


def whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines with their newlines, the last one too; one beyond what a line may have comes in pieces."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if len(rest) > MAX_LINE_BYTES:
            yield rest
            rest = b""
    if rest:
        yield rest + b"\n"


def asking(line: bytes, model: str) -> bytes:
    """Return a batch's line that asks a model; what is no such line stays, and is told by its number."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if not isinstance(request, dict) or not isinstance(request.get("body"), dict):
        return line
    return _line(request | {"body": request["body"] | {"model": model}})


def answered_text(body: dict[str, Any]) -> str | None:
    """Return the text of an answer's first choice; None where there is none."""
    choice = (body.get("choices") or [{}])[0]
    text = choice.get("text") if "text" in choice else (choice.get("message") or {}).get("content")
    return text if isinstance(text, str) else None


def _messages(request: dict[str, Any]) -> list[Any]:
    if "messages" in request:
        return [*request["messages"]]
    return [{"role": "user", "content": request["prompt"]}]


def asked_text(request: dict[str, Any]) -> str:
    """Return what was asked: the last message's text."""
    content = _messages(request)[-1].get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return str(content or "")


def example(request: dict[str, Any], answer: str) -> dict[str, Any]:
    """Return an example of training data that teaches an answer."""
    if "messages" not in request:
        return {"prompt": request["prompt"], "completion": answer}
    return {"messages": [*_messages(request), {"role": "assistant", "content": answer}]}


def further_question(
    custom_id: str, endpoint: str, request: dict[str, Any], answer: str, follow_up: str
) -> dict[str, Any]:
    """Return a batch's line that goes on from an answer, with what else was asked for."""
    messages = [
        *_messages(request),
        {"role": "assistant", "content": answer},
        {"role": "user", "content": follow_up},
    ]
    body = {name: value for name, value in request.items() if name != "n"} | {"messages": messages}
    return {"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body}
