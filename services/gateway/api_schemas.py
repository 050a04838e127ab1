"""What every route answers, as `/openapi.json` describes it; `openapi.py` puts it there.

These classes make and check nothing: answers are made elsewhere, and those of online calls pass as the bytes that were
recorded. `tests/integration/test_openapi.py` holds real answers of every route to them, so that neither can change
alone. A field without a default is always there, if only as null.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from shared.domain.job import JobKind, JobState
from shared.domain.prepared_tasks import Mode, Sharing, TaskKind

_HEX = "[0-9a-f]{32}"

FileId = Annotated[str, Field(pattern=f"^file-{_HEX}$")]
BatchId = Annotated[str, Field(pattern=f"^batch_{_HEX}$")]
FineTuningId = Annotated[str, Field(pattern=f"^ftjob-{_HEX}$")]
JobId = Annotated[str, Field(pattern=f"^(batch_|ftjob-|train_){_HEX}$")]
"""A batch's job id is its batch id; a fine-tuning job's likewise."""
RowId = Annotated[str, Field(pattern=r"^[0-9]+$")]
"""Ids that grow in the order in which their rows were made."""
Time = Annotated[int, Field(ge=0, description="Unix seconds.")]
Count = Annotated[int, Field(ge=0)]


class Answer(BaseModel):
    """Anything that a route may answer, or a part of it."""


class ErrorDetail(Answer):
    message: str
    type: Annotated[str, Field(description="Such as `invalid_request_error`.")]
    param: Annotated[str | None, Field(description="The field that is wrong.")]
    code: Annotated[str | None, Field(description="What programs may decide by.")]


class Error(Answer):
    """The body of every answer that is no success; all four keys are always there."""

    error: ErrorDetail


class Health(Answer):
    status: Literal["ok"]


class Readiness(Answer):
    """Whether jobs are accepted. Without Redis they are, and wait for it."""

    status: Literal["ready", "unavailable"]
    postgres: bool
    redis: bool


class Deleted(Answer):
    """What is gone."""

    id: str
    object: Literal["file", "model", "api_key"]
    deleted: Literal[True]


class Page(Answer):
    """A page of a list. `last_id` is the `after` of the next one, where `has_more` says that there is one."""

    object: Literal["list"]
    has_more: bool
    first_id: str | None
    last_id: str | None


class File(Answer):
    """A file: uploaded, or a batch's output or errors, which are rendered from its results when they are read."""

    id: FileId
    object: Literal["file"]
    bytes: Count
    created_at: Time
    expires_at: Time | None
    filename: str
    purpose: Literal[
        "assistants", "batch", "batch_output", "fine-tune", "fine-tune-results", "vision", "user_data", "evals"
    ]
    status: Literal["processed"]
    status_details: None


class FileList(Page):
    data: list[File]


class BatchError(Answer):
    code: str
    message: str
    param: str | None
    line: Annotated[int | None, Field(ge=1, description="Counted from 1; null where the whole file is meant.")]


class BatchErrors(Answer):
    object: Literal["list"]
    data: list[BatchError]


class BatchCounts(Answer):
    total: Count
    completed: Count
    failed: Count


class CachedTokens(Answer):
    cached_tokens: Count


class ReasoningTokens(Answer):
    reasoning_tokens: Count


class BatchUsage(Answer):
    input_tokens: Count
    input_tokens_details: CachedTokens
    output_tokens: Count
    output_tokens_details: ReasoningTokens
    total_tokens: Count


class Batch(Answer):
    """A batch. Its counts are exact at the moment of the answer; a time is there once its state was reached."""

    id: BatchId
    object: Literal["batch"]
    endpoint: str | None
    model: Annotated[str | None, Field(description="The one that its lines name.")]
    errors: Annotated[BatchErrors | None, Field(description="Why the input file was refused.")]
    input_file_id: FileId | None
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: FileId | None
    error_file_id: FileId | None
    created_at: Time
    in_progress_at: Time | None
    expires_at: Time | None
    finalizing_at: Time | None
    completed_at: Time | None
    failed_at: Time | None
    expired_at: Time | None
    cancelling_at: Time | None
    cancelled_at: Time | None
    request_counts: BatchCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(Page):
    data: list[Batch]


class Window(Answer):
    start: Annotated[str, Field(description="Such as `22:00`.")]
    end: str
    tz: str


class Progress(Answer):
    done: Count
    failed: Annotated[int, Field(ge=0, description="Of those that are done.")]
    total: Annotated[int, Field(ge=0, description="0 until the input was looked at.")]
    unit: Literal["lines", "steps"]


class Waiting(Answer):
    """Why a job does not run."""

    reason: Literal["window", "dependency", "capacity", "quota", "model_loading", "paused"]
    detail: str
    place: Annotated[int | None, Field(ge=1, description="Place in the queue of everybody, from 1.")]
    until: Time | None


class Forecast(Answer):
    starts_at: Time | None
    ends_at: Time | None
    on_time: bool | None


class JobUsage(Answer):
    input_tokens: Count
    output_tokens: Count
    device_seconds: Annotated[float, Field(ge=0, description="The job's share of the devices that ran it.")]


class Job(Answer):
    """A job of any kind."""

    id: JobId
    object: Literal["job"]
    kind: JobKind
    status: JobState
    tenant: str
    created_at: Time
    started_at: Time | None
    ended_at: Time | None
    model: str | None
    priority: Annotated[int, Field(ge=0, le=9, description="9 goes first.")]
    window: Window | None
    deadline: Annotated[str | None, Field(description="RFC 3339, or `none`.")]
    after: list[JobId]
    progress: Progress
    waiting: Waiting | None
    forecast: Forecast | None
    usage: JobUsage
    error: ErrorDetail | None
    produces: Annotated[
        str | None, Field(description="The model that it trains, by its name-to-be; to batches after it.")
    ]
    metadata: dict[str, str]
    output_file_id: FileId | None
    error_file_id: FileId | None


class JobList(Page):
    data: list[Job]


class JobEvent(Answer):
    """What happened to a job."""

    id: RowId
    object: Literal["job.event"]
    type: Literal["status", "progress", "metrics", "message"]
    level: Literal["info", "warn", "error"]
    message: str
    data: dict[str, Any] | None
    created_at: Time


class JobEventList(Page):
    data: list[JobEvent]


class JobProgress(Answer):
    """How far a job is, in a stream of its events: sent when it changes, with no id of its own."""

    done: Count
    failed: Count
    total: Count
    at: Annotated[int | None, Field(description="When it ended, in Unix seconds.")]


class Attempt(Answer):
    """One try of a slice of a job."""

    id: RowId
    slice: int
    task_id: Annotated[str, Field(description="The Celery task's, as Flower shows it.")]
    worker: str
    device: str
    started_at: Time
    ended_at: Time | None
    outcome: Literal["done", "lost", "preempted", "failed", "cancelled"] | None
    error: str | None


class AttemptList(Page):
    data: list[Attempt]


Chosen = Literal["auto"] | Annotated[float, Field(gt=0)]
"""`auto` until the data was looked at, then what is used."""


class FineTuningHyperparameters(Answer):
    n_epochs: Chosen
    batch_size: Chosen
    learning_rate_multiplier: Chosen


class SupervisedMethod(Answer):
    hyperparameters: Annotated[dict[str, Any], Field(description="All of them, ours too.")]


class FineTuningMethod(Answer):
    type: Literal["supervised"]
    supervised: SupervisedMethod


class FineTuningError(Answer):
    code: str | None
    message: str
    param: str | None


class FineTuningJob(Answer):
    id: FineTuningId
    object: Literal["fine_tuning.job"]
    created_at: Time
    error: FineTuningError | None
    estimated_finish: Time | None
    fine_tuned_model: Annotated[str | None, Field(description="The name under which what was made is served.")]
    finished_at: Time | None
    hyperparameters: FineTuningHyperparameters
    integrations: list[dict[str, Any]]
    metadata: dict[str, str] | None
    method: FineTuningMethod
    model: str
    organization_id: Annotated[str, Field(description="The tenant.")]
    result_files: list[FileId]
    seed: Annotated[int, Field(ge=0)]
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    trained_tokens: Count | None
    training_file: FileId | None
    user_provided_suffix: str | None
    validation_file: FileId | None


class FineTuningJobList(Page):
    data: list[FineTuningJob]


class FineTuningEvent(Answer):
    """What happened to a fine-tuning job: in words, or the metrics of a step."""

    object: Literal["fine_tuning.job.event"]
    id: Annotated[str, Field(pattern="^ftevent-[0-9]+$")]
    created_at: Time
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class FineTuningEventList(Page):
    data: list[FineTuningEvent]


class FineTuningCheckpoint(Answer):
    """What can be served of a run before its end, and after."""

    id: Annotated[str, Field(pattern=f"^ftckpt_{_HEX}-[0-9]+$")]
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: Time
    fine_tuning_job_id: FineTuningId
    fine_tuned_model_checkpoint: Annotated[str, Field(description="The name under which it is served.")]
    step_number: Count
    metrics: dict[str, Any]


class FineTuningCheckpointList(Page):
    data: list[FineTuningCheckpoint]


class TrainingTask(Answer):
    """One task of a multi-task job, as its newest evaluation left it."""

    name: str
    kind: TaskKind
    metrics: Annotated[dict[str, float], Field(description="On its validation rows; empty before it was evaluated.")]
    best_step: Annotated[int | None, Field(description="After which its validation loss was the lowest.")]
    stopped: Annotated[bool, Field(description="Whether it learns no more (`early_stop_patience`).")]


class TrainingSource(Answer):
    """Rows that some tasks share."""

    tasks: list[str]
    rows: Count
    tokens: Count
    validation_rows: Count


class TrainingPlan(Answer):
    """What a job was found to be when its data was prepared."""

    hyperparameters: Annotated[dict[str, Any], Field(description="As they are used.")]
    steps: Count
    tokens: Count
    memory_bytes: Count
    device_seconds: Annotated[
        float | None, Field(description="By the speed of earlier jobs; null before there are any.")
    ]
    sources: list[TrainingSource]
    heads: Annotated[
        list[dict[str, Any]], Field(description="Of each task: labels with their counts, mean, deviation.")
    ]


class TaskComparison(Answer):
    """A task trained together with the others, and alone."""

    task: str
    metric: str
    together: float | None
    alone: float | None
    change: Annotated[float | None, Field(description="Relative to alone; above 0 is better together.")]
    job: JobId | None
    status: JobState | None


class TrainingComparison(Answer):
    tasks: list[TaskComparison]
    mean_change: float | None


class TrainingErrors(Answer):
    object: Literal["list"]
    data: list[dict[str, Any]]


class TrainingJob(Job):
    """A multi-task job; `spec` is what was asked for."""

    sharing: Sharing | None
    mode: Mode | None
    balancing: str | None
    seed: int | None
    tasks: list[TrainingTask]
    spec: dict[str, Any]
    plan: TrainingPlan | None
    model_name: Annotated[str | None, Field(description="The name under which what was made is served.")]
    trained_tokens: Count | None
    result_files: list[FileId]
    errors: TrainingErrors | None
    comparison: TrainingComparison | None


class TrainingJobList(Page):
    data: list[TrainingJob]


class TrainingEvent(FineTuningEvent):
    """What happened to a multi-task job: in words, or the metrics of a step with each task's."""

    object: Literal["training.job.event"]  # type: ignore[assignment]  # all else is alike


class TrainingEventList(Page):
    data: list[TrainingEvent]


class TrainingCheckpoint(Answer):
    """What can be served of a run before its end, and after."""

    id: Annotated[str, Field(pattern=f"^ftckpt_{_HEX}-[0-9]+$")]
    object: Literal["training.job.checkpoint"]
    created_at: Time
    training_job_id: JobId
    fine_tuned_model_checkpoint: Annotated[str, Field(description="The name under which it is served.")]
    step_number: Count
    metrics: dict[str, Any]


class TrainingCheckpointList(Page):
    data: list[TrainingCheckpoint]


class TrainingSchema(Answer):
    """A JSON schema."""

    type: Literal["object"]
    title: str
    description: str
    properties: dict[str, Any]
    required: list[str]
    additional_properties: Annotated[Literal[False], Field(alias="additionalProperties")]
    definitions: Annotated[dict[str, Any], Field(alias="$defs")]


class Model(Answer):
    """A model that may be named in calls."""

    id: str
    object: Literal["model"]
    created: Time
    owned_by: Annotated[str, Field(description="`lamplighter` where it serves every tenant, else its tenant.")]


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class RegisteredModel(Model):
    """A model as its registration answers."""

    kind: Literal["causal_lm", "encoder", "seq2seq", "echo", "remote", "adapter", "multi_task"]
    dtype: Annotated[str, Field(description="The number type in which it is served, by every worker.")]
    context_length: Annotated[int | None, Field(ge=1, description="Tokens of prompt and answer together.")]
    base: Annotated[str | None, Field(description="The model that an adapter is for.")] = None
    warning: Annotated[
        str, Field(description="What may be wrong with a server that serves it, or differs from its files.")
    ] = ""


class Tenant(Answer):
    id: str
    object: Literal["tenant"]
    name: str
    weight: Annotated[float, Field(gt=0, description="Its share of the devices beside the others'.")]
    window: Annotated[Window | None, Field(description="Hours in which its jobs may run.")]
    max_enqueued_tokens: int | None
    device_seconds_per_day: float | None
    max_devices: int | None
    created_at: Time


class TenantList(Page):
    data: list[Tenant]


class NewKey(Answer):
    """A new API key. Its secret is shown this once: a repeated request under its Idempotency-Key gets null."""

    id: str
    object: Literal["api_key"]
    key: str | None
    tenant: str
    scopes: list[str]


class Key(Answer):
    """An API key, without its secret."""

    id: str
    object: Literal["api_key"]
    tenant: str
    name: str
    scopes: list[str]
    created_at: Time
    revoked_at: Time | None


class KeyList(Page):
    data: list[Key]


class EventTypeList(Answer):
    object: Literal["list"]
    data: list[str]


class Webhook(Answer):
    """A target for events of a tenant's jobs, without its secret."""

    id: str
    object: Literal["webhook_endpoint"]
    created_at: Time
    updated_at: Time
    event_types: list[str]
    name: str
    url: str
    signing_secret_hint: str
    tenant: str
    is_active: Annotated[bool, Field(description="False once it answered 410; changing it has it take events again.")]


class WebhookList(Page):
    data: list[Webhook]


class WebhookWithSecret(Webhook):
    """A target with its signing secret: shown this once, null to a request repeated under its Idempotency-Key."""

    signing_secret: str | None


class DeletedWebhook(Answer):
    id: str
    object: Literal["webhook_endpoint.deleted"]
    deleted: bool


class Schedule(Answer):
    """A job that begins again and again."""

    id: str
    object: Literal["schedule"]
    name: str
    tenant: str
    cron: str
    tz: str
    kind: Literal["batch", "fine_tuning", "training"]
    spec: dict[str, Any]
    overlap: Literal["allow", "skip"]
    deadline_after_seconds: float | None
    is_active: bool
    next_at: Annotated[Time | None, Field(description="Its next slot; null while it is not active.")]
    created_at: Time
    updated_at: Time


class ScheduleList(Page):
    data: list[Schedule]


class DeletedSchedule(Answer):
    id: str
    object: Literal["schedule.deleted"]
    deleted: bool


class ScheduleRun(Answer):
    """One slot of a schedule, and what became of it."""

    id: str
    object: Literal["schedule.run"]
    schedule: str
    slot: Time
    missed: Annotated[Count, Field(description="Slots before it that nobody was there for: it makes up for them.")]
    status: Literal["due", "submitted", "skipped", "failed"]
    job: str | None
    job_status: str | None
    error: Annotated[dict[str, Any] | None, Field(description="Why there is no job.")]
    created_at: Time
    ended_at: Time | None


class ScheduleRunList(Page):
    data: list[ScheduleRun]


class Erasure(Answer):
    """A tenant that is being deleted with all that is its own, or the report of it."""

    id: str
    object: Literal["erasure"]
    tenant: str
    status: Literal["erasing", "erased"]
    requested_by: Annotated[str, Field(description="The id of the key that asked for it.")]
    requested_at: Time
    ended_at: Time | None
    deleted: Annotated[dict[str, Count], Field(description="Rows by table; objects and bytes of the store.")]
    problem: Annotated[str | None, Field(description="What it met last; it is tried again.")]


class ErasureList(Page):
    data: list[Erasure]


class RetentionDay(Answer):
    """What was forgotten on a day, and what was past its retention and still there when that was last looked for."""

    id: Annotated[str, Field(description="The day, by UTC.")]
    object: Literal["retention.day"]
    checked_at: Time | None
    deleted: Annotated[dict[str, Count], Field(description="Rows by table; objects and bytes of the store.")]
    overdue: Annotated[
        dict[str, Count], Field(description="Days of results; jobs with details (event, attempt, slice); other rows.")
    ]


class RetentionDayList(Page):
    data: list[RetentionDay]


class WebhookTested(Answer):
    """What a target answered to a sample event."""

    object: Literal["webhook_endpoint.test"]
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True]


class Delivery(Answer):
    """An event on its way to a target, or at the end of it."""

    id: Annotated[str, Field(description="The event's id; its header `webhook-id` ends in the same digits.")]
    object: Literal["webhook_endpoint.delivery"]
    event_type: str
    job: Annotated[str | None, Field(description="None: a test.")]
    status: Literal["waiting", "delivered", "failed"]
    attempts: Count
    status_code: int | None
    error: str | None
    created_at: Time
    next_attempt_at: Time | None
    ended_at: Time | None


class DeliveryList(Page):
    data: list[Delivery]


class WorkerMemory(Answer):
    used_bytes: Count
    budget_bytes: Count


class WorkerEngine(Answer):
    """One loaded model on a worker. Totals grow from its load on, and rates are of the last heartbeat."""

    model: str
    tokens_per_second: float
    batch_occupancy: float
    tokens: Annotated[int, Field(ge=0, description="Generated, or embedded.")]
    prompt_tokens_computed: Count
    prompt_tokens_cached: Count
    steps: Count
    sequences: Annotated[int, Field(ge=0, description="How many took part in a step, summed over the steps.")]
    places: Annotated[int, Field(ge=0, description="How many could have, summed over the steps.")]
    part_seconds: Annotated[dict[str, float], Field(description="Where the time of its steps went.")]
    preemptions: Count
    aborts: Count
    evictions: Count
    running: Count
    waiting: Count
    blocks: Annotated[int, Field(ge=0, description="Of its KV cache.")]
    blocks_in_use: Count
    blocks_cached: Count
    kv_bytes: Count


class Worker(Answer):
    """A worker process that was seen within the last hour."""

    id: Annotated[str, Field(description="Another one after each start.")]
    object: Literal["worker"]
    name: str
    host: str
    device: str
    state: Literal["idle", "busy", "draining", "lost"]
    heartbeat_at: Annotated[Time, Field(description="When it last said what it holds and does.")]
    models: Annotated[list[str], Field(description="What it holds in memory, of what the caller may use.")]
    memory: WorkerMemory
    tokens_per_second: float
    batch_occupancy: Annotated[
        float, Field(ge=0, le=1, description="Share of the places in its steps that were taken.")
    ]
    online_calls: Count
    engines: list[WorkerEngine]
    model_loads: Count
    stale_writes: Annotated[int, Field(ge=0, description="Results that it threw away, as its lease was over.")]


class WorkerList(Page):
    data: list[Worker]


class TokenUsage(Answer):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class LikelyToken(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(Answer):
    content: list[ChatToken] | None
    refusal: None


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class ChatChoice(Answer):
    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: Time
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage


class ChatDelta(Answer):
    """What a chunk adds to its choice's message; the first one names the role, and the last adds nothing."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: str | None = None


class ChatChunkChoice(Answer):
    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Answer):
    """An event of a streamed chat. With `stream_options.include_usage` every one has `usage`, the last one not null."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: Time
    model: str
    choices: list[ChatChunkChoice]
    usage: TokenUsage | None = None


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Answer):
    """`n` choices for each prompt, in order."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: Time
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage


class CompletionChunkChoice(Answer):
    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChunk(Answer):
    """An event of a streamed completion; `usage` as in a chat's."""

    id: str
    object: Literal["text_completion"]
    created: Time
    model: str
    choices: list[CompletionChunkChoice]
    usage: TokenUsage | None = None


class Embedding(Answer):
    object: Literal["embedding"]
    index: Count
    embedding: Annotated[list[float] | str, Field(description="Numbers, or base64 of little-endian float32.")]


class EmbeddingUsage(Answer):
    prompt_tokens: Count
    total_tokens: Count


class EmbeddingList(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Prediction(Answer):
    """What one task's head says; which fields there are follows from its kind."""

    label: str | None = None
    labels: list[str] | None = None
    probabilities: dict[str, float] | None = None
    value: float | None = None
    text: str | None = None
    tokens: list[dict[str, Any]] | None = None


class Predictions(Answer):
    index: Count
    predictions: dict[str, Prediction]


class PredictionList(Answer):
    object: Literal["prediction.list"]
    model: str
    data: list[Predictions]
    usage: EmbeddingUsage


class PlannedBlock(Answer):
    job: JobId
    model: str | None
    starts_at: Time
    ends_at: Time


class PlanLane(Answer):
    """What a worker is expected to do, one job after another; others' jobs are not shown."""

    worker: str
    device: str
    blocks: list[PlannedBlock]


class PlannedJob(Answer):
    id: JobId
    starts_at: Time | None
    ends_at: Annotated[Time | None, Field(description="Null: not within two weeks.")]
    deadline: Time | None
    on_time: Annotated[
        bool | None,
        Field(description="Whether it meets its deadline also if everything takes as long as it hardly ever does."),
    ]
    confidence: Literal["measured", "guess"]


class Plan(Answer):
    object: Literal["plan"]
    now: Time
    lanes: list[PlanLane]
    jobs: list[PlannedJob]


class Estimate(Answer):
    """What a job would take; nothing was accepted."""

    object: Literal["estimate"]
    input_tokens: Count
    output_tokens_max: Count
    device_seconds: Annotated[float, Field(ge=0)]
    starts_at: Time | None
    ends_at: Annotated[Time | None, Field(description="Null: without workers, or not within two weeks.")]
    on_time: bool | None
    confidence: Literal["measured", "guess"]


class UsageSums(Answer):
    """What was used within a bucket. Of the groups, those that were asked for are there."""

    tenant: str | None = None
    key: Annotated[str | None, Field(description="A key's id.")] = None
    model: str | None = None
    job: Annotated[JobId | None, Field(description="Null for online calls.")] = None
    requests: Count
    input_tokens: Count
    output_tokens: Count
    device_seconds: Annotated[float, Field(ge=0)]


class UsageBucket(Answer):
    """An hour or a day, by UTC."""

    id: str
    object: Literal["usage.bucket"]
    start: Time
    end: Time
    results: list[UsageSums]


class UsageList(Page):
    data: list[UsageBucket]


ANSWERS: dict[tuple[str, str], type[Answer]] = {
    ("get", "/healthz"): Health,
    ("get", "/readyz"): Readiness,
    ("post", "/v1/chat/completions"): ChatCompletion,
    ("post", "/v1/completions"): Completion,
    ("post", "/v1/embeddings"): EmbeddingList,
    ("post", "/v1/files"): File,
    ("get", "/v1/files"): FileList,
    ("get", "/v1/files/{file_id}"): File,
    ("delete", "/v1/files/{file_id}"): Deleted,
    ("post", "/v1/batches"): Batch,
    ("get", "/v1/batches"): BatchList,
    ("get", "/v1/batches/{batch_id}"): Batch,
    ("post", "/v1/batches/{batch_id}/cancel"): Batch,
    ("get", "/v1/jobs"): JobList,
    ("get", "/v1/jobs/{job_id}"): Job,
    ("patch", "/v1/jobs/{job_id}"): Job,
    ("post", "/v1/jobs/{job_id}/cancel"): Job,
    ("post", "/v1/jobs/{job_id}/pause"): Job,
    ("post", "/v1/jobs/{job_id}/resume"): Job,
    ("get", "/v1/jobs/{job_id}/attempts"): AttemptList,
    ("get", "/v1/jobs/{job_id}/events"): JobEventList,
    ("post", "/v1/fine_tuning/jobs"): FineTuningJob,
    ("get", "/v1/fine_tuning/jobs"): FineTuningJobList,
    ("get", "/v1/fine_tuning/jobs/{job_id}"): FineTuningJob,
    ("post", "/v1/fine_tuning/jobs/{job_id}/cancel"): FineTuningJob,
    ("post", "/v1/fine_tuning/jobs/{job_id}/pause"): FineTuningJob,
    ("post", "/v1/fine_tuning/jobs/{job_id}/resume"): FineTuningJob,
    ("get", "/v1/fine_tuning/jobs/{job_id}/events"): FineTuningEventList,
    ("get", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): FineTuningCheckpointList,
    ("post", "/v1/training/jobs"): TrainingJob,
    ("get", "/v1/training/jobs"): TrainingJobList,
    ("get", "/v1/training/schema"): TrainingSchema,
    ("post", "/v1/jobs/{job_id}/retry_failed"): Job,
    ("get", "/v1/training/jobs/{job_id}"): TrainingJob,
    ("post", "/v1/training/jobs/{job_id}/cancel"): TrainingJob,
    ("post", "/v1/training/jobs/{job_id}/pause"): TrainingJob,
    ("post", "/v1/training/jobs/{job_id}/resume"): TrainingJob,
    ("get", "/v1/training/jobs/{job_id}/events"): TrainingEventList,
    ("get", "/v1/training/jobs/{job_id}/checkpoints"): TrainingCheckpointList,
    ("post", "/v1/predictions"): PredictionList,
    ("get", "/v1/models"): ModelList,
    ("post", "/v1/models"): RegisteredModel,
    ("get", "/v1/models/{name}"): Model,
    ("delete", "/v1/models/{name}"): Deleted,
    ("get", "/v1/tenants"): TenantList,
    ("post", "/v1/tenants"): Tenant,
    ("patch", "/v1/tenants/{tenant_id}"): Tenant,
    ("get", "/v1/keys"): KeyList,
    ("post", "/v1/keys"): NewKey,
    ("delete", "/v1/keys/{key_id}"): Deleted,
    ("delete", "/v1/tenants/{tenant_id}"): Erasure,
    ("get", "/v1/erasures"): ErasureList,
    ("get", "/v1/retention"): RetentionDayList,
    ("get", "/v1/erasures/{erasure_id}"): Erasure,
    ("get", "/v1/schedules"): ScheduleList,
    ("post", "/v1/schedules"): Schedule,
    ("get", "/v1/schedules/{schedule_id}"): Schedule,
    ("post", "/v1/schedules/{schedule_id}"): Schedule,
    ("delete", "/v1/schedules/{schedule_id}"): DeletedSchedule,
    ("post", "/v1/schedules/{schedule_id}/run"): ScheduleRun,
    ("get", "/v1/schedules/{schedule_id}/runs"): ScheduleRunList,
    ("get", "/v1/webhook_event_types"): EventTypeList,
    ("get", "/v1/webhook_endpoints"): WebhookList,
    ("post", "/v1/webhook_endpoints"): WebhookWithSecret,
    ("get", "/v1/webhook_endpoints/{webhook_endpoint_id}"): Webhook,
    ("post", "/v1/webhook_endpoints/{webhook_endpoint_id}"): Webhook,
    ("delete", "/v1/webhook_endpoints/{webhook_endpoint_id}"): DeletedWebhook,
    ("post", "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret"): WebhookWithSecret,
    ("post", "/v1/webhook_endpoints/{webhook_endpoint_id}/test"): WebhookTested,
    ("get", "/v1/webhook_endpoints/{webhook_endpoint_id}/deliveries"): DeliveryList,
    ("get", "/v1/workers"): WorkerList,
    ("get", "/v1/usage"): UsageList,
    ("get", "/v1/plan"): Plan,
    ("post", "/v1/estimate"): Estimate,
}
"""The JSON of a route's 200. A file's content and streams are no JSON: `openapi.py` knows them."""

EVENTS: dict[tuple[str, str], tuple[type[Answer], ...]] = {
    ("post", "/v1/chat/completions"): (ChatCompletionChunk, Error),
    ("post", "/v1/completions"): (CompletionChunk, Error),
    ("get", "/v1/jobs/{job_id}/events"): (JobEvent, JobProgress),
}
"""What the data of an event may be, where a route answers with a stream when asked to."""
