"""`echo`: an engine without weights, for load tests and demos. The same path as a model's but for the forward pass."""

import hashlib
import heapq
import re
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from services.worker.engine.statistics import StepClock
from services.worker.protocol import Delta, EngineStatistics, Output, Request, RequestFault, Response, TokenLogprob

EMBEDDING_FLOATS = 8
STEP_REQUESTS = 32
"""Requests answered in one step: what has come meanwhile is looked at soon."""
STEP_WORDS = 1024
"""Words of one streamed answer sent in one step."""
MOST_CHARACTERS = 8 * 2**20
"""What one request may have echoed, all its choices together."""
LEAST_CHARACTERS = 256
"""What a choice counts for at least: an empty one takes memory too."""
_WORD = re.compile(r"\s*\S+\s*$|\s*\S+|\s+$")


class EchoEngine:
    """Answers the last user message (or the prompt), one word a token, after the request's `delay_ms`."""

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        self._due: list[tuple[float, int]] = []
        """(when, request id), a heap; ids that are not in `_requests` any more were aborted."""
        self._sending: deque[_Sending] = deque()
        self._refused: list[Response] = []
        self._steps = 0
        self._tokens = 0
        self._prompt_tokens = 0
        self._aborts = 0
        self._answering_steps = 0
        self._answered = 0
        self._clock = StepClock()

    @property
    def weight_bytes(self) -> int:
        return 0

    @property
    def progress(self) -> int:
        return self._steps

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def statistics(self) -> EngineStatistics:
        """A step that only waits, or sends on, is none: places are for answers."""
        return EngineStatistics(
            tokens=self._tokens,
            prompt_tokens_computed=self._prompt_tokens,
            steps=self._answering_steps,
            sequences=self._answered,
            places=self._answering_steps * STEP_REQUESTS,
            part_seconds=self._clock.part_seconds,
            aborts=self._aborts,
            running=len(self._sending),
            waiting=len(self._requests),
        )

    def add(self, request: Request) -> None:
        fault = _too_much(request)
        if fault is not None:
            self._refused.append(Response(request.id, fault=fault))
            return
        # An online request goes before the batches that are due: they are held until now or later, it from the start.
        due_at = time.monotonic() + request.delay_ms / 1000 if request.delay_ms or not request.is_online else 0.0
        self._requests[request.id] = request
        heapq.heappush(self._due, (due_at, request.id))

    def abort(self, request_id: int) -> Response | None:
        sending = next((each for each in self._sending if each.response.id == request_id), None)
        if sending is not None:
            self._sending.remove(sending)
            used = (sending.response.prompt_tokens, sending.sent)
        elif (request := self._requests.pop(request_id, None)) is not None:
            used = (_prompt_words(request), 0)
        else:
            return None
        self._aborts += 1
        return Response(request_id, prompt_tokens=used[0], completion_tokens=used[1], is_aborted=True)

    def step(self) -> Output:
        self._steps += 1
        self._clock.start()
        now = time.monotonic()
        output, self._refused = Output(self._refused), []
        answered = 0
        while self._due and self._due[0][0] <= now and answered < STEP_REQUESTS:
            _, request_id = heapq.heappop(self._due)
            request = self._requests.pop(request_id, None)
            if request is None:  # aborted
                continue
            answered += 1
            response = self._answer(request)
            if request.is_streamed:
                self._sending.append(_Sending(response, word_deltas(response)))
            else:
                output.responses.append(response)
        for _ in range(len(self._sending)):
            self._send(self._sending.popleft(), output)
        self._clock.charge("deliver")
        self._answered += answered
        self._answering_steps += bool(answered)
        return output

    def _send(self, sending: "_Sending", output: Output) -> None:
        """Send the next words of a streamed answer; the answer itself after the last of them."""
        pieces = list(islice(sending.deltas, STEP_WORDS))
        output.deltas += pieces
        sending.sent += len(pieces)
        if len(pieces) == STEP_WORDS:
            self._sending.append(sending)
        else:
            output.responses.append(sending.response)

    def wait_seconds(self) -> float | None:
        if self._sending or self._refused:
            return 0.0
        while self._due and self._due[0][1] not in self._requests:
            heapq.heappop(self._due)
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def close(self) -> None:
        self._due.clear()
        self._requests.clear()

    def _answer(self, request: Request) -> Response:
        if request.task == "embed":
            texts = [_text(prompt) for prompt in request.prompts]
            count = sum(len(text.split()) for text in texts)
            self._tokens += count
            self._prompt_tokens += count
            return Response(request.id, embeddings=[embed(text) for text in texts], prompt_tokens=count)
        texts, prompt_tokens = _texts(request), _prompt_words(request)
        answers = [cut(text, request.params.max_tokens) for text in texts for _ in range(request.params.n)]
        count = sum(len(text.split()) for text, _ in answers)
        self._tokens += count
        self._prompt_tokens += prompt_tokens
        response = Response(request.id, choices=answers, prompt_tokens=prompt_tokens, completion_tokens=count)
        if (top := request.params.logprobs) is not None:
            response.logprobs = [[_certain(word, top) for word in _words(text)] for text, _ in answers]
        return response


@dataclass
class _Sending:
    """A streamed answer on its way, `sent` words of it so far."""

    response: Response
    deltas: Iterator[Delta]
    sent: int = 0


def _texts(request: Request) -> list[str]:
    """Return what is answered: the last user message, or every prompt."""
    if request.messages is not None:
        return [_last_user_text(request)]
    return [_text(prompt) for prompt in request.prompts]


def _prompt_words(request: Request) -> int:
    if request.messages is not None:
        return sum(len(message["content"].split()) for message in request.messages)
    return sum(len(_text(prompt).split()) for prompt in request.prompts)


def _too_much(request: Request) -> RequestFault | None:
    """Refuse what would fill memories between here and the client: as a model's context would."""
    size = sum(max(LEAST_CHARACTERS, len(text)) for text in _texts(request)) * request.params.n
    if size <= MOST_CHARACTERS:
        return None
    message = f"The answers would have {size} characters; at most {MOST_CHARACTERS} are echoed."
    return RequestFault(message, 400, "messages" if request.messages else "prompt", "context_length_exceeded")


def cut(text: str, max_tokens: int | None) -> tuple[str, str]:
    """Return (text, finish_reason) of an answer of at most `max_tokens` words."""
    words = text.split()
    if max_tokens is None or len(words) <= max_tokens:
        return text, "stop"
    return " ".join(words[:max_tokens]), "length"


def word_deltas(response: Response) -> Iterator[Delta]:
    """Yield a delta for each word of each choice, with the space that leads to it."""
    for index, (text, _) in enumerate(response.choices):
        logprobs = iter(response.logprobs[index] if response.logprobs else [])
        for word in _words(text):
            yield Delta(response.id, index, word, list(islice(logprobs, 1)))


def _words(text: str) -> Iterator[str]:
    return (word.group() for word in _WORD.finditer(text))


def _certain(word: str, top: int) -> TokenLogprob:
    """An echo has no doubts: a word's probability is one."""
    named = TokenLogprob(word, 0.0, raw=word.encode())
    return TokenLogprob(word, 0.0, [named] if top else [], named.raw)


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
