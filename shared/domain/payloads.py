"""The bodies of OpenAI's generation calls: what is accepted, and the answers' shapes.

Used for a line of a batch by the worker and for an online call by the gateway, so that both refuse the same things.
Unknown fields are ignored, as OpenAI's SDKs send new ones; wrong values of known fields are refused by name.
"""

from collections.abc import Collection, Iterator
from functools import cache
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from shared.domain.errors import InvalidRequest, NotFound, RequestError
from shared.domain.nesting import refuse_deep
from shared.domain.prepared_tasks import MOST_INPUT

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/predictions"]
BATCH_ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)
PREDICTIONS: Endpoint = "/v1/predictions"

MAX_EMBEDDING_INPUTS = 2048
MAX_CHOICES = 2048
"""Prompts of one call times `n`: each choice costs memory from the engine to the client, however short it is."""
MAX_DELAY_MS = 60_000

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
Input = Annotated[float, Field(ge=-MOST_INPUT, le=MOST_INPUT)]
MAX_VECTOR = 65_536


class Payload(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    model: str = Field(min_length=1, max_length=400)

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        """OpenAI's SDKs send explicit nulls for fields that were not set."""
        if isinstance(data, dict) and None in data.values():
            return {key: value for key, value in data.items() if value is not None}
        return data


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    include_usage: bool = False


class GenerationPayload(Payload):
    """Sampling fields that chat and completions share; ranges are OpenAI's, extensions are design §5's."""

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(None, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    delay_ms: int = Field(0, ge=0, le=MAX_DELAY_MS)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, none of them empty."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: Literal["text", "refusal"]
    text: str = ""


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The message's text, its parts joined."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is required")
        return self


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    name: str = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _a_schema_is_named(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and with no other")
        return self


class ChatPayload(GenerationPayload):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def named_logprobs(self) -> int | None:
        """How many likeliest tokens to name beside each; None: no log-probabilities."""
        return self.top_logprobs if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        """Tokens to generate at most; None means up to the model's context."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


class CompletionPayload(GenerationPayload):
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = Field(None, ge=1, le=20)

    @property
    def named_logprobs(self) -> int | None:
        """How many likeliest tokens to name beside each; None: no log-probabilities."""
        return self.logprobs

    @property
    def token_limit(self) -> int | None:
        """Tokens to generate at most; None means the default of the model's engine, 16 for all but `echo`."""
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]  # the union is narrower than mypy can see

    @field_validator("prompt")
    @classmethod
    def _prompts_are_some_and_not_too_many(cls, prompt: Any, info: ValidationInfo) -> Any:
        if not prompt or any(part in ("", []) for part in prompt):
            raise ValueError("must not be empty")
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        choices = (1 if is_one else len(prompt)) * info.data.get("n", 1)
        if choices > MAX_CHOICES:
            raise ValueError(f"with n, {choices} choices are asked for; one call may have {MAX_CHOICES}")
        return prompt


class EmbeddingPayload(Payload):
    input: (
        Text
        | Annotated[list[TokenId], Field(min_length=1, max_length=8192 * 16)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_EMBEDDING_INPUTS)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_EMBEDDING_INPUTS)
        ]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None
    delay_ms: int = Field(0, ge=0, le=MAX_DELAY_MS)

    @property
    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


class PredictionPayload(Payload):
    """Ours: what the heads of a multi-task model say of texts, or of vectors where its backbone reads these."""

    input: (
        Text
        | Annotated[list[Input], Field(min_length=1, max_length=MAX_VECTOR)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_EMBEDDING_INPUTS)]
        | Annotated[
            list[Annotated[list[Input], Field(min_length=1, max_length=MAX_VECTOR)]],
            Field(min_length=1, max_length=MAX_EMBEDDING_INPUTS),
        ]
    )
    tasks: Annotated[list[Text], Field(min_length=1, max_length=64)] | None = None
    user: str | None = None

    @field_validator("input", mode="wrap")
    @classmethod
    def _is_told_at_once(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """Say what all the alternatives are, and not why the first of them does not fit."""
        try:
            return check(value)
        except ValidationError:
            kinds = f"a text, a list of numbers from {-MOST_INPUT:g} to {MOST_INPUT:g}"
            raise ValueError(f"must be {kinds}, or a list of at most {MAX_EMBEDDING_INPUTS} of one of these") from None

    @property
    def texts(self) -> list[str]:
        """The texts, if that is what they are."""
        values = [self.input] if isinstance(self.input, str) else self.input
        return [value for value in values if isinstance(value, str)]

    @property
    def vectors(self) -> list[list[float]]:
        """The vectors, if that is what they are."""
        if isinstance(self.input, str) or isinstance(self.input[0], str):
            return []
        if isinstance(self.input[0], list):
            return [[float(number) for number in vector] for vector in self.input]
        return [[float(number) for number in self.input]]


AnyPayload = ChatPayload | CompletionPayload | EmbeddingPayload | PredictionPayload

_MODELS: dict[str, type[AnyPayload]] = {
    "/v1/chat/completions": ChatPayload,
    "/v1/completions": CompletionPayload,
    "/v1/embeddings": EmbeddingPayload,
    PREDICTIONS: PredictionPayload,
}


def parse_payload(endpoint: str, body: Any) -> AnyPayload:
    """Return the checked body of a call to `endpoint`; raises InvalidRequest that names the first wrong field."""
    refuse_deep(body)
    try:
        payload: AnyPayload = _MODELS[endpoint].model_validate(body)
    except ValidationError as error:
        raise invalid_request(error) from None
    return payload


def parse_batch_body(endpoint: str, body: Any) -> AnyPayload:
    """Like `parse_payload`, for a line of a batch: nobody is there to read a stream."""
    payload = parse_payload(endpoint, body)
    if getattr(payload, "stream", None):
        raise InvalidRequest("Streaming is not possible in a batch.", param="stream", code="invalid_value")
    return payload


def unsupported_parameter(payload: AnyPayload) -> str | None:
    """Return a parameter that would change the answer and that the engine cannot honour yet; None when all is well."""
    if isinstance(payload, EmbeddingPayload):
        return "dimensions" if payload.dimensions is not None else None
    if isinstance(payload, PredictionPayload):
        return None
    asked: dict[str, bool] = {}
    if isinstance(payload, ChatPayload):
        asked |= {"tools": bool(payload.tools)}
    else:
        asked |= {"echo": payload.echo, "suffix": bool(payload.suffix)}
        asked |= {"best_of": payload.best_of not in (None, payload.n)}
    return next((name for name, is_asked in asked.items() if is_asked), None)


def refuse_unsupported(payload: AnyPayload) -> None:
    """Raise InvalidRequest for what the engine cannot do yet: better no answer than a wrong one. `echo` takes all."""
    param = unsupported_parameter(payload)
    if param is not None:
        raise InvalidRequest(f"{param} is not supported in this version.", param=param, code="unsupported_parameter")


def refuse_wrong_model(kind: str, name: str, endpoint: str, task_kinds: Collection[str] = ()) -> None:
    """Raise NotFound when a model of this kind does not serve `endpoint`. What a remote one serves its server says.

    task_kinds: Of a multi-task model: one with a causal head generates too.
    """
    if endpoint == PREDICTIONS:
        is_served = kind == "multi_task"
    elif endpoint == "/v1/embeddings":
        is_served = kind in ("encoder", "echo", "remote")
    else:
        has_head = kind == "multi_task" and "causal_lm" in task_kinds
        is_served = kind in ("causal_lm", "adapter", "echo", "remote") or has_head
    if not is_served:
        message = f"The model {name[:200]!r} does not serve {endpoint}."
        raise NotFound(message, param="model", code="model_not_supported")


def unknown_fields(endpoint: str, body: dict[str, Any]) -> list[str]:
    """Return the fields of a call that nobody here knows, as `messages[].x` within others; they are ignored.

    A null asks for nothing, so nothing of it is ignored.
    """
    return list(dict.fromkeys(_unknown(_MODELS[endpoint], body, "")))


def _unknown(model: type[BaseModel], value: dict[str, Any], path: str) -> Iterator[str]:
    nested = _nested_models(model)
    for name, child in value.items():
        if name not in model.model_fields:
            if child is not None:
                yield f"{path}{name}"
        elif name in nested:
            if isinstance(child, dict):
                yield from _unknown(nested[name], child, f"{path}{name}.")
            elif isinstance(child, list):
                for item in child:
                    if isinstance(item, dict):
                        yield from _unknown(nested[name], item, f"{path}{name}[].")


@cache
def _nested_models(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the fields of a model that hold models, or lists of them, each with its model."""
    found = {name: _model_in(field.annotation) for name, field in model.model_fields.items()}
    return {name: nested for name, nested in found.items() if nested is not None}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def invalid_request(error: ValidationError, under: str = "") -> RequestError:
    """Translate pydantic's first complaint into OpenAI's words: what, and which field.

    under: Where in the body the model stands, if not at its top.
    """
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    # pydantic names the tried type of a union in the path, e.g. ('stop', 'str'); clients know only the field.
    path = [str(part) for part in first["loc"] if not (isinstance(part, str) and _is_type_tag(part))]
    param = ".".join([*([under] if under else []), *path]) or None
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    message = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{param}: {message}." if param else f"{message}.", param=param, code=code)


def _is_type_tag(part: str) -> bool:
    return part in {"str", "int", "float", "bool"} or part.startswith(("list[", "function-", "constrained-", "dict["))


def chat_body(
    request_id: str,
    created: int,
    model: str,
    choices: list[tuple[str, str]],
    prompt_tokens: int,
    completion_tokens: int,
) -> dict[str, Any]:
    """Return a `chat.completion`; `choices` are (text, finish_reason) in order."""
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": reason,
            }
            for index, (text, reason) in enumerate(choices)
        ],
        "usage": token_usage(prompt_tokens, completion_tokens),
    }


def completion_body(
    request_id: str,
    created: int,
    model: str,
    choices: list[tuple[str, str]],
    prompt_tokens: int,
    completion_tokens: int,
) -> dict[str, Any]:
    """Return a `text_completion`; `choices` are (text, finish_reason), `n` for each prompt in order."""
    return {
        "id": f"cmpl-{request_id}",
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
            for index, (text, reason) in enumerate(choices)
        ],
        "usage": token_usage(prompt_tokens, completion_tokens),
    }


def chat_chunk(
    request_id: str,
    created: int,
    model: str,
    index: int,
    delta: dict[str, Any],
    finish_reason: str | None = None,
    logprobs: Any = None,
) -> dict[str, Any]:
    """Return a `chat.completion.chunk` with one choice."""
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [choice],
    }


def completion_chunk(
    request_id: str,
    created: int,
    model: str,
    index: int,
    text: str,
    finish_reason: str | None = None,
    logprobs: Any = None,
) -> dict[str, Any]:
    """Return a streamed `text_completion` with one choice."""
    return {
        "id": f"cmpl-{request_id}",
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}],
    }


def embedding_body(model: str, embeddings: list[Any], prompt_tokens: int) -> dict[str, Any]:
    """Return an embedding list; each embedding is a list of floats or base64 of little-endian float32."""
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(embeddings)
        ],
        "model": model,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


def prediction_body(model: str, predictions: list[dict[str, Any]], prompt_tokens: int) -> dict[str, Any]:
    """Return a list of predictions, one for each input: by task, what its head says."""
    return {
        "object": "prediction.list",
        "model": model,
        "data": [{"index": index, "predictions": each} for index, each in enumerate(predictions)],
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


def token_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
