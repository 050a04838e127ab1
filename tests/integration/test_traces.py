"""Traces of jobs: what a collector gets over OTLP, decoded by the protocol's own definitions."""

import http.server
import threading
from datetime import timedelta

import psycopg
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from services.scheduler import tracer
from services.scheduler.tracer import Tracer
from shared.db.session import connect_engine
from tests.support.batches import chat_lines, submit, wait_for
from tests.support.servers import wait_until


class Collector:
    """Takes what an OpenTelemetry collector takes; `answer` says with which status, of the spans of a request."""

    def __init__(self):
        self.spans, self.answer = [], lambda _spans: 200
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                sent = ExportTraceServiceRequest.FromString(body).resource_spans
                spans = [span for resource in sent for scope in resource.scope_spans for span in scope.spans]
                status = collector.answer(spans)
                if status == 200:
                    collector.spans += spans
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def of(self, job_id):
        trace = bytes.fromhex(job_id.removeprefix("batch_"))
        return [span for span in self.spans if span.trace_id == trace]


def about(span):
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


@pytest.fixture
def collector():
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def engine(stack):
    made = connect_engine(stack.settings("scheduler"))
    yield made
    made.dispose()


@pytest.fixture
def session(engine):
    with engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


@pytest.fixture
def traced(engine, session, collector):
    """A tracer to whom everything that tests before have done is old."""
    made = Tracer(engine, collector.url)
    while made.tick(session):
        pass
    collector.spans.clear()
    return made


def test_a_jobs_trace_is_its_id_and_has_every_attempt(sdk, stack, session, collector, traced):
    batch = wait_for(sdk, submit(sdk, chat_lines(600)).id)
    traced.tick(session)
    spans = collector.of(batch.id)
    (root,) = [span for span in spans if not span.parent_span_id]
    assert root.name == "batch" and about(root)["lamplighter.state"] == "succeeded"
    assert about(root)["lamplighter.total"] == 600
    rest = [span for span in spans if span is not root]
    assert {span.parent_span_id for span in rest} == {root.span_id}
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in spans)
    with psycopg.connect(stack.database_url("superuser")) as connection:
        rows = connection.execute(
            "SELECT task_id, worker, device FROM attempt WHERE job_id = %s", (batch.id.removeprefix("batch_"),)
        ).fetchall()
    told = [about(span) for span in rest if span.name == "attempt"]
    seen = [(each["lamplighter.task_id"], each["lamplighter.worker"], each["lamplighter.device"]) for each in told]
    assert sorted(seen) == sorted(rows) and len(rows) >= 3
    assert "hello number" not in str(spans)


def test_each_job_is_sent_once_and_again_only_as_the_same_spans(sdk, engine, session, collector, traced):
    batch = wait_for(sdk, submit(sdk, chat_lines(2)).id)
    traced.tick(session)
    traced.tick(session)
    once = {span.span_id for span in collector.of(batch.id)}
    assert len(collector.of(batch.id)) == len(once) >= 3
    another = Tracer(engine, collector.url)  # a scheduler that was started again
    while another.tick(session):
        pass
    assert {span.span_id for span in collector.of(batch.id)} == once
    assert len(collector.of(batch.id)) == 2 * len(once)


def test_while_the_collector_is_away_nothing_is_passed_over(sdk, session, collector, traced):
    """However long that lasts; one whose queue is full says no to spans and yes to nothing."""
    collector.answer = lambda spans: 400 if spans else 200  # 503 would be tried again by the exporter itself
    batch = wait_for(sdk, submit(sdk, chat_lines(2)).id)
    for _ in range(tracer.MOST_REFUSALS + 1):
        assert not traced.tick(session) and not collector.of(batch.id)
    collector.answer = lambda _: 200
    traced.tick(session)
    assert collector.of(batch.id)


def test_a_trace_that_is_refused_stands_in_no_others_way_and_is_given_up(sdk, session, collector, traced):
    large = wait_for(sdk, submit(sdk, chat_lines(600)).id)
    asked = []
    collector.answer = lambda spans: asked.append(len(spans)) or (400 if len(spans) > 4 else 200)
    for _ in range(tracer.MOST_REFUSALS):
        small = wait_for(sdk, submit(sdk, chat_lines(2)).id)
        traced.tick(session)
        assert not collector.of(large.id) and collector.of(small.id)
    before = len(asked)
    traced.tick(session)
    assert len(asked) == before, "it was not given up"


def test_pages_of_refused_traces_do_not_keep_those_behind_them(sdk, session, collector, traced, monkeypatch):
    """A collector that has something against the oldest ones, and they fill whole looks."""
    monkeypatch.setattr(tracer, "JOBS_AT_ONCE", 2)
    old = [wait_for(sdk, submit(sdk, chat_lines(1)).id).id for _ in range(5)]
    new = [wait_for(sdk, submit(sdk, chat_lines(1)).id).id for _ in range(3)]
    refused = [bytes.fromhex(batch_id.removeprefix("batch_")) for batch_id in old]
    collector.answer = lambda spans: 400 if spans and spans[0].trace_id in refused else 200
    monkeypatch.setattr(tracer, "PROBES", 1)
    for number in range(len(new)):  # each look meets two of the old ones, and then the newest
        traced.tick(session)
        assert sum(bool(collector.of(batch_id)) for batch_id in new) == number + 1
    for _ in range(3 * tracer.MOST_REFUSALS):
        wait_for(sdk, submit(sdk, chat_lines(1)).id)
        traced.tick(session)
    asked = []
    collector.answer = lambda spans: asked.append(spans) or 200
    traced.tick(session)
    assert asked == [], "they were not given up"
    assert not any(collector.of(batch_id) for batch_id in old)


def test_what_lies_between_refused_traces_and_the_newest_is_sent_once_those_are_given_up(
    sdk, session, collector, traced, monkeypatch
):
    """The newest only tell that the collector is there: nobody goes on behind them."""
    monkeypatch.setattr(tracer, "JOBS_AT_ONCE", 2)
    monkeypatch.setattr(tracer, "PROBES", 1)
    monkeypatch.setattr(tracer, "LATE", timedelta(0))
    made = [wait_for(sdk, submit(sdk, chat_lines(1)).id).id for _ in range(5)]
    refused = [bytes.fromhex(batch_id.removeprefix("batch_")) for batch_id in made[:2]]
    collector.answer = lambda spans: 400 if spans and spans[0].trace_id in refused else 200
    for _ in range(tracer.MOST_REFUSALS):
        newest = wait_for(sdk, submit(sdk, chat_lines(1)).id)
        traced.tick(session)
        assert collector.of(newest.id) and not any(collector.of(batch_id) for batch_id in made)
    while traced.tick(session):
        pass
    assert all(collector.of(batch_id) for batch_id in made[2:])


def test_one_scheduler_of_several_sends(sdk, engine, collector, traced, monkeypatch):
    """The second one returns at once while the first one runs, and goes on when that has ended."""
    monkeypatch.setattr(tracer, "PAUSE_SECONDS", 0.05)
    stops = threading.Event(), threading.Event()
    first = threading.Thread(target=traced.run, args=(stops[0],))
    first.start()
    batch = wait_for(sdk, submit(sdk, chat_lines(2)).id)
    wait_until(lambda: collector.of(batch.id), 10)
    second = Tracer(engine, collector.url)
    second.run(stops[1])  # which would not return if it were the one
    assert len({span.span_id for span in collector.of(batch.id)}) == len(collector.of(batch.id))
    stops[0].set()
    first.join()
    other = threading.Thread(target=second.run, args=(stops[1],))
    other.start()
    later = wait_for(sdk, submit(sdk, chat_lines(2)).id)
    wait_until(lambda: collector.of(later.id), 10)
    stops[1].set()
    other.join()


def test_more_jobs_than_one_look_takes(sdk, session, collector, traced, monkeypatch):
    monkeypatch.setattr(tracer, "JOBS_AT_ONCE", 2)
    made = [submit(sdk, chat_lines(1)).id for _ in range(5)]
    for batch_id in made:
        wait_for(sdk, batch_id)
    looks = 0
    while traced.tick(session):
        looks += 1
    assert looks == 2 and all(collector.of(batch_id) for batch_id in made)
