"""Between a request's text and a model's tokens: templates, limits, and the tokens' own text."""

import re
from functools import cached_property, lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from services.worker.engine.grammar import Grammars
from services.worker.protocol import Request, RequestFault

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Prompts:
    """One model's tokenizer, with the vocabulary and the context that its model has."""

    def __init__(self, tokenizer: Any, vocabulary: int, context: int, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self.context, self.eos = context, eos
        self.token_text = lru_cache(maxsize=65_536)(self._token_text)
        self.token_bytes = lru_cache(maxsize=65_536)(self._token_bytes)

    def encode(self, request: Request) -> list[list[int]]:
        """Return the tokens of each of a request's prompts."""
        if request.messages is None:
            return [p if isinstance(p, list) else self._tokenizer(p)["input_ids"] for p in request.prompts]
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(request.messages, add_generation_prompt=True, tokenize=False)
            return [self._tokenizer(text, add_special_tokens=False)["input_ids"]]
        # A base model has no chat template: give it the plainest form that people give such models.
        lines = [f"{message['role']}: {message['content']}\n" for message in request.messages]
        return [self._tokenizer("".join(lines) + "assistant:")["input_ids"]]

    def fault(self, request: Request, prompts: list[list[int]], limit: int) -> RequestFault | None:
        """Return why this model cannot answer a request that may generate `limit` tokens; None when it can."""
        param = "prompt" if request.messages is None else "messages"
        if request.task == "embed":
            return RequestFault("This model makes no embeddings.", 400, "model", "model_not_supported")
        if not all(prompts):
            return RequestFault("The prompt has no tokens.", 400, param, "invalid_value")
        longest = max(map(len, prompts))
        if longest + limit > self.context:
            message = f"The prompt has {longest} tokens and {limit} may follow; the context is {self.context}."
            return RequestFault(message, 400, param, "context_length_exceeded")
        if any(token >= self._vocabulary for prompt in prompts for token in prompt):
            return RequestFault("A token id is beyond the model's vocabulary.", 400, param, "invalid_value")
        if any(token >= self._vocabulary for token in request.params.logit_bias):
            return RequestFault("A token id is beyond the model's vocabulary.", 400, "logit_bias", "invalid_value")
        return None

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self._tokenizer, self._vocabulary, self.eos)

    def _token_bytes(self, token: int) -> bytes | None:
        """Return what a token stands for, even a part of a character; None when that cannot be known."""
        text = self._token_text(token)
        if "\ufffd" not in text:
            return text.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if byte := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return bytes(_BYTE_OF[c] for c in piece) if all(c in _BYTE_OF for c in piece) else None

    def _token_text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text


def eos_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer, as the model's generation config or its tokenizer names them."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    if configured is None:
        return frozenset()
    return frozenset(configured if isinstance(configured, list | tuple) else [configured])
