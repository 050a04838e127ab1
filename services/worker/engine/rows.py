"""Engines whose requests are rows that one pass computes: rows of many requests in one batch, of like lengths."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from services.worker.engine.statistics import StepClock
from services.worker.protocol import EngineStatistics, Output, Request, RequestFault, Response

BATCH_TOKENS = 8192
"""Padded tokens of one forward pass; halved when memory runs out."""
BATCH_ROWS = 256

Result = TypeVar("Result")


@dataclass
class Pending(Generic[Result]):
    """A request some of whose rows are not computed yet."""

    request: Request
    results: list[Result | None]
    tokens: int = 0

    @property
    def is_done(self) -> bool:
        return None not in self.results


@dataclass(order=True)
class Row:
    """One input: `ids` are its tokens, or its numbers; `length` counts tokens. Batches are taken from the end of the
    order: online first, then the longest.
    """

    is_online: bool
    length: int
    request_id: int
    index: int
    ids: list[Any] = field(compare=False)


class Refused(Exception):
    """A request that cannot be taken; carries why, as the API says it."""

    def __init__(self, message: str, param: str, code: str) -> None:
        super().__init__(message)
        self.fault = RequestFault(message, 400, param, code)


class RowEngine(ABC, Generic[Result]):
    """Each `step` runs one forward pass over the longest rows that wait."""

    def __init__(self, model: Any, most_tokens: int) -> None:
        """`most_tokens`: of a row."""
        self._model, self._most_tokens = model, most_tokens
        self._pending: dict[int, Pending[Result]] = {}
        self._waiting: list[Row] = []
        self._unsorted = False
        self._refused: list[Response] = []
        self._batch_tokens = BATCH_TOKENS
        self._steps = 0
        self._tokens = 0
        self._aborts = 0
        self._batches = 0
        self._batched = 0
        self._places = 0
        self._clock = StepClock()

    @abstractmethod
    def _rows_of(self, request: Request) -> list[list[Any]]:
        """Return a request's rows, as tokens or numbers. Raises Refused."""

    @abstractmethod
    def _length(self, row: list[Any]) -> int:
        """Return how many tokens a row has."""

    @abstractmethod
    def _forward(self, batch: list[Row]) -> list[Result]:
        """Return each row's result."""

    @abstractmethod
    def _respond(self, pending: Pending[Result]) -> Response:
        """Return the answer of a request all of whose rows are computed."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Memory that the loaded model holds."""

    @property
    def progress(self) -> int:
        return self._steps

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            tokens=self._tokens,
            prompt_tokens_computed=self._tokens,
            steps=self._batches,
            sequences=self._batched,
            places=self._places,
            part_seconds=self._clock.part_seconds,
            aborts=self._aborts,
            waiting=len(self._waiting),
        )

    def add(self, request: Request) -> None:
        try:
            rows = self._rows_of(request)
        except Refused as refused:
            self._refused.append(Response(request.id, fault=refused.fault))
            return
        lengths = [self._length(row) for row in rows]
        longest = max(lengths)
        if longest > self._most_tokens:
            message = f"An input has {longest} tokens; this model's context is {self._most_tokens}."
            fault = RequestFault(message, 400, "input", "context_length_exceeded")
            self._refused.append(Response(request.id, fault=fault))
            return
        self._pending[request.id] = Pending(request, [None] * len(rows), sum(lengths))
        self._waiting += [
            Row(request.is_online, length, request.id, index, row)
            for index, (row, length) in enumerate(zip(rows, lengths, strict=True))
        ]
        self._unsorted = True

    def abort(self, request_id: int) -> Response | None:
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return None
        self._aborts += 1
        left = sum(row.length for row in self._waiting if row.request_id == request_id)
        self._waiting = [row for row in self._waiting if row.request_id != request_id]
        return Response(request_id, prompt_tokens=pending.tokens - left, is_aborted=True)

    def wait_seconds(self) -> float | None:
        return 0.0 if self._waiting or self._refused else None

    def step(self) -> Output:
        self._steps += 1
        self._clock.start()
        responses, self._refused = self._refused, []
        batch = self._take_batch()
        self._clock.charge("schedule")
        if batch:
            self._run(batch, responses)
        return Output(responses)

    def _run(self, batch: list[Row], responses: list[Response]) -> None:
        """Compute a batch and add the requests that it completes; out of memory halves the batches from now on."""
        try:
            results = self._forward(batch)
        except torch.OutOfMemoryError:
            self._waiting += batch
            self._unsorted = True
            if len(batch) == 1:
                raise
            self._batch_tokens = max(self._most_tokens, self._batch_tokens // 2)
            torch.cuda.empty_cache()
            return
        finally:
            self._clock.charge("forward")
        self._count(batch)
        for row, result in zip(batch, results, strict=True):
            pending = self._pending[row.request_id]
            pending.results[row.index] = result
            if pending.is_done:
                del self._pending[row.request_id]
                responses.append(self._respond(pending))
        self._clock.charge("deliver")

    def _count(self, batch: list[Row]) -> None:
        width = max(row.length for row in batch)
        self._batches += 1
        self._batched += len(batch)
        # So many inputs of this width would have been one batch.
        self._places += max(len(batch), min(BATCH_ROWS, self._batch_tokens // max(1, width)))
        self._tokens += sum(row.length for row in batch)

    def _take_batch(self) -> list[Row]:
        """Take the last rows of the order, as many as fit when padded to the longest of them."""
        if self._unsorted:
            self._waiting.sort()
            self._unsorted = False
        if not self._waiting:
            return []
        width = count = 0
        for row in reversed(self._waiting):
            width = max(width, row.length)
            if count and (count == BATCH_ROWS or (count + 1) * width > self._batch_tokens):
                break
            count += 1
        batch = self._waiting[-count:]
        del self._waiting[-count:]
        return batch

    def _padded(self, batch: list[Row], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch's tokens [rows, T], pads at the end, and how many each row has [rows, 1]."""
        width = max(row.length for row in batch)
        ids = torch.tensor([row.ids + [pad] * (width - row.length) for row in batch], device=device)
        lengths = torch.tensor([[row.length] for row in batch], device=device)
        self._clock.charge("prepare")
        return ids, lengths

    def close(self) -> None:
        self._waiting.clear()
        self._pending.clear()
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
