"""Traces of jobs: what a collector gets over OTLP, decoded by the protocol's own definitions."""

import http.server
import threading

import psycopg
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from services.scheduler import tracer
from services.scheduler.tracer import Tracer
from shared.db.session import alone, connect_engine
from tests.support.batches import chat_lines, submit, wait_for


class Collector:
    """Takes what an OpenTelemetry collector takes; `status` is what it answers with."""

    def __init__(self):
        self.spans, self.status = [], 200
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                if collector.status == 200:
                    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                        collector.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(collector.status)
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
def traced(engine, collector):
    """A tracer to whom everything that tests before have done is old."""
    made = Tracer(engine, collector.url)
    while made.tick():
        pass
    collector.spans.clear()
    return made


def test_a_jobs_trace_is_its_id_and_has_every_attempt(sdk, stack, collector, traced):
    batch = wait_for(sdk, submit(sdk, chat_lines(600)).id)
    assert traced.tick() == 1
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


def test_each_job_is_sent_once_and_again_only_as_the_same_spans(sdk, engine, collector, traced):
    batch = wait_for(sdk, submit(sdk, chat_lines(2)).id)
    assert traced.tick() == 1 and traced.tick() == 0
    once = {span.span_id for span in collector.of(batch.id)}
    another = Tracer(engine, collector.url)  # a scheduler that was started again
    while another.tick():
        pass
    assert {span.span_id for span in collector.of(batch.id)} == once
    assert len(collector.of(batch.id)) == 2 * len(once)


def test_while_the_collector_is_away_nothing_is_passed_over(sdk, collector, traced):
    collector.status = 400  # 503 would be tried again by the exporter itself, for longer
    batch = wait_for(sdk, submit(sdk, chat_lines(2)).id)
    with pytest.raises(OSError, match="took nothing"):
        traced.tick()
    collector.status = 200
    assert traced.tick() == 1 and collector.of(batch.id)


def test_one_scheduler_of_several_sends(sdk, engine, traced):
    wait_for(sdk, submit(sdk, chat_lines(2)).id)
    with alone(engine, tracer.LOCK) as held:
        assert held is not None and traced.tick() == 0
    assert traced.tick() == 1


def test_more_jobs_than_one_request_takes(sdk, collector, traced, monkeypatch):
    monkeypatch.setattr(tracer, "JOBS_AT_ONCE", 2)
    made = [submit(sdk, chat_lines(1)).id for _ in range(5)]
    for batch_id in made:
        wait_for(sdk, batch_id)
    sent = []
    while count := traced.tick():
        sent.append(count)
    assert sum(sent) == 5 and max(sent) == 2
    assert all(collector.of(batch_id) for batch_id in made)
