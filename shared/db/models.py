"""The tables. `tenant_id` stands in every table and in every foreign key; row-level security is in the migrations."""

from datetime import date, datetime
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Date,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SYSTEM_TENANT = "system"
"""Owns what belongs to all tenants: workers, shared models."""
DEFAULT_TENANT = "default"
"""Has the first admin's key, which every set-up looks for."""


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
            "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
            "ck": "%(table_name)s_%(constraint_name)s_check",
            "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text(),
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(),
        list[Any]: JSONB(),
        int: BigInteger(),
        float: Double(),
    }


NOW = text("now()")


class Tenant(Base):
    __tablename__ = "tenant"

    tenant_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    weight: Mapped[float] = mapped_column(server_default="1")
    run_window: Mapped[dict[str, Any] | None]
    """Hours in which its jobs may run, beside those of each job."""
    max_enqueued_tokens: Mapped[int | None]
    device_seconds_per_day: Mapped[float | None]
    max_devices: Mapped[int | None] = mapped_column(Integer)
    erasing_since: Mapped[datetime | None]
    """It is being deleted with all that is its own, and takes nothing new."""
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)

    __table_args__ = tuple(
        CheckConstraint(f"{name} > 0", name=name)
        for name in ("weight", "max_enqueued_tokens", "device_seconds_per_day", "max_devices")
    )


def tenant_column(*, primary: bool = True) -> Mapped[str]:
    return mapped_column(ForeignKey("tenant.tenant_id"), primary_key=primary)


class ApiKey(Base):
    """`digest` is the SHA-256 of the 256-bit secret; `key_id` is its public part."""

    __tablename__ = "api_key"

    tenant_id: Mapped[str] = tenant_column()
    key_id: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary)
    name: Mapped[str]
    scopes: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]

    __table_args__ = (UniqueConstraint("key_id"),)


class BoardSession(Base):
    """Somebody who has logged in to the job board with a key; `digest` is the SHA-256 of the cookie's token."""

    __tablename__ = "board_session"

    tenant_id: Mapped[str] = tenant_column()
    digest: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    key_id: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    expires_at: Mapped[datetime]

    __table_args__ = (
        UniqueConstraint("digest"),
        ForeignKeyConstraint(["tenant_id", "key_id"], ["api_key.tenant_id", "api_key.key_id"], ondelete="CASCADE"),
        Index("board_session_key_idx", "tenant_id", "key_id"),
    )


class File(Base):
    """An uploaded file (`store_path`), or one rendered from the result rows of `rendered_job_id`."""

    __tablename__ = "file"

    tenant_id: Mapped[str] = tenant_column()
    file_id: Mapped[UUID] = mapped_column(primary_key=True)
    purpose: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int]
    sha256: Mapped[str | None]
    store_path: Mapped[str | None]
    index_path: Mapped[str | None]
    lines: Mapped[int | None]
    validation: Mapped[dict[str, Any] | None]
    rendered_job_id: Mapped[UUID | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]

    __table_args__ = (
        UniqueConstraint("file_id"),
        Index("file_page_idx", "tenant_id", "created_at", "file_id", postgresql_where=text("deleted_at IS NULL")),
        Index("file_expiry_idx", "expires_at", postgresql_where=text("deleted_at IS NULL")),
        Index(
            "file_removable_idx",
            "file_id",
            postgresql_where=text("deleted_at IS NOT NULL AND store_path IS NOT NULL"),
        ),
        Index("file_rendered_idx", "rendered_job_id", postgresql_where=text("rendered_job_id IS NOT NULL")),
    )


class Job(Base):
    """What a producer submitted. Counters are final only in a terminal state; before, they are sums over slices."""

    __tablename__ = "job"

    tenant_id: Mapped[str] = tenant_column()
    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    kind: Mapped[str]
    state: Mapped[str]
    created_on: Mapped[date] = mapped_column(Date)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    started_at: Mapped[datetime | None]
    in_progress_at: Mapped[datetime | None]
    finalizing_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]
    deadline: Mapped[datetime | None]
    is_urgent: Mapped[bool] = mapped_column(server_default="false")
    stop_reason: Mapped[str | None]
    key_id: Mapped[str | None]
    idempotency_key: Mapped[str | None]
    model: Mapped[str | None]
    endpoint: Mapped[str | None]
    priority: Mapped[int] = mapped_column(SmallInteger, server_default="5")
    spec: Mapped[dict[str, Any]]
    job_metadata: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    input_file_id: Mapped[UUID | None]
    output_file_id: Mapped[UUID | None]
    error_file_id: Mapped[UUID | None]
    errors: Mapped[list[Any] | None]
    error: Mapped[dict[str, Any] | None]
    outcome: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    """What came of it beside results: of a training job, its data, its hyperparameters, its model."""
    total: Mapped[int] = mapped_column(server_default="0")
    completed: Mapped[int] = mapped_column(server_default="0")
    failed: Mapped[int] = mapped_column(server_default="0")
    input_tokens: Mapped[int] = mapped_column(server_default="0")
    output_tokens: Mapped[int] = mapped_column(server_default="0")
    device_seconds: Mapped[float] = mapped_column(server_default="0")
    gate_reason: Mapped[str | None]
    """Why it may not run now (`shared.domain.scheduling.gates`); its slices are held."""
    gate_until: Mapped[datetime | None]
    gate_review_at: Mapped[datetime | None]

    __table_args__ = (
        UniqueConstraint("job_id"),
        ForeignKeyConstraint(["tenant_id", "input_file_id"], ["file.tenant_id", "file.file_id"]),
        CheckConstraint("priority BETWEEN 0 AND 9", name="priority"),
        Index("job_page_idx", "tenant_id", "kind", "created_at", "job_id"),
        Index("job_key_idx", "tenant_id", "idempotency_key", postgresql_where=text("idempotency_key IS NOT NULL")),
        Index(
            "job_open_idx",
            "state",
            "created_at",
            postgresql_where=text("state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')"),
        ),
        Index("job_day_idx", "created_on"),
        Index(
            "job_tenant_page_idx",
            "tenant_id",
            "created_at",
            "job_id",
            postgresql_where=text("kind <> 'online'"),
        ),
        Index("job_all_page_idx", "created_at", "job_id", postgresql_where=text("kind <> 'online'")),
        Index("job_ended_idx", "ended_at"),
        Index("job_urgent_idx", "deadline", postgresql_where=text("is_urgent AND state IN ('queued', 'running')")),
        Index(
            "job_deadline_idx",
            "deadline",
            postgresql_where=text("deadline IS NOT NULL AND state IN ('queued', 'running')"),
        ),
        Index(
            "job_gate_idx",
            "gate_review_at",
            postgresql_where=text(
                "gate_review_at IS NOT NULL AND state IN ('validating', 'queued', 'running', 'paused')"
            ),
        ),
        Index(
            "job_dependent_idx",
            "job_id",
            postgresql_where=text(
                "gate_reason = 'dependency' AND state IN ('validating', 'queued', 'running', 'paused')"
            ),
        ),
    )


class JobParent(Base):
    """A job that another one follows: it begins when all of these have succeeded."""

    __tablename__ = "job_parent"

    tenant_id: Mapped[str] = tenant_column()
    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    parent_id: Mapped[UUID] = mapped_column(primary_key=True)

    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"]),
        ForeignKeyConstraint(["tenant_id", "parent_id"], ["job.tenant_id", "job.job_id"]),
        Index("job_parent_parent_idx", "parent_id"),
    )


class Slice(Base):
    """The lease unit: lines `[lo, hi)` of a job. Terminal states are done, dead and cancelled."""

    __tablename__ = "slice"

    tenant_id: Mapped[str] = tenant_column()
    slice_id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    job_id: Mapped[UUID]
    created_on: Mapped[date] = mapped_column(Date)
    kind: Mapped[str] = mapped_column(server_default="generate")
    lo: Mapped[int] = mapped_column(Integer)
    hi: Mapped[int] = mapped_column(Integer)
    state: Mapped[str]
    slice_class: Mapped[int] = mapped_column(SmallInteger, server_default="2")
    priority: Mapped[int] = mapped_column(SmallInteger, server_default="5")
    model: Mapped[str | None]
    estimated_tokens: Mapped[int] = mapped_column(server_default="0")
    devices_needed: Mapped[int] = mapped_column(SmallInteger, server_default="1")
    run_after: Mapped[datetime] = mapped_column(server_default=NOW)
    stop_reason: Mapped[str | None]
    lease_token: Mapped[int | None]
    worker_id: Mapped[UUID | None]
    lease_until: Mapped[datetime | None]
    progress_at: Mapped[datetime | None]
    claimed_at: Mapped[datetime | None]
    claimed_done: Mapped[int] = mapped_column(Integer, server_default="0")
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    losses: Mapped[int] = mapped_column(Integer, server_default="0")
    failures: Mapped[int] = mapped_column(Integer, server_default="0")
    """Tries that failed without progress, one after another."""
    dispatch_no: Mapped[int] = mapped_column(Integer, server_default="0")
    dispatched_at: Mapped[datetime | None]
    completed: Mapped[int] = mapped_column(Integer, server_default="0")
    failed: Mapped[int] = mapped_column(Integer, server_default="0")
    output_bytes: Mapped[int] = mapped_column(server_default="0")
    error_bytes: Mapped[int] = mapped_column(server_default="0")
    input_tokens: Mapped[int] = mapped_column(server_default="0")
    output_tokens: Mapped[int] = mapped_column(server_default="0")
    device_seconds: Mapped[float] = mapped_column(server_default="0")
    last_error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)

    __table_args__ = (
        UniqueConstraint("slice_id"),
        ForeignKeyConstraint(["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"]),
        CheckConstraint("lo < hi", name="range"),
        Index("slice_job_idx", "job_id"),
        Index("slice_first_idx", "job_id", "slice_id", postgresql_where=text("state = 'queued'")),
        Index(
            "slice_queue_rank_idx",
            "tenant_id",
            "slice_class",
            text("queue_rank(priority, created_at)"),
            "slice_id",
            postgresql_where=text("state = 'queued'"),
        ),
        Index(
            "slice_train_rank_idx",
            "tenant_id",
            "slice_class",
            text("queue_rank(priority, created_at)"),
            "slice_id",
            postgresql_where=text("state = 'queued' AND kind = 'train'"),
        ),
        Index("slice_worker_idx", "worker_id", postgresql_where=text("state IN ('dispatched', 'running')")),
        Index("slice_lease_idx", "lease_until", postgresql_where=text("state = 'running'")),
    )


class Result(Base):
    """One finished line, insert-only. `created_on` is the job's day: a job's results lie in one partition.

    `body` is the JSON text of the response and `error` that of a failure without a response, as they are rendered.
    There is no foreign key: every row is inserted from the locked slice row (`shared.db.slices.record`), and a
    check of each of 10⁸ rows would buy nothing more (docs/adr/0003).
    """

    __tablename__ = "result"

    created_on: Mapped[date] = mapped_column(Date, primary_key=True)
    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    line_no: Mapped[int] = mapped_column(Integer, primary_key=True)
    tenant_id: Mapped[str]
    slice_id: Mapped[int]
    lease_token: Mapped[int]
    custom_id: Mapped[str]
    status_code: Mapped[int | None] = mapped_column(SmallInteger)
    body: Mapped[str | None]
    error: Mapped[str | None]
    input_tokens: Mapped[int] = mapped_column(Integer)
    output_tokens: Mapped[int] = mapped_column(Integer)
    recorded_at: Mapped[datetime] = mapped_column(server_default=NOW)

    __table_args__ = (
        Index(
            "result_failed_idx",
            "created_on",
            "job_id",
            "line_no",
            postgresql_where=text("status_code IS DISTINCT FROM 200"),
        ),
        {"postgresql_partition_by": "RANGE (created_on)"},
    )


class Attempt(Base):
    """One try of a slice: the task metadata."""

    __tablename__ = "attempt"

    tenant_id: Mapped[str] = tenant_column()
    attempt_id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    job_id: Mapped[UUID]
    slice_id: Mapped[int]
    lease_token: Mapped[int]
    task_id: Mapped[str]
    worker_id: Mapped[UUID]
    worker: Mapped[str]
    device: Mapped[str]
    started_at: Mapped[datetime] = mapped_column(server_default=NOW)
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None]
    error: Mapped[str | None]
    traceback: Mapped[str | None]

    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"]),
        Index("attempt_job_idx", "job_id", "attempt_id"),
        Index("attempt_token_idx", "lease_token", postgresql_where=text("ended_at IS NULL")),
        Index("attempt_ended_idx", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
    )


class Worker(Base):
    """One worker process; a restarted one is another row, with a fresh id (Procrastinate #1518)."""

    __tablename__ = "worker"

    tenant_id: Mapped[str] = tenant_column()
    worker_id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    host: Mapped[str]
    pid: Mapped[int]
    device: Mapped[str]
    state: Mapped[str]
    slots: Mapped[int] = mapped_column(Integer)
    models: Mapped[list[Any]] = mapped_column(server_default="[]")
    stats: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    started_at: Mapped[datetime] = mapped_column(server_default=NOW)
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=NOW)

    __table_args__ = (Index("worker_live_idx", "heartbeat_at", postgresql_where=text("state <> 'lost'")),)


class DeviceLease(Base):
    """Who owns a device now: one row a device, taken at a worker's start and by jobs that need several.

    `slice_id` and `lease_token` say who has taken it, `call` what the worker is to do (`shared.db.devices`).
    """

    __tablename__ = "device_lease"

    tenant_id: Mapped[str] = tenant_column(primary=False)
    host: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(primary_key=True)
    worker_id: Mapped[UUID]
    slice_id: Mapped[int | None]
    lease_until: Mapped[datetime]
    lease_token: Mapped[int | None]
    call: Mapped[dict[str, Any] | None]


class Event(Base):
    """What happened to a job. Readers go by (transaction_id, event_id): ids alone are not in the order of commits."""

    __tablename__ = "event"

    tenant_id: Mapped[str] = tenant_column()
    event_id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    job_id: Mapped[UUID]
    type: Mapped[str]
    level: Mapped[str] = mapped_column(server_default="info")
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    transaction_id: Mapped[int] = mapped_column(server_default=text("(pg_current_xact_id()::text)::bigint"))

    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"]),
        Index("event_job_idx", "job_id", "transaction_id", "event_id"),
        Index(
            "event_told_idx",
            "job_id",
            "transaction_id",
            "event_id",
            postgresql_where=text("type IN ('status', 'message')"),
        ),
    )


class Checkpoint(Base):
    __tablename__ = "checkpoint"

    tenant_id: Mapped[str] = tenant_column()
    checkpoint_id: Mapped[UUID] = mapped_column(primary_key=True)
    job_id: Mapped[UUID]
    step: Mapped[int]
    store_path: Mapped[str]
    sha256: Mapped[str]
    lease_token: Mapped[int]
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)

    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"]),
        UniqueConstraint("job_id", "step", "lease_token"),
    )


class Model(Base):
    """A model that may be served by `name`. Those of the system tenant serve everybody.

    Of an adapter, also of a multi-task one, `base` is the model that it changes, by the name that it has for this
    tenant. `heads`: of a multi-task model, its tasks' names and kinds.
    """

    __tablename__ = "model"

    tenant_id: Mapped[str] = tenant_column()
    name: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    base: Mapped[str | None]
    source: Mapped[str]
    revision: Mapped[str | None]
    dtype: Mapped[str]
    context_length: Mapped[int | None] = mapped_column(Integer)
    weight_bytes: Mapped[int | None]
    pinned: Mapped[bool] = mapped_column(Boolean, server_default="false")
    heads: Mapped[list[Any] | None] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)

    __table_args__ = (
        CheckConstraint(
            "CASE kind WHEN 'adapter' THEN base IS NOT NULL WHEN 'multi_task' THEN true ELSE base IS NULL END",
            name="base",
        ),
    )


class Usage(Base):
    """Written once, in the transaction that finalizes the job."""

    __tablename__ = "usage"

    tenant_id: Mapped[str] = tenant_column()
    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    key_id: Mapped[str | None]
    model: Mapped[str | None]
    kind: Mapped[str]
    requests: Mapped[int]
    input_tokens: Mapped[int]
    output_tokens: Mapped[int]
    device_seconds: Mapped[float]
    recorded_at: Mapped[datetime] = mapped_column(server_default=NOW)

    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"]),
        Index("usage_time_idx", "tenant_id", "recorded_at"),
        Index("usage_all_time_idx", "recorded_at"),
    )


class OnlineUsage(Base):
    """Online calls by the hour, in UTC, in which they were recorded; counted in that transaction."""

    __tablename__ = "online_usage"

    tenant_id: Mapped[str] = tenant_column()
    hour: Mapped[datetime] = mapped_column(primary_key=True)
    key_id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int]
    input_tokens: Mapped[int]
    output_tokens: Mapped[int]
    device_seconds: Mapped[float]

    __table_args__ = (Index("online_usage_hour_idx", "hour"),)


class DeviceUse(Base):
    """Device seconds of slices that ended on a worker in an hour, kept for two days: what budgets are counted from.

    Written by a trigger on `slice`; by worker, so that a tenant's workers do not wait for each other.
    """

    __tablename__ = "device_use"

    tenant_id: Mapped[str] = tenant_column()
    hour: Mapped[datetime] = mapped_column(primary_key=True)
    worker_id: Mapped[UUID] = mapped_column(primary_key=True)
    seconds: Mapped[float]


class Forecast(Base):
    """When an open job is expected to begin and end; made again every few seconds (`services.scheduler.forecaster`)."""

    __tablename__ = "forecast"

    tenant_id: Mapped[str] = tenant_column()
    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    starts_at: Mapped[datetime | None]
    ends_at: Mapped[datetime | None]
    on_time: Mapped[bool | None]
    is_measured: Mapped[bool]
    """Whether its speed was measured, on itself or on earlier jobs, and not guessed."""
    seconds_left: Mapped[float]
    """How long what is left of it takes on as many workers as it can use."""
    starts_by: Mapped[datetime | None]
    """When it must begin at the latest to meet its deadline, should it take longer than expected."""

    __table_args__ = (
        UniqueConstraint("job_id"),
        ForeignKeyConstraint(["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"]),
    )


class ForecastBlock(Base):
    """A worker's expected time with one job."""

    __tablename__ = "forecast_block"

    tenant_id: Mapped[str] = tenant_column()
    worker_id: Mapped[UUID] = mapped_column(primary_key=True)
    starts_at: Mapped[datetime] = mapped_column(primary_key=True)
    ends_at: Mapped[datetime]
    job_id: Mapped[UUID]

    __table_args__ = (ForeignKeyConstraint(["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"]),)


class ForecastBasis(Base):
    """What the newest forecast was made of, without names: one row, of the system tenant."""

    __tablename__ = "forecast_basis"

    tenant_id: Mapped[str] = tenant_column()
    made_at: Mapped[datetime]
    basis: Mapped[dict[str, Any]]


class Idempotency(Base):
    """The first answer given under a key, kept as long as results. Text: JSONB cannot hold every JSON string."""

    __tablename__ = "idempotency"

    tenant_id: Mapped[str] = tenant_column()
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    status: Mapped[int] = mapped_column(SmallInteger)
    response: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)

    __table_args__ = (Index("idempotency_created_idx", "created_at"),)


class Webhook(Base):
    """A target that an admin registered for a tenant. `disabled_at`: it answered that it is gone for good."""

    __tablename__ = "webhook"

    tenant_id: Mapped[str] = tenant_column()
    webhook_id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    url: Mapped[str]
    secret_hint: Mapped[str]
    events: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    updated_at: Mapped[datetime] = mapped_column(server_default=NOW)
    disabled_at: Mapped[datetime | None]

    __table_args__ = (UniqueConstraint("webhook_id"),)


def _of_webhook() -> ForeignKeyConstraint:
    columns = ["tenant_id", "webhook_id"], ["webhook.tenant_id", "webhook.webhook_id"]
    return ForeignKeyConstraint(*columns, ondelete="CASCADE")


class WebhookSecret(Base):
    """What a target's deliveries are signed with; one that was rotated out may sign on until it expires.

    Only the scheduler can read it.
    """

    __tablename__ = "webhook_secret"

    tenant_id: Mapped[str] = tenant_column()
    webhook_id: Mapped[UUID] = mapped_column(primary_key=True)
    secret: Mapped[str] = mapped_column(primary_key=True)
    expires_at: Mapped[datetime | None]

    __table_args__ = (_of_webhook(),)


class WebhookDelivery(Base):
    """An event on its way to one target: the outbox, written by the transaction that ends the job (a trigger)."""

    __tablename__ = "webhook_delivery"

    tenant_id: Mapped[str] = tenant_column()
    delivery_id: Mapped[UUID] = mapped_column(primary_key=True, server_default=text("gen_random_uuid()"))
    webhook_id: Mapped[UUID]
    event_type: Mapped[str]
    job_id: Mapped[UUID]
    """`shared.domain.webhooks.SAMPLE_JOB`: a test."""
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    state: Mapped[str] = mapped_column(server_default="waiting")
    next_at: Mapped[datetime]
    attempts: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    status_code: Mapped[int | None] = mapped_column(SmallInteger)
    error: Mapped[str | None]
    ended_at: Mapped[datetime | None]

    __table_args__ = (
        _of_webhook(),
        UniqueConstraint("delivery_id"),
        CheckConstraint("state IN ('waiting', 'delivered', 'failed')", name="state"),
        Index("webhook_delivery_due_idx", "webhook_id", "next_at", postgresql_where=text("state = 'waiting'")),
        Index("webhook_delivery_list_idx", "webhook_id", "created_at", "delivery_id"),
        Index("webhook_delivery_old_idx", "ended_at", postgresql_where=text("state <> 'waiting'")),
    )


class Schedule(Base):
    """A job that begins again and again. `next_at`: its next slot that nobody has looked at."""

    __tablename__ = "schedule"

    tenant_id: Mapped[str] = tenant_column()
    schedule_id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    cron: Mapped[str]
    tz: Mapped[str]
    kind: Mapped[str]
    spec: Mapped[dict[str, Any]]
    overlap: Mapped[str]
    deadline_seconds: Mapped[float | None]
    key_id: Mapped[str]
    """Whose key made it, or last changed it: its jobs are accounted to that."""
    is_active: Mapped[bool] = mapped_column(server_default="true")
    next_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    updated_at: Mapped[datetime] = mapped_column(server_default=NOW)

    __table_args__ = (
        UniqueConstraint("schedule_id"),
        CheckConstraint("kind IN ('batch', 'fine_tuning', 'training')", name="kind"),
        CheckConstraint("overlap IN ('allow', 'skip')", name="overlap"),
        Index("schedule_due_idx", "next_at", postgresql_where=text("is_active")),
    )


def _of_schedule() -> ForeignKeyConstraint:
    columns = ["tenant_id", "schedule_id"], ["schedule.tenant_id", "schedule.schedule_id"]
    return ForeignKeyConstraint(*columns, ondelete="CASCADE")


class ScheduleRun(Base):
    """One slot, once. `missed`: slots before it of which nothing has become, and that it makes up for.

    `is_manual`: somebody asked for it. `tries` were begun and neither ended nor called off; the next is at `retry_at`.
    """

    __tablename__ = "schedule_run"

    tenant_id: Mapped[str] = tenant_column()
    schedule_id: Mapped[UUID] = mapped_column(primary_key=True)
    slot: Mapped[datetime] = mapped_column(primary_key=True)
    run_id: Mapped[UUID] = mapped_column(server_default=text("gen_random_uuid()"))
    is_manual: Mapped[bool] = mapped_column(server_default="false")
    missed: Mapped[int] = mapped_column(Integer, server_default="0")
    state: Mapped[str] = mapped_column(server_default="due")
    job_id: Mapped[UUID | None]
    error: Mapped[dict[str, Any] | None]
    """Why there is no job, or none yet."""
    tries: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    retry_at: Mapped[datetime] = mapped_column(server_default=NOW)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    ended_at: Mapped[datetime | None]

    __table_args__ = (
        _of_schedule(),
        UniqueConstraint("run_id"),
        CheckConstraint("state IN ('due', 'submitted', 'skipped', 'failed')", name="state"),
        CheckConstraint("(state = 'submitted') = (job_id IS NOT NULL)", name="job"),
        Index("schedule_run_due_idx", "retry_at", postgresql_where=text("state = 'due'")),
        Index("schedule_run_old_idx", "ended_at", postgresql_where=text("state <> 'due'")),
    )


class ScheduleTaken(Base):
    """What a schedule's jobs have had as their input: `source`, a file of the store or a job, in one version."""

    __tablename__ = "schedule_taken"

    tenant_id: Mapped[str] = tenant_column()
    schedule_id: Mapped[UUID] = mapped_column(primary_key=True)
    source: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)

    __table_args__ = (_of_schedule(),)


class Erasure(Base):
    """The deletion of a tenant, and its report. It belongs to the system, as the tenant is no more."""

    __tablename__ = "erasure"

    tenant_id: Mapped[str] = tenant_column()
    erasure_id: Mapped[UUID] = mapped_column(primary_key=True, server_default=text("gen_random_uuid()"))
    erased_tenant: Mapped[str]
    requested_by: Mapped[str]
    requested_at: Mapped[datetime] = mapped_column(server_default=NOW)
    counts: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    problem: Mapped[str | None]
    """What it met last, if it has not ended since."""
    ended_at: Mapped[datetime | None]

    __table_args__ = (
        UniqueConstraint("erasure_id"),
        Index("erasure_open_idx", "erased_tenant", unique=True, postgresql_where=text("ended_at IS NULL")),
    )


class RetentionDay(Base):
    """How much of one kind was forgotten on a day, and was overdue at its last look (`shared.db.retention`)."""

    __tablename__ = "retention_day"

    tenant_id: Mapped[str] = tenant_column()
    day: Mapped[date] = mapped_column(primary_key=True)
    what: Mapped[str] = mapped_column(primary_key=True)
    deleted: Mapped[int] = mapped_column(server_default="0")
    overdue: Mapped[int] = mapped_column(server_default="0")
    checked_at: Mapped[datetime | None]


class AuditFinding(Base):
    """An invariant that did not hold when the auditor looked; there should be none."""

    __tablename__ = "audit_finding"

    tenant_id: Mapped[str] = tenant_column()
    finding_id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    job_id: Mapped[UUID | None]
    invariant: Mapped[str]
    detail: Mapped[str]
    found_at: Mapped[datetime] = mapped_column(server_default=NOW)

    __table_args__ = (UniqueConstraint("tenant_id", "job_id", "invariant", postgresql_nulls_not_distinct=True),)
