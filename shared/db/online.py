"""Online calls are recorded as results of one unlisted job per tenant, day, key and model, and counted like batches."""

from dataclasses import dataclass
from datetime import UTC, date, datetime
from uuid import NAMESPACE_URL, UUID, uuid5

from sqlalchemy import Connection, text

from shared.db import idempotency


@dataclass(frozen=True)
class OnlineResult:
    """What became of one call. `body` is the JSON text of the answer, an error's too."""

    call_id: str
    status_code: int
    body: str
    input_tokens: int
    output_tokens: int
    device_seconds: float
    """Its part of the device's time while it was in the engine."""
    kept_under: tuple[str, str] | None = None
    """(idempotency key, request's SHA-256) under which the answer is to be replayed."""


@dataclass(frozen=True)
class OnlineDay:
    """Whose calls of which day to which model a job holds: what usage is asked by."""

    tenant_id: str
    day: date
    key_id: str
    model: str

    @property
    def job_id(self) -> UUID:
        name = f"lamplighter:online:{self.tenant_id}:{self.day.isoformat()}:{self.key_id}:{self.model}"
        return uuid5(NAMESPACE_URL, name)


def today() -> date:
    return datetime.now(UTC).date()


# It stands as succeeded from the start: it has no slices, is never dispatched, and its results can be dropped on time.
_OPEN_JOB = text("""
    INSERT INTO job (tenant_id, job_id, kind, state, created_on, started_at, key_id, model, spec)
    VALUES (:tenant_id, :job_id, 'online', 'succeeded', :day, now(), :key_id, :model, '{}') ON CONFLICT DO NOTHING
""")

# The job's row is locked by the update, so line numbers are drawn without gaps or doubles.
_RECORD = text("""
    WITH day AS (
        UPDATE job SET total = total + :count, completed = completed + :completed,
            failed = failed + :count - :completed,
            input_tokens = input_tokens + :input_tokens, output_tokens = output_tokens + :output_tokens,
            device_seconds = device_seconds + :device_seconds
        WHERE tenant_id = :tenant_id AND job_id = :job_id
        RETURNING tenant_id, job_id, created_on, total - :count AS first, coalesce(key_id, '') AS key_id,
            coalesce(model, '') AS model
    ), hourly AS (
        INSERT INTO online_usage AS known (tenant_id, hour, key_id, model, requests, input_tokens, output_tokens,
                                           device_seconds)
        SELECT tenant_id, date_trunc('hour', now(), 'UTC'), key_id, model, :count, :input_tokens, :output_tokens,
            :device_seconds
        FROM day
        ON CONFLICT (tenant_id, hour, key_id, model) DO UPDATE SET requests = known.requests + excluded.requests,
            input_tokens = known.input_tokens + excluded.input_tokens,
            output_tokens = known.output_tokens + excluded.output_tokens,
            device_seconds = known.device_seconds + excluded.device_seconds
    )
    INSERT INTO result (created_on, job_id, line_no, tenant_id, slice_id, lease_token, custom_id, status_code, body,
                        input_tokens, output_tokens)
    SELECT created_on, job_id, first + line.position - 1, tenant_id, 0, 0, call_id, status_code, body,
        line.input_tokens, line.output_tokens
    FROM day, unnest(cast(:call_ids AS text[]), cast(:status_codes AS smallint[]), cast(:bodies AS text[]),
                     cast(:inputs AS int[]), cast(:outputs AS int[])) WITH ORDINALITY
        AS line (call_id, status_code, body, input_tokens, output_tokens, position)
    RETURNING line_no
""")


class DayGone(Exception):
    """There is no job of the day: it was not opened, or was deleted with its tenant since."""


def open_job(connection: Connection, place: OnlineDay) -> None:
    """Make the day's job if there is none yet."""
    parameters = {"tenant_id": place.tenant_id, "job_id": place.job_id, "day": place.day}
    connection.execute(_OPEN_JOB, parameters | {"key_id": place.key_id, "model": place.model})


def record(connection: Connection, place: OnlineDay, results: list[OnlineResult]) -> int:
    """Record results and count them; return the number of the last one's line. Raises DayGone without the day's job.

    Answers that are to be replayed are kept under their idempotency keys, where nobody was first.
    """
    parameters = {
        "tenant_id": place.tenant_id,
        "job_id": place.job_id,
        "count": len(results),
        "completed": sum(result.status_code == 200 for result in results),
        "input_tokens": sum(result.input_tokens for result in results),
        "output_tokens": sum(result.output_tokens for result in results),
        "device_seconds": sum(result.device_seconds for result in results),
        "call_ids": [result.call_id for result in results],
        "status_codes": [result.status_code for result in results],
        "bodies": [result.body for result in results],
        "inputs": [result.input_tokens for result in results],
        "outputs": [result.output_tokens for result in results],
    }
    lines = connection.execute(_RECORD, parameters).scalars().all()
    if len(lines) != len(results):
        raise DayGone
    for result in results:
        if result.kept_under is not None:
            key, digest = result.kept_under
            idempotency.keep_if_first(connection, place.tenant_id, key, digest, result.status_code, result.body)
    return int(max(lines))


_RECORDED = text("""
    SELECT custom_id FROM result
    WHERE created_on = :day AND job_id = :job_id AND line_no > :after AND custom_id = ANY(:call_ids)
""")


def recorded(connection: Connection, place: OnlineDay, call_ids: list[str], after_line: int) -> set[str]:
    """Return which calls were recorded after a line: what an unanswered commit has left behind."""
    parameters = {"day": place.day, "job_id": place.job_id, "after": after_line, "call_ids": call_ids}
    return set(connection.execute(_RECORDED, parameters).scalars())


_CLOSE_DAYS = text("""
    INSERT INTO usage (tenant_id, job_id, key_id, model, kind, requests, input_tokens, output_tokens, device_seconds)
    SELECT tenant_id, job_id, key_id, model, kind, total, input_tokens, output_tokens, device_seconds FROM job
    WHERE kind = 'online' AND created_on < :today AND ended_at IS NULL
        AND now() > (created_on + 1) + interval '10 minutes' ON CONFLICT DO NOTHING
""")


def close_days(connection: Connection) -> int:
    """Write the usage of days that are over, once; return how many."""
    # A call is recorded under the day on which it ends. Ten minutes' grace covers clocks that differ between hosts.
    written = connection.execute(_CLOSE_DAYS, {"today": today()}).rowcount
    connection.execute(
        text("""
            UPDATE job SET ended_at = now() WHERE kind = 'online' AND ended_at IS NULL
                AND EXISTS (SELECT FROM usage WHERE usage.job_id = job.job_id)
        """)
    )
    return int(written)
