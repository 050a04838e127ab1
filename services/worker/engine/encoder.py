"""Encoder models for embeddings."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from services.worker.engine.rows import Pending, Refused, Row, RowEngine
from services.worker.protocol import Request, Response


@dataclass(frozen=True)
class EncoderSettings:
    max_tokens: int
    pooling: Literal["mean", "cls"]
    normalize: bool


class EncoderEngine(RowEngine[bytes]):
    """Embeds texts with one encoder."""

    def __init__(self, model: Any, tokenizer: Any, settings: EncoderSettings) -> None:
        super().__init__(model, settings.max_tokens)
        self._tokenizer, self._settings = tokenizer, settings

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    def _rows_of(self, request: Request) -> list[list[int]]:
        if request.task != "embed":
            raise Refused("This model makes embeddings only.", "model", "model_not_supported")
        rows = [self._encode(prompt) for prompt in request.prompts]
        if not all(rows):
            raise Refused("An input has no token.", "input", "invalid_value")
        if any(token >= self._model.config.vocab_size for row in rows for token in row):
            raise Refused("A token id is beyond the model's vocabulary.", "input", "invalid_value")
        return rows

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
            return ids
        return prompt

    def _length(self, row: list[int]) -> int:
        return len(row)

    @torch.inference_mode()
    def _forward(self, batch: list[Row]) -> list[bytes]:
        """Return one vector a row, as little-endian float32."""
        ids, lengths = self._padded(batch, self._tokenizer.pad_token_id or 0, self._model.device)
        mask = (torch.arange(ids.shape[1], device=ids.device)[None, :] < lengths).long()
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        is_cls = self._settings.pooling == "cls"
        pooled = hidden[:, 0] if is_cls else (hidden * mask[:, :, None]).sum(1) / lengths
        if self._settings.normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=1)
        vectors: np.ndarray[Any, np.dtype[np.float32]] = pooled.cpu().numpy().astype("<f4")
        return [vector.tobytes() for vector in vectors]

    def _respond(self, pending: Pending[bytes]) -> Response:
        vectors = [vector for vector in pending.results if vector is not None]
        return Response(pending.request.id, embeddings=vectors, prompt_tokens=pending.tokens)
