"""What a worker process and its children say to each other: length-prefixed msgpack over a socket pair.

Never pickle, and no library of either side: one supervisor serves every kind of child (`services.worker.children`).
"""

import contextlib
import socket
import struct
from typing import Any, Literal

import msgspec

from shared.domain.prepared_tasks import Mode, Strategy, TaskKind
from shared.domain.prepared_tasks import Sharing as TaskSharing
from shared.domain.sharding import Sharding

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 30


class ModelSpec(msgspec.Struct, frozen=True):
    """A registered model; `source` is a directory, a hub id, `built-in` or (remote) a server's URL, and `revision` the
    model's name there. `key` names one loaded copy of it.

    An adapter's spec has the files of its base, `base` as that one's name, and its own directory as `adapter`.
    A multi-task model's has its own directory as `heads`, and as `source` its base's where it is an adapter on one.
    """

    name: str
    kind: Literal["echo", "causal_lm", "encoder", "remote", "multi_task"]
    source: str
    revision: str | None = None
    dtype: str = "float32"
    context_length: int | None = None
    base: str = ""
    adapter: str = ""
    heads: str = ""

    @property
    def key(self) -> str:
        adapter = f"+{self.adapter}" if self.adapter else ""
        heads = f"+heads:{self.heads}" if self.heads else ""
        return f"{self.source}@{self.revision or '-'}:{self.dtype}{adapter}{heads}"

    @property
    def without_adapter(self) -> "ModelSpec":
        """The base alone, which all its adapters share."""
        return msgspec.structs.replace(self, name=self.base, base="", adapter="") if self.adapter else self


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to draw tokens; the names and ranges are OpenAI's, and vLLM's for what OpenAI does not have."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    n: int = 1
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    """How many of the likeliest tokens to name beside each drawn one; None: no log-probabilities at all."""
    schema: str | None = None
    """The JSON schema, as JSON, that the answer's text follows."""


class Request(msgspec.Struct, omit_defaults=True):
    """One call. `messages` are set for chat, `prompts` (texts or token ids) for completions and embeddings, and for
    predictions `prompts` or `vectors`, with the `tasks` that are asked for (None: all).

    `is_online`: somebody waits for it, so it goes before batches. `is_streamed`: its text is sent in deltas too.
    `namespace`: whose it is; prompts share what was computed of them within one namespace only. `adapter`: the
    directory of the adapter that answers it; the child takes it from the model that the request came with.
    """

    id: int
    task: Literal["chat", "complete", "embed", "predict"]
    messages: list[dict[str, Any]] | None = None
    prompts: list[str | list[int]] = []
    vectors: list[list[float]] = []
    tasks: list[str] | None = None
    params: SamplingParams = SamplingParams()
    delay_ms: int = 0
    is_online: bool = False
    is_streamed: bool = False
    namespace: str = ""
    adapter: str = ""


class RequestFault(msgspec.Struct):
    """Why a request has no answer. `status` is the HTTP status of an error that is the caller's; None: try again."""

    message: str
    status: int | None = None
    param: str | None = None
    code: str | None = None


class TokenLogprob(msgspec.Struct):
    """A drawn token's text and natural log-probability, and the same of the likeliest tokens in its place.

    `raw`: its bytes, which may be a part of a character only; None when the tokenizer does not say.
    """

    token: str
    logprob: float
    top: "list[TokenLogprob]" = []
    raw: bytes | None = None


class Response(msgspec.Struct, omit_defaults=True):
    """The answer to one request: `choices` are (text, finish_reason); `embeddings` little-endian float32;
    `predictions` of each input what each task's head says.

    `logprobs`: for each choice its tokens', where they were asked for. `cached_tokens`: how many of the prompt's were
    not computed for it. `is_aborted`: nobody wants it any more; it says only what was used until then.
    """

    id: int
    choices: list[tuple[str, str]] = []
    logprobs: list[list[TokenLogprob]] = []
    cached_tokens: int = 0
    embeddings: list[bytes] = []
    predictions: list[dict[str, Any]] = []
    prompt_tokens: int = 0
    completion_tokens: int = 0
    fault: RequestFault | None = None
    is_aborted: bool = False


class Delta(msgspec.Struct, omit_defaults=True):
    """The next piece of text of a streamed request's choice `index`; the whole is what its response says.

    `logprobs` are those of the tokens that came since the last piece, where they were asked for.
    """

    id: int
    index: int
    text: str
    logprobs: list[TokenLogprob] = []


class Submit(msgspec.Struct, tag="submit"):
    model: ModelSpec
    requests: list[Request]


class Abort(msgspec.Struct, tag="abort"):
    ids: list[int]


class Ping(msgspec.Struct, tag="ping"):
    pass


class Stop(msgspec.Struct, tag="stop"):
    pass


class Output(msgspec.Struct, tag="output"):
    """What one step of an engine brought forth. Deltas belong before responses: a response ends its request."""

    responses: list[Response] = []
    deltas: list[Delta] = []

    def __bool__(self) -> bool:
        return bool(self.responses or self.deltas)


class EngineStatistics(msgspec.Struct, omit_defaults=True):
    """What one engine has done since its model was loaded, in totals that only grow, and what it holds now.

    `tokens`: generated, or embedded. `sequences`: how many took part in a step (inputs, for an encoder), summed over
    all `steps`; `places`: how many could have. `part_seconds`: where the time of its steps went.
    """

    tokens: int = 0
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    steps: int = 0
    sequences: int = 0
    places: int = 0
    part_seconds: dict[str, float] = {}
    preemptions: int = 0
    aborts: int = 0
    evictions: int = 0
    """Blocks whose cached content was given up for room."""
    running: int = 0
    waiting: int = 0
    blocks: int = 0
    blocks_in_use: int = 0
    blocks_cached: int = 0
    kv_bytes: int = 0
    """Memory of all blocks, in use or not."""


class Pong(msgspec.Struct, tag="pong"):
    """How a child fares. `progress` grows while its engines work; when it stands still, the child hangs.

    `model_hits`: how often requests found their model loaded. `engines` are by the model's name; `at_seconds` is the
    host's monotonic clock. `budget_bytes`: what its models may take just now. `lacking_room`: requests whose model
    waits until others, or a trainer, have given room. `load_seconds`: what loading each of `models` took.
    """

    progress: int
    in_flight: int
    models: list[str]
    model_loads: int
    cache_bytes: int
    tokens: int
    model_hits: int = 0
    engines: dict[str, EngineStatistics] = {}
    at_seconds: float = 0.0
    budget_bytes: int = 0
    lacking_room: int = 0
    load_seconds: dict[str, float] = {}


class Hyperparameters(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to train; names are OpenAI's, or those of transformers' TrainingArguments and peft's LoraConfig.

    `batch_size`: examples of one optimizer step; how many of them are computed at a time follows from
    `micro_batch_tokens` and changes no result. `learning_rate` None: 2e-4 for LoRA, 2e-5 for full. `max_steps` ends the
    run within its epochs, or after more of them. `eval_steps` None: at the end of each epoch. Raises ValueError for
    values that cannot be trained with.
    """

    full: bool = False
    n_epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 8
    micro_batch_tokens: int = 4096
    learning_rate: float | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    gradient_checkpointing: bool = False
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Names of the modules that get an adapter; `all-linear`: all linear ones but the head."""
    eval_steps: int | None = None

    def __post_init__(self) -> None:
        counts = {
            name: getattr(self, name)
            for name in ("n_epochs", "max_steps", "batch_size", "micro_batch_tokens", "lora_rank", "eval_steps")
        }
        rates = {name: getattr(self, name) for name in ("learning_rate", "lora_alpha", "max_grad_norm", "adam_epsilon")}
        shares = {name: getattr(self, name) for name in ("adam_beta1", "adam_beta2", "lora_dropout")}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be 1 or more, not {value}")
        for name, value in rates.items():
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: must be above 0, not {value}")
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name}: must be 0 or more and below 1, not {value}")
        if not 0 <= self.warmup_ratio <= 1 or not 0 <= self.weight_decay < float("inf"):
            raise ValueError("warmup_ratio must be from 0 to 1, weight_decay 0 or more")


class CheckpointPolicy(msgspec.Struct, frozen=True):
    """When checkpoints are written and which are kept: the last `keep_last`, and those of `keep_steps` for good.

    `every_steps` None: none by steps. `keep_steps` are always written; the run's last step is too.
    """

    every_steps: int | None = None
    every_seconds: float | None = 300.0
    keep_last: int = 2
    keep_steps: tuple[int, ...] = ()


class Place(msgspec.Struct, frozen=True):
    """Which of the `size` processes that train a job together one is.

    The first, rank 0, listens at `address`, on a port that it chooses and tells (`Listening`); it alone writes files
    and says how the job fares. The others are told the port.
    """

    rank: int = 0
    size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    sharding: Sharding = "none"


class TrainingSpec(msgspec.Struct, kw_only=True):
    """What all training jobs have in common; each goes on from its newest valid checkpoint if it has one.

    `base` is a model's directory, and `base_name` what the product calls it. Under `output`, the job's own directory,
    `checkpoints/TOKEN/step-N` and `model` are written. `memory_bytes`: what the child may take. `place`: among the
    processes that train it together. `recorded_steps`: what was told of these is recorded; of later ones that a
    checkpoint holds it is told again. `log_ids`: what the child's log lines carry.
    """

    base: str
    base_name: str
    output: str
    lease_token: str
    hyperparameters: Hyperparameters
    seed: int
    checkpoints: CheckpointPolicy = CheckpointPolicy()
    memory_bytes: int | None = None
    place: Place = Place()
    recorded_steps: int = 0
    log_ids: dict[str, str | int] = {}


class Train(TrainingSpec, tag="train", kw_only=True):
    """A fine-tuning job; `data` and `validation` are prepared data sets (`trainer.data`)."""

    data: str
    validation: str | None = None


class TaskPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One task; its labels and scale stand in the manifest of its rows. `loss` is a regression's."""

    name: str
    kind: TaskKind
    weight: float = 1.0
    loss: Literal["mse", "huber"] = "mse"


class SourcePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Rows that some tasks, by number, share; both are directories (`shared.domain.prepared_tasks`)."""

    tasks: tuple[int, ...]
    data: str
    validation: str | None = None


class TrainTasks(TrainingSpec, tag="train_tasks", kw_only=True):
    """A multi-task job (`trainer.multi_task_trainer`): one model, a head a task.

    `last_layers`: how many are trained of a trunk that is shared so. `temperature`, `cap`, `rehearsal`: the sampler's
    (`trainer.task_sampler.TaskMix`). `balancing`: a method's name (`shared.domain.balancing`). `is_mixed`: the rows of
    a step come from all sources, and not from one. `patience`: evaluations without a better loss until a task stops.
    `max_length`, `truncate`: of a row's tokens, and whether longer ones were cut; the product does likewise.
    """

    sharing: TaskSharing
    tasks: list[TaskPlan]
    sources: list[SourcePlan]
    last_layers: int = 2
    mode: Mode = "parallel"
    strategy: Strategy = "uniform"
    temperature: float = 1.0
    cap: int | None = None
    rehearsal: float = 0.0
    is_mixed: bool = True
    balancing: str = "sum"
    patience: int | None = None
    max_length: int | None = None
    truncate: bool = False


class Budget(msgspec.Struct, tag="budget"):
    """Hold no more than `cache_bytes` of models from now on; those at work end what they have before they go."""

    cache_bytes: int


class Pause(msgspec.Struct, tag="pause"):
    """Hold before the next step; pings are answered with nothing in flight meanwhile."""


class Resume(msgspec.Struct, tag="resume"):
    pass


class Listening(msgspec.Struct, tag="listening"):
    """The first of several processes waits for the others."""

    port: int


class Started(msgspec.Struct, tag="started"):
    """A job's model is loaded; it goes on after `step` of `total_steps`, in which it learnt from `trained_tokens`.
    `skipped`: checkpoints that were damaged.
    """

    step: int
    total_steps: int
    steps_per_epoch: int
    trainable_parameters: int
    skipped: list[str] = []
    trained_tokens: int = 0


class TaskStep(msgspec.Struct, frozen=True):
    """One task's part in a step: its mean loss over `targets` before the update, and its weight in it."""

    loss: float
    weight: float
    targets: int


class TaskValidation(msgspec.Struct, frozen=True):
    """One task after an evaluation. `best_step`: that of its lowest loss so far. `is_stopped`: it learns no more."""

    metrics: dict[str, float]
    best_step: int
    is_stopped: bool


class Progress(msgspec.Struct, tag="progress"):
    """One optimizer step is done. It is told again, the same, after a loss of the child, unless it is known to be
    recorded: computed once more, or out of the journal where a checkpoint holds it.

    `loss` and `accuracy` are means over the step's `trained_tokens`, before its update; `tokens` are all those read.
    """

    step: int
    total_steps: int
    loss: float
    accuracy: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    tasks: dict[str, TaskStep] = {}


class Evaluated(msgspec.Struct, tag="evaluated"):
    """Means over the whole validation set after `step`; step 0 is the base model. With several tasks, of each its own
    metrics; `loss` and `accuracy` are then means over those that have them.
    """

    step: int
    loss: float
    accuracy: float
    tasks: dict[str, TaskValidation] = {}


class CheckpointWritten(msgspec.Struct, tag="checkpoint"):
    """`path` is complete on disk; `sha256` is that of its manifest, `model` a directory that can be served.

    `metrics`: those that are known of train_loss, train_mean_token_accuracy, full_valid_loss and
    full_valid_mean_token_accuracy.
    """

    path: str
    model: str
    step: int
    sha256: str
    metrics: dict[str, float]


class Finished(msgspec.Struct, tag="finished"):
    """The product is in `model`. `tokens` were read and `trained_tokens` learnt from, over all steps of the job."""

    model: str
    step: int
    tokens: int
    trained_tokens: int
    metrics: dict[str, float]
    plots: list[str] = []
    """Image files, within `model`."""
    best: list[CheckpointWritten] = []
    """Checkpoints after which some task was at its best."""


class Stopped(msgspec.Struct, tag="stopped"):
    """What Stop brought about; a checkpoint of `step` was written before, if there was anything new."""

    step: int


class Failed(msgspec.Struct, tag="failed"):
    """The job ended at `step`; the codes are those of `trainer.errors`. Its last good checkpoint stays."""

    code: str
    message: str
    step: int


ToChild = Submit | Abort | Ping | Stop | Budget | Train | TrainTasks | Pause | Resume
FromChild = Output | Pong | Listening | Started | Progress | Evaluated | CheckpointWritten | Finished | Stopped | Failed

_TO_CHILD = msgspec.msgpack.Decoder(ToChild)
_FROM_CHILD = msgspec.msgpack.Decoder(FromChild)
_ENCODER = msgspec.msgpack.Encoder()


class Channel:
    """One end of a socket pair. Sending is not thread-safe: each end has one writer, or locks."""

    def __init__(self, endpoint: socket.socket) -> None:
        self._socket = endpoint
        self._reader = endpoint.makefile("rb", buffering=1 << 20)

    def send(self, message: ToChild | FromChild) -> None:
        """Write one frame; raises OSError when the other end is gone."""
        payload = _ENCODER.encode(message)
        self._socket.sendall(_LENGTH.pack(len(payload)) + payload)

    def try_ping(self) -> None:
        """Send a Ping unless the other end has stopped reading: then it is dropped, and nobody waits.

        A frame this small is taken by the kernel whole or not at all. Raises OSError when the other end is gone.
        """
        payload = _ENCODER.encode(Ping())
        with contextlib.suppress(BlockingIOError):
            self._socket.send(_LENGTH.pack(len(payload)) + payload, socket.MSG_DONTWAIT)

    def receive_in_child(self) -> ToChild | None:
        """Wait for the next frame from the worker; None when it is gone."""
        payload = self._frame()
        return None if payload is None else _TO_CHILD.decode(payload)

    def receive_in_worker(self) -> FromChild | None:
        """Wait for the next frame from the child; None when it is gone."""
        payload = self._frame()
        return None if payload is None else _FROM_CHILD.decode(payload)

    def _frame(self) -> bytes | None:
        try:
            head = self._reader.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            (length,) = _LENGTH.unpack(head)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes")
            payload = self._reader.read(length)
        except OSError:
            return None
        return payload if len(payload) == length else None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other end closed first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
