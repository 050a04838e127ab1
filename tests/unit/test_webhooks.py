"""Deliveries are signed as Standard Webhooks has it, repeated for three days, and go to public addresses only."""

import json
import time
from ipaddress import ip_address, ip_network
from uuid import uuid4

import openai
import pytest
import standardwebhooks

from shared.domain.webhooks import (
    EVENT_TYPES,
    RETRY_SECONDS,
    check_url,
    event_body,
    event_kind,
    may_reach,
    new_secret,
    retry_seconds,
    secret_hint,
    signed_headers,
)

JOB = uuid4()
LOOPBACK = [ip_network("127.0.0.0/8")]


def delivery(event_type="batch.completed", keys=None, timestamp=None):
    delivery_id = uuid4()
    body = json.dumps(event_body(delivery_id, event_type, 1_700_000_000, JOB)).encode()
    return body, signed_headers(delivery_id, timestamp or int(time.time()), body, keys)


@pytest.mark.parametrize("event_type", EVENT_TYPES)
def test_both_libraries_accept_a_delivery(event_type):
    secret = new_secret()
    body, headers = delivery(event_type, [secret])
    with openai.OpenAI(api_key="unused", webhook_secret=secret) as client:
        event = client.webhooks.unwrap(body, headers)
    kinds = {"batch": "batch_", "fine_tuning": "ftjob-", "training": "train_"}
    assert (event.type, event.object) == (event_type, "event")
    assert event.data.id == kinds[event_type.split(".")[0]] + JOB.hex
    assert standardwebhooks.Webhook(secret).verify(body, headers) == json.loads(body)
    assert event.id.removeprefix("evt_") == headers["webhook-id"].removeprefix("wh_")


def test_while_secrets_overlap_either_is_accepted():
    old, new = new_secret(), new_secret()
    body, headers = delivery(keys=[new, old])
    for secret in (old, new):
        standardwebhooks.Webhook(secret).verify(body, headers)


@pytest.mark.parametrize("change", ["body", "id", "time", "secret"])
def test_whatever_is_changed_it_is_refused(change):
    secret = new_secret()
    body, headers = delivery(keys=[secret], timestamp=int(time.time()) - (600 if change == "time" else 0))
    if change == "body":
        body = body.replace(b"batch_", b"other_")
    if change == "id":
        headers["webhook-id"] = "wh_other"
    if change == "secret":
        secret = new_secret()
    with openai.OpenAI(api_key="unused", webhook_secret=secret) as client:
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body, headers)


def test_a_hint_gives_little_away():
    secret = new_secret()
    assert secret_hint(secret) == f"whsec_…{secret[-4:]}" and len(secret) > 45


def test_tries_go_on_for_three_days_at_growing_distances():
    pauses = [retry_seconds(failures, seed=7) for failures in range(1, len(RETRY_SECONDS) + 1)]
    assert all(pause is not None for pause in pauses) and retry_seconds(len(RETRY_SECONDS) + 1, seed=7) is None
    assert 2.5 < sum(pauses) / 86_400 < 3.5 and pauses == sorted(pauses)
    assert pauses == [retry_seconds(failures, seed=7) for failures in range(1, len(RETRY_SECONDS) + 1)]
    assert pauses[0] != retry_seconds(1, seed=8), "not all at the same moment"


def test_each_event_belongs_to_a_kind_of_job():
    assert {event_kind(name) for name in EVENT_TYPES} == {"batch", "fine_tuning", "training"}


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "2001:db8::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::",
    ],
)  # fmt: skip
def test_what_is_not_public_is_out_of_reach(address):
    assert not may_reach(ip_address(address), [])


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_what_is_public_is_not(address):
    assert may_reach(ip_address(address), [])


def test_a_network_can_be_allowed():
    assert may_reach(ip_address("127.0.0.1"), LOOPBACK) and may_reach(ip_address("::ffff:127.0.0.1"), LOOPBACK)
    assert not may_reach(ip_address("10.0.0.1"), LOOPBACK) and not may_reach(ip_address("::1"), LOOPBACK)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://example.org/x", "http"),
        ("https:///x", "host"),
        ("file:///etc/passwd", "http"),
        ("https://user:pw@example.org/", "credentials"),
        ("https://example.org/#x", "fragment"),
        ("https://example.org:99999/", "URL"),
        ("https://example.org:0/", "port"),
        ("https://[::1/", "URL"),
        ("https://exämple.org/", "characters"),
        ("https://example.org/a b", "characters"),
        ("https://example.org/a\r\nHost: b", "characters"),
        ("http://127.0.0.1:8000/", "private"),
        ("http://[::ffff:10.0.0.1]/", "private"),
        ("http://169.254.169.254/latest/meta-data", "private"),
    ],
)
def test_urls_that_nothing_is_sent_to(url, why):
    with pytest.raises(ValueError, match=why):
        check_url(url)


def test_urls_that_are_taken():
    check_url("https://example.org/hooks?team=a")
    check_url("http://127.0.0.1:8000/", LOOPBACK)
