"""Encoder models for embeddings: inputs of many requests in one batch, bucketed by length so that little is padding."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from services.worker.engine.statistics import StepClock
from services.worker.protocol import EngineStatistics, Output, Request, RequestFault, Response

BATCH_TOKENS = 8192
"""Padded tokens of one forward pass; halved when memory runs out."""
BATCH_ROWS = 256


@dataclass(frozen=True)
class EncoderSettings:
    max_tokens: int
    pooling: Literal["mean", "cls"]
    normalize: bool


@dataclass
class _Pending:
    """A request some of whose inputs are not embedded yet."""

    request: Request
    vectors: list[bytes | None]
    tokens: int = 0

    @property
    def is_done(self) -> bool:
        return None not in self.vectors


@dataclass(order=True)
class _Row:
    """One input: `ids` are its tokens. Batches are taken from the end of the order: online first, then the longest."""

    is_online: bool
    length: int
    request_id: int
    index: int
    ids: list[int] = field(compare=False)


class EncoderEngine:
    """Embeds texts with one encoder. Each `step` runs one forward pass over the longest inputs that wait."""

    def __init__(self, model: Any, tokenizer: Any, settings: EncoderSettings) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._pending: dict[int, _Pending] = {}
        self._rows: list[_Row] = []
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

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

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
            waiting=len(self._rows),
        )

    def add(self, request: Request) -> None:
        if request.task != "embed":
            self._refuse(request.id, "This model makes embeddings only.", "model", "model_not_supported")
            return
        ids = [self._encode(prompt) for prompt in request.prompts]
        longest = max(map(len, ids))
        if longest > self._settings.max_tokens:
            message = f"An input has {longest} tokens; this model's context is {self._settings.max_tokens}."
            self._refuse(request.id, message, "input", "context_length_exceeded")
            return
        if any(token >= self._model.config.vocab_size for row in ids for token in row):
            self._refuse(request.id, "A token id is beyond the model's vocabulary.", "input", "invalid_value")
            return
        self._pending[request.id] = _Pending(request, [None] * len(ids), sum(map(len, ids)))
        self._rows += [_Row(request.is_online, len(row), request.id, index, row) for index, row in enumerate(ids)]
        self._unsorted = True

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
            return ids
        return prompt

    def _refuse(self, request_id: int, message: str, param: str, code: str) -> None:
        self._refused.append(Response(request_id, fault=RequestFault(message, 400, param, code)))

    def abort(self, request_id: int) -> Response | None:
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return None
        self._aborts += 1
        left = sum(row.length for row in self._rows if row.request_id == request_id)
        self._rows = [row for row in self._rows if row.request_id != request_id]
        return Response(request_id, prompt_tokens=pending.tokens - left, is_aborted=True)

    def wait_seconds(self) -> float | None:
        return 0.0 if self._rows or self._refused else None

    def step(self) -> Output:
        self._steps += 1
        self._clock.start()
        responses, self._refused = self._refused, []
        batch = self._take_batch()
        self._clock.charge("schedule")
        if batch:
            self._run(batch, responses)
        return Output(responses)

    def _run(self, batch: list[_Row], responses: list[Response]) -> None:
        """Embed a batch and add the requests that it completes; out of memory halves the batches from now on."""
        try:
            vectors = self._forward(batch)
        except torch.OutOfMemoryError:
            self._rows += batch
            self._unsorted = True
            if len(batch) == 1:
                raise
            self._batch_tokens = max(self._settings.max_tokens, self._batch_tokens // 2)
            torch.cuda.empty_cache()
            return
        finally:
            self._clock.charge("forward")
        self._count(batch)
        for row, vector in zip(batch, vectors, strict=True):
            pending = self._pending[row.request_id]
            pending.vectors[row.index] = vector.tobytes()
            if pending.is_done:
                responses.append(self._respond(pending))
        self._clock.charge("deliver")

    def _count(self, batch: list[_Row]) -> None:
        width = max(row.length for row in batch)
        self._batches += 1
        self._batched += len(batch)
        # So many inputs of this width would have been one batch.
        self._places += max(len(batch), min(BATCH_ROWS, self._batch_tokens // max(1, width)))
        self._tokens += sum(row.length for row in batch)

    def _take_batch(self) -> list[_Row]:
        """Take the last rows of the order, as many as fit when padded to the longest of them."""
        if self._unsorted:
            self._rows.sort()
            self._unsorted = False
        if not self._rows:
            return []
        width = count = 0
        for row in reversed(self._rows):
            width = max(width, row.length)
            if count and (count == BATCH_ROWS or (count + 1) * width > self._batch_tokens):
                break
            count += 1
        batch = self._rows[-count:]
        del self._rows[-count:]
        return batch

    @torch.inference_mode()
    def _forward(self, batch: list[_Row]) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """Return one float32 vector a row, shape (rows, hidden size)."""
        width = max(row.length for row in batch)
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([row.ids + [pad] * (width - row.length) for row in batch], device=self._model.device)
        lengths = torch.tensor([[row.length] for row in batch], device=self._model.device)
        mask = (torch.arange(width, device=self._model.device)[None, :] < lengths).long()
        self._clock.charge("prepare")
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        is_cls = self._settings.pooling == "cls"
        pooled = hidden[:, 0] if is_cls else (hidden * mask[:, :, None]).sum(1) / lengths
        if self._settings.normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=1)
        vectors: np.ndarray[Any, np.dtype[np.float32]] = pooled.cpu().numpy().astype("<f4")
        return vectors

    def _respond(self, pending: _Pending) -> Response:
        del self._pending[pending.request.id]
        vectors = [vector for vector in pending.vectors if vector is not None]
        return Response(pending.request.id, embeddings=vectors, prompt_tokens=pending.tokens)

    def close(self) -> None:
        self._rows.clear()
        self._pending.clear()
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
