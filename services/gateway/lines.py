"""Lines of a batch's output or error file, rendered from its results as they are sent."""

from collections.abc import Iterator
from datetime import date
from uuid import UUID

from services.gateway.dependencies import Parts
from shared.db import results
from shared.db.tenants import Caller


def rendered(parts: Parts, caller: Caller, created_on: date, job_id: UUID, *, failed: bool) -> Iterator[bytes]:
    """Yield the lines that there are, a page of rows at a time; each page is a short transaction of its own."""
    after: int | None = -1
    while after is not None:
        with parts.own_transaction(caller) as connection:
            content, after = results.render_page(connection, created_on, job_id, failed=failed, after=after)
        yield content
