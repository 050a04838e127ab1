"""Webhook endpoints, as OpenAI's SDKs manage them; the scheduler sends what is delivered to them, tests too."""

import asyncio
import time
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Connection
from starlette.responses import Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import Admin, IdempotencyKey, Parts, PartsDependency, Reader, answer_once
from services.gateway.schemas import (
    WebhookCreate,
    WebhookPatch,
    WebhookRotation,
    WebhookTest,
    list_page,
    short_page,
)
from shared.db import webhooks
from shared.db.submissions import body_digest
from shared.db.tenants import Caller
from shared.db.webhooks import DeliveryView
from shared.domain.errors import InvalidRequest, NotFound, Unavailable
from shared.domain.job import public_job_id
from shared.domain.webhooks import EVENT_PREFIX, EVENT_TYPES, SAMPLE_JOB, check_url, event_id, event_kind, new_secret

TEST_POLL_SECONDS = 0.2
TEST_SLACK_SECONDS = 5.0
"""A test waits so much longer for the scheduler than one delivery may take."""
router = APIRouter(prefix="/v1", route_class=KeyedRoute)


@router.get("/webhook_event_types")
def list_event_types(caller: Reader) -> dict[str, Any]:  # noqa: ARG001  # a key is needed, whichever
    """List the events that a target may ask for."""
    return {"object": "list", "data": list(EVENT_TYPES)}


@router.post("/webhook_endpoints")
def create_webhook(body: WebhookCreate, parts: PartsDependency, caller: Admin, key: IdempotencyKey) -> Response:
    """Register a target and show its signing secret, this once.

    A request repeated under its Idempotency-Key makes no second target and gets the first answer with
    `"signing_secret": null`. Whoever lost the first answer has the secret rotated.
    """
    _check_url(parts, body.url)
    tenant_id, secret = body.tenant or caller.tenant_id, new_secret()

    def create(connection: Connection) -> dict[str, Any]:
        events = list(dict.fromkeys(body.event_types))
        webhook_id = webhooks.create(connection, tenant_id, name=body.name, url=body.url, events=events, secret=secret)
        return _object(webhooks.get(connection, webhook_id))

    shown = {"signing_secret": secret}
    return answer_once(parts, caller, key, body_digest("webhook", body), create, as_admin=True, shown_once=shown)


@router.get("/webhook_endpoints")
def list_webhooks(
    parts: PartsDependency, caller: Admin, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> dict[str, Any]:
    """List targets, without their secrets."""
    with parts.transaction(caller) as connection:
        found = webhooks.listing(connection)
    return short_page([_object(each) for each in found], limit, after)


@router.get("/webhook_endpoints/{webhook_endpoint_id}")
def get_webhook(webhook_endpoint_id: str, parts: PartsDependency, caller: Admin) -> dict[str, Any]:
    """Return a target, without its secrets."""
    with parts.transaction(caller) as connection:
        return _object(webhooks.get(connection, webhooks.ID.parse(webhook_endpoint_id)))


@router.post("/webhook_endpoints/{webhook_endpoint_id}")
def change_webhook(
    webhook_endpoint_id: str, body: WebhookPatch, parts: PartsDependency, caller: Admin, key: IdempotencyKey
) -> Response:
    """Change what is given; a target that was disabled takes events again."""
    if body.url is not None:
        _check_url(parts, body.url)
    webhook_id = webhooks.ID.parse(webhook_endpoint_id)
    events = list(dict.fromkeys(body.event_types)) if body.event_types else None

    def change(connection: Connection) -> dict[str, Any]:
        webhooks.change(connection, webhook_id, {"name": body.name, "url": body.url, "events": events})
        return _object(webhooks.get(connection, webhook_id))

    digest = body_digest("webhook change", {"webhook": webhook_id.hex} | body.model_dump())
    return answer_once(parts, caller, key, digest, change, as_admin=True)


@router.delete("/webhook_endpoints/{webhook_endpoint_id}")
def delete_webhook(webhook_endpoint_id: str, parts: PartsDependency, caller: Admin) -> dict[str, Any]:
    """Forget a target; what it was not told yet, it is not told."""
    with parts.transaction(caller) as connection:
        webhooks.delete(connection, webhooks.ID.parse(webhook_endpoint_id))
    return {"id": webhook_endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True}


@router.post("/webhook_endpoints/{webhook_endpoint_id}/rotate_secret")
def rotate_secret(
    webhook_endpoint_id: str,
    parts: PartsDependency,
    caller: Admin,
    key: IdempotencyKey,
    body: WebhookRotation | None = None,
) -> Response:
    """Sign with a new secret, shown this once; for a day with the old one too where that is asked for."""
    webhook_id, secret = webhooks.ID.parse(webhook_endpoint_id), new_secret()
    keep_old = body is not None and body.keep_old_secret_active_for_24_hours

    def rotate(connection: Connection) -> dict[str, Any]:
        webhooks.rotate_secret(connection, webhook_id, secret, keep_old=keep_old)
        return _object(webhooks.get(connection, webhook_id))

    digest = body_digest("webhook rotation", {"webhook": webhook_id.hex, "keep_old": keep_old})
    return answer_once(parts, caller, key, digest, rotate, as_admin=True, shown_once={"signing_secret": secret})


@router.post("/webhook_endpoints/{webhook_endpoint_id}/test")
async def test_webhook(
    webhook_endpoint_id: str, body: WebhookTest, parts: PartsDependency, caller: Admin
) -> dict[str, Any]:
    """Send a sample event once and say what the target answered; 400 `webhook_unreachable` where nothing did."""
    webhook_id = webhooks.ID.parse(webhook_endpoint_id)
    sent = await run_in_threadpool(_send_test, parts, caller, webhook_id, body.event_type)
    until = time.monotonic() + parts.settings.webhook_timeout_seconds + TEST_SLACK_SECONDS
    while time.monotonic() < until:
        await asyncio.sleep(TEST_POLL_SECONDS)
        found = await run_in_threadpool(_look, parts, caller, sent)
        if found is None:
            raise NotFound("The webhook endpoint was deleted meanwhile.", param="webhook_endpoint_id")
        if found.status_code is not None:
            return {
                "object": "webhook_endpoint.test",
                "webhook_endpoint_id": webhook_endpoint_id,
                "event_type": body.event_type,
                "status_code": found.status_code,
                "success": True,
            }
        if found.state == "failed":
            raise InvalidRequest(found.error or "Nothing answered.", code="webhook_unreachable")
    raise Unavailable("The scheduler, which sends webhooks, has not done so in time.")


def _send_test(parts: Parts, caller: Caller, webhook_id: UUID, event_type: str) -> UUID:
    with parts.transaction(caller) as connection:
        return webhooks.add_test(connection, webhook_id, event_type)


def _look(parts: Parts, caller: Caller, delivery_id: UUID) -> DeliveryView | None:
    with parts.transaction(caller) as connection:
        return webhooks.delivery(connection, delivery_id)


@router.get("/webhook_endpoints/{webhook_endpoint_id}/deliveries")
def list_deliveries(
    webhook_endpoint_id: str,
    parts: PartsDependency,
    caller: Admin,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> dict[str, Any]:
    """List what was sent, or is to be, newest first: with tries, the last answer or failure, and the next try."""
    last = _event_id(after) if after else None
    with parts.transaction(caller) as connection:
        webhook_id = webhooks.get(connection, webhooks.ID.parse(webhook_endpoint_id))["webhook_id"]
        found = webhooks.deliveries(connection, webhook_id, after=last, limit=limit + 1)
    return list_page([_delivery(each) for each in found[:limit]], has_more=len(found) > limit)


def _event_id(text: str) -> UUID:
    try:
        if text.startswith(EVENT_PREFIX):
            return UUID(hex=text.removeprefix(EVENT_PREFIX))
    except ValueError:
        pass
    raise InvalidRequest("after: is not an id of this list.", param="after", code="invalid_value")


def _delivery(view: DeliveryView) -> dict[str, Any]:
    is_waiting = view.state == "waiting"
    return {
        "id": event_id(view.delivery_id),
        "object": "webhook_endpoint.delivery",
        "event_type": view.event_type,
        "job": None if view.job_id == SAMPLE_JOB else public_job_id(event_kind(view.event_type), view.job_id),
        "status": view.state,
        "attempts": view.attempts,
        "status_code": view.status_code,
        "error": view.error,
        "created_at": view.created_at,
        "next_attempt_at": view.next_at if is_waiting else None,
        "ended_at": view.ended_at,
    }


def _check_url(parts: Parts, url: str) -> None:
    try:
        check_url(url, parts.settings.webhook_networks)
    except ValueError as error:
        raise InvalidRequest(f"url: {error}.", param="url", code="invalid_value") from None


def _object(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": webhooks.ID.show(row["webhook_id"]),
        "object": "webhook_endpoint",
        "created_at": row["created_at"],
        "updated_at": row["updated_at"],
        "event_types": row["events"],
        "name": row["name"],
        "url": row["url"],
        "signing_secret_hint": row["secret_hint"],
        "tenant": row["tenant_id"],
        "is_active": row["disabled_at"] is None,
    }
