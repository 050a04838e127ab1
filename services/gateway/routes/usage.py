"""`/v1/usage`: requests, tokens and device seconds by hour or day, as JSON or CSV."""

import csv
import io
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from starlette.responses import JSONResponse, Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import PartsDependency, Reader
from services.gateway.schemas import list_page
from shared.api_objects import unix
from shared.db import usage
from shared.db.usage import SUMS, Bucket, Group
from shared.domain.errors import InvalidRequest

router = APIRouter(prefix="/v1", route_class=KeyedRoute)

LENGTH: dict[Bucket, timedelta] = {"hour": timedelta(hours=1), "day": timedelta(days=1)}
USUAL_BUCKETS: dict[Bucket, int] = {"hour": 24, "day": 30}
MOST_BUCKETS = 10_000
LATEST = 32_503_680_000
"""The year 3000."""

Moment = Annotated[int | None, Query(ge=0, le=LATEST, description="Unix seconds.")]


@router.get("/usage")
def list_usage(
    parts: PartsDependency,
    caller: Reader,
    start: Moment = None,
    end: Moment = None,
    bucket: Bucket = "day",
    group_by: Annotated[list[Group] | None, Query(description="Several may be named.")] = None,
    tenant: str | None = None,
    accept: Annotated[str, Header()] = "",
) -> Response:
    """Return buckets, whole ones, by UTC: from the one that `start` lies in to the one that `end` is in or ends.

    A job counts when it has ended, an online call when it was answered.
    """
    first, last = _bounds(start, end, bucket)
    groups = list(dict.fromkeys(group_by or ()))
    # An admin who names no tenant sees all; everybody else sees their own, whatever they name.
    tenant_id = tenant if caller.is_admin else caller.tenant_id
    with parts.transaction(caller) as connection:
        rows = usage.used(connection, start=first, end=last, bucket=bucket, groups=groups, tenant_id=tenant_id)
    if "text/csv" in accept:
        return Response(_csv(rows, groups, bucket), media_type="text/csv")
    return JSONResponse(list_page(_buckets(rows, first, last, bucket), has_more=False))


def _bounds(start: int | None, end: int | None, bucket: Bucket) -> tuple[datetime, datetime]:
    """Return the bounds of whole buckets; raises InvalidRequest."""
    length = LENGTH[bucket]
    until = datetime.fromtimestamp(end, UTC) if end is not None else datetime.now(UTC)
    last = _floor(until, bucket)
    last = last if last == until and end is not None else last + length
    first = (
        last - USUAL_BUCKETS[bucket] * length if start is None else _floor(datetime.fromtimestamp(start, UTC), bucket)
    )
    first = max(first, datetime.fromtimestamp(0, UTC))
    if first >= last or (start is not None and start > until.timestamp()):
        raise InvalidRequest("start: lies behind the end.", param="start", code="invalid_value")
    if (last - first) / length > MOST_BUCKETS:
        message = f"start: there are more than {MOST_BUCKETS} buckets between start and end."
        raise InvalidRequest(message, param="start", code="invalid_value")
    return first, last


def _floor(moment: datetime, bucket: Bucket) -> datetime:
    hour = moment.replace(minute=0, second=0, microsecond=0)
    return hour if bucket == "hour" else hour.replace(hour=0)


def _buckets(rows: list[dict[str, Any]], first: datetime, last: datetime, bucket: Bucket) -> list[dict[str, Any]]:
    """Return every bucket between two moments, empty ones too."""
    length, by_start = LENGTH[bucket], dict[datetime, list[dict[str, Any]]]()
    for row in rows:
        by_start.setdefault(row["at"], []).append({name: value for name, value in row.items() if name != "at"})
    starts = [first + number * length for number in range(round((last - first) / length))]
    return [
        {
            "id": f"{bucket}-{unix(each)}",
            "object": "usage.bucket",
            "start": unix(each),
            "end": unix(each + length),
            "results": by_start.get(each, []),
        }
        for each in starts
    ]


def _csv(rows: list[dict[str, Any]], groups: list[Group], bucket: Bucket) -> str:
    """Return a line for each bucket and group that has any use."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["start", "end", *groups, *SUMS])
    for row in rows:
        end = row["at"] + LENGTH[bucket]
        cells = [row["at"].isoformat(), end.isoformat(), *(_cell(row[group]) for group in groups)]
        writer.writerow([*cells, *(row[name] for name in SUMS)])
    return out.getvalue()


def _cell(value: str | None) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    text = value or ""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
