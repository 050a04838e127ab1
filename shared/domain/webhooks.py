"""Webhooks: which events there are, how a delivery is signed and repeated, and where one may go. Pure.

Signatures follow the Standard Webhooks scheme, so OpenAI's `client.webhooks.unwrap()` accepts them.
"""

import base64
import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Sequence
from random import Random
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from shared.domain.job import JobKind, public_job_id

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

OPENAI_EVENTS = (
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
)
EVENT_TYPES = (*OPENAI_EVENTS, "training.job.succeeded", "training.job.failed", "training.job.cancelled")
"""OpenAI's names, and by the same pattern those of multi-task training."""
EVENT_PREFIX = "evt_"
SAMPLE_JOB = UUID(int=0)
"""What a test delivery tells of; no job has this id."""

SECRET_PREFIX = "whsec_"  # noqa: S105  # no secret
SECRET_BYTES = 32
OVERLAP_SECONDS = 24 * 3600
"""How long a secret that was rotated out still signs, where that is asked for."""

RETRY_SECONDS = (5, 60, 300, 1800, 7200, 18_000, 36_000, 43_200, 64_800, 86_400)
"""Pauses after each failure: three days in all. After the last the delivery has failed."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def event_kind(event_type: str) -> JobKind:
    """Return the kind of job that an event tells of."""
    return JobKind(event_type.split(".", maxsplit=1)[0])


def new_secret() -> str:
    """Return a signing secret in the form that Standard Webhooks' libraries take."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def secret_hint(secret: str) -> str:
    """Return what tells one secret from another and gives nothing away."""
    return f"{SECRET_PREFIX}…{secret[-4:]}"


def event_id(delivery_id: UUID) -> str:
    return f"{EVENT_PREFIX}{delivery_id.hex}"


def event_body(delivery_id: UUID, event_type: str, created_at: int, job_id: UUID) -> dict[str, Any]:
    """Return an event in OpenAI's shape."""
    return {
        "id": event_id(delivery_id),
        "object": "event",
        "created_at": created_at,
        "type": event_type,
        "data": {"id": public_job_id(event_kind(event_type), job_id)},
    }


def signed_headers(delivery_id: UUID, timestamp: int, body: bytes, keys: Sequence[str]) -> dict[str, str]:
    """Return the headers of a delivery, signed with every key that is valid now.

    The id is the same at every try, so that a receiver can tell a repetition; the timestamp is that of the try.
    """
    message_id = f"wh_{delivery_id.hex}"
    signed = b".".join((message_id.encode(), str(timestamp).encode(), body))
    signatures = []
    for key in keys:
        secret = base64.b64decode(key.removeprefix(SECRET_PREFIX))
        signatures.append("v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode())
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }


def retry_seconds(failures: int, seed: int) -> float | None:
    """Return how long to wait after so many failures, a tenth more or less; None: it is given up."""
    if failures > len(RETRY_SECONDS):
        return None
    jitter = 0.9 + Random(seed * 1_000_003 + failures).random() / 5  # noqa: S311  # no secret
    return RETRY_SECONDS[failures - 1] * jitter


def check_url(url: str, allowed: Sequence[IPNetwork] = ()) -> None:
    """Raise ValueError for a URL that nothing would be sent to, whatever its host's name stands for today."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError("it is not a URL") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it must be an http or https URL with a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("it must hold no credentials; deliveries are signed")
    if parts.fragment or url.endswith("#"):
        raise ValueError("it must have no fragment")
    if port == 0 or not url.isascii() or not url.isprintable() or any(character in url for character in " \\"):
        raise ValueError("it holds characters or a port that no request can have")
    address = _literal(parts.hostname)
    if address is not None and not may_reach(address, allowed):
        raise ValueError("its address is private, and not among the networks that are allowed")


def _literal(host: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def may_reach(address: IPAddress, allowed: Sequence[IPNetwork]) -> bool:
    """Return whether a delivery may go to an address: a public one, or one of the networks that are allowed.

    An IPv6 address that leads to an IPv4 address is judged by that.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(address.packed[-4:])
        if inner is not None:
            return may_reach(inner, allowed)
    if any(address in network for network in allowed):
        return True
    return address.is_global and not address.is_multicast
