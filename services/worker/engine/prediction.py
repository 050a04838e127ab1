"""Multi-task models: one pass of the trunk for a row, then every head that somebody asks of it."""

import re
from bisect import bisect_right
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput

from services.worker.engine.rows import Pending, Refused, Row, RowEngine
from services.worker.multi_task.description import HeadDescription
from services.worker.multi_task.model import MultiTaskModel
from services.worker.multi_task.trunk import TextTrunk
from services.worker.protocol import Request, Response

MOST_ANSWER_TOKENS = 128
"""Of a seq2seq head's text."""
GENERATED_AT_A_TIME = 16
MOST_ANSWERS = 8192
"""Inputs of a call times the tasks that are asked of each: a short call must not have an answer that fills memories."""
MOST_WORD_TOKENS = 65_536
"""Of a call whose answer has a label for each word."""
MOST_PROBABILITIES = 100
"""Named for an input, the likeliest first where there are more labels."""
_WORD = re.compile(r"\S+")

Predicted = dict[str, dict[str, Any]]


class PredictionEngine(RowEngine[Predicted]):
    """Answers with the heads of one multi-task model."""

    def __init__(
        self, model: MultiTaskModel, tokenizer: Any, most_tokens: int, width: int, *, truncate: bool = False
    ) -> None:
        """`tokenizer` None: the model reads vectors of `width` numbers. `truncate`: cut longer texts."""
        super().__init__(model, most_tokens)
        # As the rows of training were cut: what the tokenizer puts around a text stays.
        self._cut: dict[str, Any] = {"truncation": True, "max_length": most_tokens} if truncate else {}
        self._tokenizer, self._width = tokenizer, width
        self._numbers = {head.name: number for number, head in enumerate(model.heads)}
        self._usual = [head.name for head in model.heads if head.kind != "causal_lm"]

    @property
    def _heads(self) -> list[HeadDescription]:
        heads: list[HeadDescription] = self._model.heads
        return heads

    @property
    def weight_bytes(self) -> int:
        trunk = self._model.trunk
        module = trunk.plain if isinstance(trunk, TextTrunk) else trunk
        weights = [*module.parameters(), *(w for layer in self._model.layers.values() for w in layer.parameters())]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def _rows_of(self, request: Request) -> list[list[Any]]:
        if request.task != "predict":
            raise Refused("This model makes predictions only.", "model", "model_not_supported")
        self._require_tasks(request.tasks)
        asked = request.tasks or self._usual
        answers = len(asked) * max(len(request.prompts), len(request.vectors))
        if answers > MOST_ANSWERS:
            message = f"With {len(asked)} tasks, {answers} answers are asked for; one call may have {MOST_ANSWERS}."
            raise Refused(message, "input", "invalid_value")
        if self._tokenizer is None:
            return self._vectors(request)
        if request.vectors:
            raise Refused("This model reads texts, not numbers.", "input", "invalid_value")
        rows = [list(self._tokenizer(str(prompt), **self._cut)["input_ids"]) for prompt in request.prompts]
        vocabulary = self._model.trunk.vocabulary
        for row in rows:
            if not row or max(row) >= vocabulary:
                what = "has no token" if not row else f"has a token beyond the model's vocabulary of {vocabulary}"
                raise Refused(f"An input {what}.", "input", "invalid_value")
        has_words = any(self._heads[self._numbers[name]].kind == "token_classification" for name in asked)
        if has_words and sum(map(len, rows)) > MOST_WORD_TOKENS:
            message = f"The inputs have {sum(map(len, rows))} tokens; where words are labelled, one call may have "
            raise Refused(f"{message}{MOST_WORD_TOKENS}.", "input", "invalid_value")
        return rows

    def _vectors(self, request: Request) -> list[list[Any]]:
        rows = request.vectors
        if not rows or any(len(row) != self._width for row in rows):
            raise Refused(f"This model reads vectors of {self._width} numbers.", "input", "invalid_value")
        return rows

    def _require_tasks(self, names: list[str] | None) -> None:
        """Raise Refused for a task that the model has not, or that other endpoints answer."""
        if names is None and not self._usual:
            raise Refused("Its only task is a language model's: ask for completions.", "tasks", "invalid_value")
        for number, name in enumerate(names or []):
            if name not in self._numbers:
                known = ", ".join(self._numbers)
                raise Refused(f"There is no task {name[:80]!r}; there is {known}.", f"tasks[{number}]", "invalid_value")
            if self._heads[self._numbers[name]].kind == "causal_lm":
                message = f"The task {name!r} is a language model: ask for chat or completions."
                raise Refused(message, f"tasks[{number}]", "invalid_value")

    def _length(self, row: list[Any]) -> int:
        return 1 if self._tokenizer is None else len(row)

    def _tasks(self, row: Row) -> list[str]:
        return self._pending[row.request_id].request.tasks or self._usual

    @torch.inference_mode()
    def _forward(self, batch: list[Row]) -> list[Predicted]:
        inputs, mask = self._inputs(batch)
        asked = {self._numbers[name] for row in batch for name in self._tasks(row)}
        plain = [task for task in sorted(asked) if self._heads[task].kind != "seq2seq"]
        hidden = self._model.trunk(inputs, mask)
        logits = self._model.logits_of(hidden, mask, plain)
        texts = {
            task: self._generate(hidden, mask, [self._heads[task].name in self._tasks(row) for row in batch])
            for task in asked
            if self._heads[task].kind == "seq2seq"
        }
        scores = {task: self._scores(self._heads[task], values.float()).cpu() for task, values in logits.items()}
        return [
            {name: self._predicted(row, place, self._numbers[name], scores, texts) for name in self._tasks(row)}
            for place, row in enumerate(batch)
        ]

    def _inputs(self, batch: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens [R, T] or vectors [R, width], and which are no pads [R, T]."""
        device = next(iter(self._model.layers.values())).weight.device if self._model.layers else torch.device("cpu")
        if self._tokenizer is None:
            vectors = torch.tensor([row.ids for row in batch], dtype=torch.float32, device=device)
            return vectors, torch.ones((len(batch), 1), dtype=torch.bool, device=device)
        ids, lengths = self._padded(batch, self._tokenizer.pad_token_id or 0, self._model.trunk.plain.device)
        return ids, torch.arange(ids.shape[1], device=ids.device)[None, :] < lengths

    @staticmethod
    def _scores(head: HeadDescription, logits: torch.Tensor) -> torch.Tensor:
        """Return probabilities, or values in the unit of the training file."""
        if head.kind == "regression":
            return logits[:, 0].double() * head.deviation + head.mean
        return torch.sigmoid(logits) if head.kind == "multilabel" else torch.softmax(logits, dim=-1)

    def _generate(self, hidden: torch.Tensor, mask: torch.Tensor, wanted: list[bool]) -> list[str]:
        """Return what the decoder says of encoded rows that want it, its likeliest token each time; "" for others."""
        texts = [""] * len(wanted)
        rows = [row for row, is_wanted in enumerate(wanted) if is_wanted]
        for start in range(0, len(rows), GENERATED_AT_A_TIME):
            chosen = rows[start : start + GENERATED_AT_A_TIME]
            made = self._model.trunk.plain.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden[chosen]),
                attention_mask=mask[chosen].long(),
                do_sample=False,
                num_beams=1,
                max_new_tokens=MOST_ANSWER_TOKENS,
                stopping_criteria=StoppingCriteriaList([self._moves]),
            )
            for row, text in zip(chosen, self._tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                texts[row] = text
        return texts

    def _moves(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Never stop; only show, after each token, that the engine is at work."""
        self._steps += 1
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def _predicted(
        self, row: Row, place: int, task: int, scores: dict[int, torch.Tensor], texts: dict[int, list[str]]
    ) -> dict[str, Any]:
        """Return what one head says of one row."""
        head = self._heads[task]
        if head.kind == "seq2seq":
            return {"text": texts[task][place]}
        found = scores[task][place]
        if head.kind == "regression":
            return {"value": float(found)}
        if head.kind == "token_classification":
            return {"tokens": self._words(row, head, found)}
        if head.kind == "multilabel":
            present = [head.labels[number] for number in (found > 0.5).nonzero()[:, 0].tolist()]
            return {"labels": present, "probabilities": _named(head, found)}
        named = _named(head, found)
        return {"label": head.labels[int(found.argmax())], "probabilities": named}

    def _words(self, row: Row, head: HeadDescription, scores: torch.Tensor) -> list[dict[str, Any]]:
        """Return a label for each word of a text: that of the first token which ends in it, as in training."""
        text = str(self._pending[row.request_id].request.prompts[row.index])
        ends = self._tokenizer(text, return_offsets_mapping=True, **self._cut)["offset_mapping"]
        words = list(_WORD.finditer(text))
        starts = [word.start() for word in words]
        first: dict[int, int] = {}
        for token, (start, end) in enumerate(ends):
            # By its last character, as in training: a token may start with the space before its word.
            number = bisect_right(starts, end - 1) - 1
            if end > start and number >= 0 and end <= words[number].end():
                first.setdefault(number, token)
        said = []
        for number, token in sorted(first.items()):
            word, best = words[number], int(scores[token].argmax())
            span = {"text": word.group(), "start": word.start(), "end": word.end()}
            said.append(span | {"label": head.labels[best], "probability": float(scores[token, best])})
        return said

    def _respond(self, pending: Pending[Predicted]) -> Response:
        predictions = [each for each in pending.results if each is not None]
        return Response(pending.request.id, predictions=predictions, prompt_tokens=pending.tokens)


def _named(head: HeadDescription, scores: torch.Tensor) -> dict[str, float]:
    """Return the probabilities by label: of all in their order, or of the likeliest ones."""
    if len(head.labels) <= MOST_PROBABILITIES:
        return dict(zip(head.labels, map(float, scores.tolist()), strict=True))
    likeliest = torch.topk(scores, MOST_PROBABILITIES)
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return {head.labels[number]: float(score) for number, score in pairs}
