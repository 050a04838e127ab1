"""`echo`: an engine without weights, for load tests and demos. The same path as a model's but for the forward pass."""

import hashlib
import heapq
import re
import struct
import time

from services.worker.protocol import Delta, Output, Request, Response

EMBEDDING_FLOATS = 8
STEP_REQUESTS = 32
"""Requests answered in one step: what has come meanwhile is looked at soon."""
_WORD = re.compile(r"\s*\S+\s*$|\s*\S+|\s+$")


class EchoEngine:
    """Answers the last user message (or the prompt), one word a token, after the request's `delay_ms`."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Request]] = []
        self._aborted: set[int] = set()
        self._steps = 0
        self._tokens = 0

    @property
    def weight_bytes(self) -> int:
        return 0

    @property
    def progress(self) -> int:
        return self._steps

    @property
    def tokens(self) -> int:
        return self._tokens

    def add(self, request: Request) -> None:
        # An online request goes before the batches that are due: they are held until now or later, it from the start.
        due_at = time.monotonic() + request.delay_ms / 1000 if request.delay_ms or not request.is_online else 0.0
        heapq.heappush(self._due, (due_at, request.id, request))

    def abort(self, request_id: int) -> None:
        self._aborted.add(request_id)

    def step(self) -> Output:
        self._steps += 1
        now = time.monotonic()
        output = Output()
        while self._due and self._due[0][0] <= now and len(output.responses) < STEP_REQUESTS:
            _, request_id, request = heapq.heappop(self._due)
            if request_id in self._aborted:
                self._aborted.discard(request_id)
                continue
            response = self._answer(request)
            output.responses.append(response)
            if request.is_streamed:
                output.deltas += word_deltas(response)
        if not self._due:
            self._aborted.clear()
        return output

    def wait_seconds(self) -> float | None:
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def close(self) -> None:
        self._due.clear()

    def _answer(self, request: Request) -> Response:
        if request.task == "embed":
            texts = [_text(prompt) for prompt in request.prompts]
            count = sum(len(text.split()) for text in texts)
            self._tokens += count
            return Response(request.id, embeddings=[embed(text) for text in texts], prompt_tokens=count)
        if request.messages is not None:
            texts = [_last_user_text(request)]
            prompt_tokens = sum(len(message["content"].split()) for message in request.messages)
        else:
            texts = [_text(prompt) for prompt in request.prompts]
            prompt_tokens = sum(len(text.split()) for text in texts)
        answers = [cut(text, request.params.max_tokens) for text in texts for _ in range(request.params.n)]
        count = sum(len(text.split()) for text, _ in answers)
        self._tokens += count
        return Response(request.id, choices=answers, prompt_tokens=prompt_tokens, completion_tokens=count)


def cut(text: str, max_tokens: int | None) -> tuple[str, str]:
    """Return (text, finish_reason) of an answer of at most `max_tokens` words."""
    words = text.split()
    if max_tokens is None or len(words) <= max_tokens:
        return text, "stop"
    return " ".join(words[:max_tokens]), "length"


def word_deltas(response: Response) -> list[Delta]:
    """Return a delta for each word of each choice, with the space that leads to it."""
    return [
        Delta(response.id, index, word)
        for index, (text, _) in enumerate(response.choices)
        for word in _WORD.findall(text)
    ]


def embed(text: str) -> bytes:
    """Return 8 little-endian float32 in [-1, 1) derived from the text's SHA-256."""
    integers = struct.unpack("<8I", hashlib.sha256(text.encode()).digest())
    return struct.pack(f"<{EMBEDDING_FLOATS}f", *(value / 2**31 - 1 for value in integers))


def _text(prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def _last_user_text(request: Request) -> str:
    messages = request.messages or []
    users = [message for message in messages if message["role"] == "user"]
    text: str = (users or messages)[-1]["content"]
    return text
