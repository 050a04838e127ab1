"""Between the API's bodies and the engine's requests: the same for a line of a batch and for an online call."""

import base64
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from sqlalchemy import Engine

from services.worker.protocol import ModelSpec, Request, RequestFault, Response, SamplingParams, TokenLogprob
from shared.db import model_registry
from shared.db.session import tenant_transaction
from shared.domain.errors import NotFound
from shared.domain.payloads import (
    PREDICTIONS,
    AnyPayload,
    ChatPayload,
    CompletionPayload,
    EmbeddingPayload,
    PredictionPayload,
    chat_body,
    completion_body,
    embedding_body,
    prediction_body,
    refuse_wrong_model,
)

MODEL_SECONDS = 1.0


class ModelDirectory:
    """Registered models, as each tenant sees them; what was looked up within the last second is not asked for again."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[tuple[str, str], tuple[float, model_registry.ModelView]] = {}

    def find(self, tenant_id: str, name: str, endpoint: str) -> ModelSpec:
        """Return the model that serves `endpoint` under this name, of an adapter with its base; raises NotFound."""
        model = self._look_up(tenant_id, name)
        refuse_wrong_model(model.kind, name, endpoint, model.task_kinds)
        if endpoint == PREDICTIONS:
            return self._heads(model)
        if model.base is not None:
            return self._adapter(model)
        # The causal head of a multi-task model with weights of its own is an ordinary language model.
        kind: Any = "causal_lm" if model.kind == "multi_task" else model.kind
        return ModelSpec(model.name, kind, model.source, model.revision, model.dtype, model.context_length)

    def _heads(self, model: model_registry.ModelView) -> ModelSpec:
        base = self._look_up(model.tenant_id, model.base) if model.base is not None else model
        return ModelSpec(
            model.name,
            "multi_task",
            base.source,
            base.revision,
            model.dtype,
            model.context_length,
            base=base.name if model.base is not None else "",
            heads=model.source,
        )

    def _adapter(self, model: model_registry.ModelView) -> ModelSpec:
        base = self._look_up(model.tenant_id, model.base or "")
        if base.kind != "causal_lm":
            message = f"The base of {model.name!r}, {base.name!r}, is no language model of our engine."
            raise NotFound(message, param="model", code="model_not_supported")
        return ModelSpec(
            model.name,
            "causal_lm",
            base.source,
            base.revision,
            base.dtype,
            base.context_length,
            base=base.name,
            adapter=model.source,
        )

    def _look_up(self, tenant_id: str, name: str) -> model_registry.ModelView:
        now = time.monotonic()
        known = self._known.get((tenant_id, name))
        if known is not None and now < known[0]:
            return known[1]
        with tenant_transaction(self._engine, tenant_id) as connection:
            model = model_registry.find(connection, tenant_id, name)
        self._known = {key: entry for key, entry in self._known.items() if now < entry[0]}
        self._known[tenant_id, name] = (now + MODEL_SECONDS, model)
        return model


def engine_request(payload: AnyPayload, seed: int, tenant_id: str) -> Request:
    """Return the engine's form of a call; `seed` serves those that name none themselves."""
    if isinstance(payload, EmbeddingPayload):
        return Request(0, "embed", prompts=payload.inputs, delay_ms=payload.delay_ms)
    if isinstance(payload, PredictionPayload):
        texts: list[str | list[int]] = list(payload.texts)
        return Request(0, "predict", prompts=texts, vectors=payload.vectors, tasks=payload.tasks)
    params = SamplingParams(
        max_tokens=payload.token_limit,
        temperature=payload.temperature,
        top_p=payload.top_p,
        top_k=payload.top_k,
        min_p=payload.min_p,
        stop=payload.stops,
        seed=payload.seed if payload.seed is not None else seed,
        n=payload.n,
        min_tokens=payload.min_tokens,
        ignore_eos=payload.ignore_eos,
        presence_penalty=payload.presence_penalty,
        frequency_penalty=payload.frequency_penalty,
        repetition_penalty=payload.repetition_penalty,
        logit_bias={int(token): bias for token, bias in (payload.logit_bias or {}).items()},
        logprobs=payload.named_logprobs,
        schema=_schema(payload),
    )
    rest: dict[str, Any] = {"params": params, "delay_ms": payload.delay_ms, "namespace": tenant_id}
    if isinstance(payload, ChatPayload):
        messages = [{"role": message.role, "content": message.text} for message in payload.messages]
        return Request(0, "chat", messages=messages, **rest)
    return Request(0, "complete", prompts=payload.prompts, **rest)


def _schema(payload: ChatPayload | CompletionPayload) -> str | None:
    """Return the JSON schema that an answer is to follow; None for free text."""
    wanted = payload.response_format if isinstance(payload, ChatPayload) else None
    if wanted is None or wanted.type == "text":
        return None
    schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
    return orjson.dumps(schema).decode()


def logprobs_object(payload: AnyPayload, tokens: list[TokenLogprob], text_offset: int = 0) -> dict[str, Any] | None:
    """Return OpenAI's `logprobs` of some tokens of a choice, None when they were not asked for.

    `text_offset`: where in the choice's text the first of them begins, for completions.
    """
    if isinstance(payload, EmbeddingPayload | PredictionPayload) or payload.named_logprobs is None:
        return None
    if isinstance(payload, ChatPayload):
        content = [_chat_logprob(token) | {"top_logprobs": [_chat_logprob(t) for t in token.top]} for token in tokens]
        return {"content": content, "refusal": None}
    lengths = [len(token.token) for token in tokens]
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{t.token: t.logprob for t in (*token.top, token)} for token in tokens]
        if payload.logprobs
        else None,
        "text_offset": [text_offset + sum(lengths[:index]) for index in range(len(tokens))],
    }


def _chat_logprob(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token,
        "logprob": token.logprob,
        "bytes": list(token.raw) if token.raw is not None else None,
    }


@dataclass(frozen=True)
class Answer:
    """A finished call: what HTTP says of it."""

    status_code: int
    body: str
    input_tokens: int = 0
    output_tokens: int = 0


def answer(payload: AnyPayload, response: Response, request_id: str, created: int) -> Answer:
    """Return the answer to a call, or the refusal that only the engine could know of.

    Raises RuntimeError for a fault that may pass.
    """
    if response.fault is not None:
        return _refusal(response.fault)
    tokens = (response.prompt_tokens, response.completion_tokens)
    if isinstance(payload, EmbeddingPayload):
        body = embedding_body(payload.model, _vectors(payload, response.embeddings), response.prompt_tokens)
    elif isinstance(payload, PredictionPayload):
        body = prediction_body(payload.model, response.predictions, response.prompt_tokens)
    else:
        render = completion_body if isinstance(payload, CompletionPayload) else chat_body
        body = render(request_id, created, payload.model, response.choices, *tokens)
        body["usage"]["prompt_tokens_details"]["cached_tokens"] = response.cached_tokens
        for choice, each in zip(body["choices"], response.logprobs, strict=False):
            choice["logprobs"] = logprobs_object(payload, each)
    return Answer(200, orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY).decode(), *tokens)


def _refusal(fault: RequestFault) -> Answer:
    if fault.status is None:
        raise RuntimeError(fault.message)
    type_ = "invalid_request_error" if fault.status != 500 else "server_error"
    error = {"error": {"message": fault.message, "type": type_, "param": fault.param, "code": fault.code}}
    return Answer(fault.status, orjson.dumps(error).decode())


def _vectors(payload: EmbeddingPayload, embeddings: list[bytes]) -> list[Any]:
    if payload.encoding_format == "base64":
        return [base64.b64encode(raw).decode() for raw in embeddings]
    return [np.frombuffer(raw, dtype="<f4") for raw in embeddings]
