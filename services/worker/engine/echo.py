"""`echo`: an engine without weights, for load tests and demos. The same path as a model's but for the forward pass."""

import hashlib
import heapq
import struct
import time

from services.worker.protocol import Request, Response

EMBEDDING_FLOATS = 8


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
        heapq.heappush(self._due, (time.monotonic() + request.delay_ms / 1000, request.id, request))

    def abort(self, request_id: int) -> None:
        self._aborted.add(request_id)

    def step(self) -> list[Response]:
        self._steps += 1
        now = time.monotonic()
        responses = []
        while self._due and self._due[0][0] <= now:
            _, request_id, request = heapq.heappop(self._due)
            if request_id in self._aborted:
                self._aborted.discard(request_id)
                continue
            responses.append(self._answer(request))
        if not self._due:
            self._aborted.clear()
        return responses

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
