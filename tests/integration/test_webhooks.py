"""Webhooks from a job's end to a receiver that checks signatures, past targets that fail, hang, lead away or are gone."""

import json
import socket
import socketserver
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID, uuid4

import openai
import psycopg
import pytest
from lamplighter.errors import ApiError
from sqlalchemy import text

from services.scheduler.retention import Retention
from services.scheduler.webhooks import Deliverer
from shared.db import webhooks
from shared.db.session import tenant_transaction
from shared.domain.errors import NotFound
from shared.domain.webhooks import EVENT_TYPES, new_secret
from tests.support.batches import chat_lines, make_job, rows, scalar, submit, wait_for
from tests.support.servers import wait_until

LOCAL = ["127.0.0.0/8"]


class Receiver:
    """Keeps what it gets. `statuses`: what it answers, the last one for good."""

    def __init__(self, *statuses, location=None):
        self.got, self.statuses, self.location = [], list(statuses) or [204], location
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append((body, dict(self.headers)))
                status = receiver.statuses.pop(0) if len(receiver.statuses) > 1 else receiver.statuses[0]
                self.send_response(status)
                if receiver.location:
                    self.send_header("location", receiver.location)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook?team=a"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def events(self):
        return [json.loads(body) for body, _ in self.got]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver():
    running = Receiver()
    yield running
    running.close()


def unwrap(secret, got):
    with openai.OpenAI(api_key="unused", webhook_secret=secret) as client:
        return client.webhooks.unwrap(*got)


@contextmanager
def registered(sdk, url, events=("batch.completed",), **fields):
    made = sdk.webhooks.create(name="test", url=url, event_types=list(events), **fields)
    try:
        yield made
    finally:
        sdk.webhooks.delete(made.id)


def deliveries(native, webhook_id):
    return native.request("GET", f"/v1/webhook_endpoints/{webhook_id}/deliveries")["data"]


def test_the_end_of_a_batch_is_told_once_and_signed(sdk, native, receiver):
    with registered(sdk, receiver.url) as made:
        batch = submit(sdk, chat_lines(3))
        wait_for(sdk, batch.id)
        wait_until(lambda: receiver.got, 20, "it is told")
        event = unwrap(made.signing_secret, receiver.got[0])
        assert (event.type, event.data.id) == ("batch.completed", batch.id)
        assert abs(event.created_at - sdk.batches.retrieve(batch.id).completed_at) <= 1
        (sent,) = wait_until(lambda: [d for d in deliveries(native, made.id) if d["status"] == "delivered"], 10)
        assert (sent["id"], sent["job"], sent["attempts"], sent["status_code"]) == (event.id, batch.id, 1, 204)
        time.sleep(2)
        assert len(receiver.got) == 1


def test_a_target_that_fails_is_tried_again_under_the_same_id(sdk, native):
    receiver = Receiver(500, 200)
    with registered(sdk, receiver.url, ["batch.cancelled"]) as made:
        batch = submit(sdk, chat_lines(50, delay_ms=60_000))
        sdk.batches.cancel(batch.id)
        waiting = wait_until(lambda: [d for d in deliveries(native, made.id) if d["status_code"] == 500], 20)
        assert waiting[0]["status"] == "waiting" and waiting[0]["error"] == "The answer was 500."
        assert waiting[0]["next_attempt_at"] >= waiting[0]["created_at"]
        wait_until(lambda: len(receiver.got) == 2, 20, "it is tried again")
        events = [unwrap(made.signing_secret, got) for got in receiver.got]
        assert events[0] == events[1] and events[0].type == "batch.cancelled"
        assert len({headers["webhook-id"] for _, headers in receiver.got}) == 1
        done = wait_until(lambda: [d for d in deliveries(native, made.id) if d["status"] == "delivered"], 10)
        assert done[0]["attempts"] == 2
    receiver.close()


def test_targets_are_managed_as_the_sdk_does(sdk, native, receiver):
    assert set(sdk.webhooks.event_types.list().data) == set(EVENT_TYPES)
    with registered(sdk, receiver.url) as made:
        assert made.signing_secret.startswith("whsec_") and made.signing_secret_hint.endswith(made.signing_secret[-4:])
        found = sdk.webhooks.retrieve(made.id)
        assert (found.url, found.name, found.event_types) == (receiver.url, "test", ["batch.completed"])
        assert not hasattr(found, "signing_secret")
        assert made.id in [each.id for each in sdk.webhooks.list(limit=100)]
        changed = sdk.webhooks.update(made.id, name="other", event_types=["batch.failed", "batch.failed"])
        assert (changed.name, changed.url, changed.event_types) == ("other", receiver.url, ["batch.failed"])
        tested = sdk.webhooks.test(made.id, event_type="batch.failed")
        assert (tested.status_code, tested.success, tested.webhook_endpoint_id) == (204, True, made.id)
        assert unwrap(made.signing_secret, receiver.got[-1]).type == "batch.failed"
        rotated = sdk.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        sdk.webhooks.test(made.id, event_type="batch.failed")
        for secret in (made.signing_secret, rotated.signing_secret):
            unwrap(secret, receiver.got[-1])
        last = sdk.webhooks.rotate_secret(made.id)
        sdk.webhooks.test(made.id, event_type="batch.failed")
        unwrap(last.signing_secret, receiver.got[-1])
        unwrap(made.signing_secret, receiver.got[-1])  # its day is not over
        with pytest.raises(openai.InvalidWebhookSignatureError):
            unwrap(rotated.signing_secret, receiver.got[-1])
    with pytest.raises(openai.NotFoundError):
        sdk.webhooks.retrieve(made.id)


def test_deliveries_after_one_that_is_not_there_are_none_of_a_page(sdk, native, receiver):
    with registered(sdk, receiver.url) as made, registered(sdk, receiver.url) as other:
        for target in (made, other):
            sdk.webhooks.test(target.id, event_type="batch.failed")
        (own,), (theirs,) = deliveries(native, made.id), deliveries(native, other.id)
        assert own["next_attempt_at"] is None
        listed = f"/v1/webhook_endpoints/{made.id}/deliveries"
        assert native.request("GET", listed, params={"after": own["id"]})["data"] == []
        for after in (theirs["id"], f"evt_{uuid4().hex}"):
            with pytest.raises(ApiError) as refused:
                native.request("GET", listed, params={"after": after})
            assert (refused.value.status, refused.value.param) == (404, "after")


def test_a_test_of_a_target_that_does_not_answer_says_so(sdk):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    with registered(sdk, url) as made, pytest.raises(openai.BadRequestError, match="connection failed") as refused:
        sdk.webhooks.test(made.id, event_type="batch.completed")
    assert refused.value.code == "webhook_unreachable"


def test_what_cannot_be_registered_is_refused_by_field(sdk, native, stack):
    for fields, param in (
        ({"url": "http://10.0.0.1/"}, "url"),
        ({"url": "http://169.254.169.254/latest"}, "url"),
        ({"url": "ftp://example.org/"}, "url"),
        ({"url": "https://user:secret@example.org/"}, "url"),
        ({"event_types": ["batch.done"]}, "event_types.0"),
        ({"event_types": []}, "event_types"),
        ({"name": ""}, "name"),
    ):
        asked = {"name": "n", "url": "https://example.org/", "event_types": ["batch.failed"]} | fields
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.webhooks.create(**asked)
        assert refused.value.param == param, fields
    key = native.request("POST", "/v1/keys", json={"scopes": ["write"]})["key"]
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key) as writer:
        with pytest.raises(openai.PermissionDeniedError):
            writer.webhooks.create(name="n", url="https://example.org/", event_types=["batch.failed"])


def test_a_repeated_registration_makes_one_target_and_keeps_no_secret(sdk, native, stack, receiver):
    headers = {"Idempotency-Key": uuid4().hex}
    first = sdk.webhooks.create(name="n", url=receiver.url, event_types=["batch.failed"], extra_headers=headers)
    again = sdk.webhooks.create(name="n", url=receiver.url, event_types=["batch.failed"], extra_headers=headers)
    assert first.id == again.id and first.signing_secret and again.signing_secret is None
    sdk.webhooks.delete(first.id)
    with psycopg.connect(stack.database_url("superuser")) as connection:
        kept = connection.execute("SELECT count(*) FROM idempotency WHERE response LIKE '%%whsec_A%%'").fetchone()
        of_target = "SELECT count(*) FROM webhook_secret WHERE webhook_id = %s"
        secrets = connection.execute(of_target, (UUID(first.id.removeprefix("we_")),)).fetchone()
    assert kept == (0,) and secrets == (0,), "with a target its secrets go"


# From here on without a stack: a real Postgres, a deliverer, and targets of all kinds.


def add_target(database, url, *, tenant_id="default", events=EVENT_TYPES):
    secret = new_secret()
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        return webhooks.create(connection, tenant_id, name="t", url=url, events=list(events), secret=secret), secret


def deliverer(database, networks=LOCAL, seconds=1.0):
    settings = database.settings("scheduler", webhook_networks=networks, webhook_timeout_seconds=seconds)
    return Deliverer(database.engine("scheduler"), settings)


def end(database, job_id, state):
    with database.engine("scheduler").begin() as connection:
        connection.execute(
            text("UPDATE job SET state = :s, ended_at = now() WHERE job_id = :j"), {"s": state, "j": job_id}
        )


def outbox(database):
    return rows(
        database.engine("scheduler"), "SELECT * FROM webhook_delivery ORDER BY created_at, event_type, delivery_id"
    )


def told(database, store, url, count=1, **fields):
    """Register a target and end so many jobs."""
    webhook_id, secret = add_target(database, url, **fields)
    for _ in range(count):
        end(database, make_job(database.engine("gateway"), store, chat_lines(1)), "succeeded")
    return webhook_id, secret


@pytest.mark.parametrize(
    ("kind", "state", "event"),
    [
        ("batch", "succeeded", "batch.completed"),
        ("batch", "failed", "batch.failed"),
        ("batch", "cancelled", "batch.cancelled"),
        ("batch", "expired", "batch.expired"),
        ("fine_tuning", "succeeded", "fine_tuning.job.succeeded"),
        ("fine_tuning", "failed", "fine_tuning.job.failed"),
        ("fine_tuning", "cancelled", "fine_tuning.job.cancelled"),
        ("fine_tuning", "expired", "fine_tuning.job.cancelled"),
        ("training", "succeeded", "training.job.succeeded"),
        ("training", "failed", "training.job.failed"),
        ("training", "cancelled", "training.job.cancelled"),
        ("training", "expired", "training.job.cancelled"),
    ],
)
def test_whatever_ends_a_job_says_whom_to_tell(database, store, kind, state, event):
    """In the same transaction, once, and nobody of another tenant or who asked for other events."""
    add_target(database, "https://example.org/")
    add_target(database, "https://example.org/", events=[e for e in EVENT_TYPES if e != event])
    with database.engine("migration").begin() as connection:
        connection.execute(text("INSERT INTO tenant (tenant_id, name) VALUES ('other', 'Other')"))
    add_target(database, "https://example.org/", tenant_id="other")
    job_id = make_job(database.engine("gateway"), store, chat_lines(1))
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET kind = :k WHERE job_id = :j"), {"k": kind, "j": job_id})
    for next_state in ("running", "finalizing", state, state):
        end(database, job_id, next_state)
    (found,) = outbox(database)
    assert (found.event_type, found.job_id, found.tenant_id) == (event, job_id, "default")


def test_what_is_rolled_back_is_not_told(database, store):
    add_target(database, "https://example.org/")
    job_id = make_job(database.engine("gateway"), store, chat_lines(1))
    with database.engine("scheduler").connect() as connection, connection.begin() as transaction:
        connection.execute(text("UPDATE job SET state = 'failed' WHERE job_id = :j"), {"j": job_id})
        transaction.rollback()
    assert outbox(database) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_private_addresses_are_not_connected_to(database, store, receiver, host):
    told(database, store, receiver.url.replace("127.0.0.1", host))
    assert deliverer(database, networks=[]).tick() == 1
    (found,) = outbox(database)
    assert found.state == "waiting" and "private address" in found.error and receiver.got == []


def test_redirects_are_not_followed(database, store, receiver):
    leads_away = Receiver(307, location=receiver.url)
    told(database, store, leads_away.url)
    deliverer(database).tick()
    (found,) = outbox(database)
    assert (found.state, found.status_code) == ("waiting", 307) and len(leads_away.got) == 1 and receiver.got == []
    leads_away.close()


def test_a_target_that_is_gone_is_told_nothing_more_until_it_is_changed(database, store):
    gone = Receiver(410)
    webhook_id, _ = told(database, store, gone.url, count=1)
    deliverer(database).tick()
    end(database, make_job(database.engine("gateway"), store, chat_lines(1)), "failed")
    (found,) = outbox(database)
    assert (found.state, found.status_code) == ("failed", 410)
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        webhooks.change(connection, webhook_id, {"name": "back"})
    end(database, make_job(database.engine("gateway"), store, chat_lines(1)), "failed")
    assert [row.state for row in outbox(database)] == ["failed", "waiting"]
    gone.close()


def test_a_target_that_said_that_it_is_gone_can_be_tested(database, store):
    back = Receiver(410, 204)
    webhook_id, _ = told(database, store, back.url)
    deliverer(database).tick()
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        sent = webhooks.add_test(connection, webhook_id, "batch.failed")
    assert deliverer(database).tick() == 1
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        assert webhooks.delivery(connection, sent).status_code == 204
        assert webhooks.get(connection, webhook_id)["disabled_at"] is not None, (
            "whether it is used is for an admin to say"
        )
    back.close()


def test_a_test_goes_before_all_that_waits_for_its_target(database, store):
    """Also where that is never sent, as the target said that it is gone: whoever tests waits for the answer."""
    webhook_id, _ = told(database, store, "https://example.org/", count=3)
    for is_gone in (False, True):
        if is_gone:
            with database.engine("migration").begin() as connection:
                connection.execute(text("UPDATE webhook SET disabled_at = now()"))
        with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
            sent = webhooks.add_test(connection, webhook_id, "batch.failed")
            shown = webhooks.delivery(connection, sent)
        assert shown.next_at == shown.created_at
        with database.engine("scheduler").begin() as connection:
            taken = webhooks.take_due(connection, limit=1, hold_seconds=60)
        assert [each.delivery_id for each in taken] == [sent]


def test_a_target_is_given_up_with_what_is_being_written_for_it(database, store):
    """It was done past an end that was not committed yet, whose delivery then waited for ever."""
    webhook_id, _ = add_target(database, "https://example.org/")
    job_id = make_job(database.engine("gateway"), store, chat_lines(1))

    def give_up():
        with database.engine("scheduler").begin() as connection:
            webhooks.disable(connection, webhook_id, "gone")

    thread = threading.Thread(target=give_up)
    with database.engine("scheduler").connect() as ending:
        ending.execute(text("UPDATE job SET state = 'failed', ended_at = now() WHERE job_id = :j"), {"j": job_id})
        thread.start()
        thread.join(0.5)
        ending.commit()
    thread.join()
    assert [row.state for row in outbox(database)] == ["failed"]


@contextmanager
def serving(behave):
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            behave(self.request)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


def trickle(connection):
    """Send a header line every tenth of a second, for ever."""
    try:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"x-more: 1\r\n")
            time.sleep(0.1)
    except OSError:
        pass


@pytest.mark.parametrize(
    "behave", [lambda connection: time.sleep(30), trickle, lambda connection: connection.sendall(b"nonsense\r\n\r\n")],
    ids=["silent", "trickles", "no HTTP"],
)  # fmt: skip
def test_a_target_that_never_ends_its_answer_holds_nobody_up(database, store, receiver, behave):
    with serving(behave) as url:
        slow, _ = add_target(database, url)
        told(database, store, receiver.url, count=6)
        started = time.monotonic()
        deliverer(database, seconds=1.0).tick()
        assert time.monotonic() - started < 10 and len(receiver.got) == 6
    states = {(row.webhook_id == slow, row.state) for row in outbox(database)}
    assert states == {(True, "waiting"), (False, "delivered")}


def test_an_answers_body_is_not_read(database, store):
    """However long it is."""

    def flood(connection):
        try:
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n")
            while True:
                connection.sendall(b"x" * 65_536)
        except OSError:
            pass

    with serving(flood) as url:
        told(database, store, url)
        started = time.monotonic()
        deliverer(database, seconds=20.0).tick()
    assert [row.state for row in outbox(database)] == ["delivered"] and time.monotonic() - started < 10


def test_two_schedulers_send_each_delivery_once(database, store, receiver):
    told(database, store, receiver.url, count=40)
    threads = [threading.Thread(target=deliverer(database).tick) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deliverer(database).tick()
    assert len(receiver.got) == 40 and len({event["id"] for event in receiver.events()}) == 40
    assert {row.attempts for row in outbox(database)} == {1}


def test_one_that_was_taken_by_a_process_that_died_is_sent_again(database, store, receiver):
    _, secret = told(database, store, receiver.url)
    with database.engine("scheduler").begin() as connection:
        (taken,) = webhooks.take_due(connection, limit=5, hold_seconds=4)
    assert deliverer(database).tick() == 0, "somebody may still be at it"
    wait_until(lambda: deliverer(database).tick(), 10, "it is due again")
    (got,) = receiver.got
    assert unwrap(secret, got).id == f"evt_{taken.delivery_id.hex}"
    (found,) = outbox(database)
    assert (found.state, found.attempts) == ("delivered", 2)


def test_one_that_never_succeeds_is_given_up_and_says_so(database, store):
    receiver = Receiver(503)
    told(database, store, receiver.url)
    for _ in range(11):
        with database.engine("scheduler").begin() as connection:
            connection.execute(text("UPDATE webhook_delivery SET next_at = now()"))
        assert deliverer(database).tick() == 1
    (found,) = outbox(database)
    assert (found.state, found.attempts, found.error) == ("failed", 11, "The answer was 503.")
    assert deliverer(database).tick() == 0 and len(receiver.got) == 11
    receiver.close()


def test_a_deleted_target_takes_its_deliveries_along(database, store):
    webhook_id, _ = told(database, store, "https://example.org/", count=2)
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        webhooks.delete(connection, webhook_id)
        with pytest.raises(NotFound):
            webhooks.delete(connection, webhook_id)
    assert outbox(database) == [] and scalar(database.engine("scheduler"), "SELECT count(*) FROM webhook_secret") == 0


def test_old_deliveries_and_secrets_are_forgotten(database, store):
    webhook_id, _ = told(database, store, "https://example.org/", count=2)
    with database.engine("migration").begin() as connection:
        connection.execute(
            text(
                "UPDATE webhook_delivery SET state = 'failed', ended_at = now() - interval '31 days' WHERE delivery_id ="
                " (SELECT delivery_id FROM webhook_delivery LIMIT 1)"
            )
        )
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        webhooks.rotate_secret(connection, webhook_id, new_secret(), keep_old=False)
    retention = Retention(database.engine("scheduler"), store, database.settings("scheduler"))
    retention._purge()
    retention._purge_secrets()
    assert [row.state for row in outbox(database)] == ["waiting"]
    assert scalar(database.engine("scheduler"), "SELECT count(*) FROM webhook_secret") == 1
