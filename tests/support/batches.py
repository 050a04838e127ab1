"""Batch files and jobs for tests."""

import json
import time
from uuid import UUID, uuid4

import openai
from sqlalchemy import Engine, text

from shared.ingest import LineReader
from shared.db import files, jobs
from shared.db.jobs import NewBatch
from shared.db.session import tenant_transaction
from shared.domain.batch_file import batch_model
from shared.store import Store, file_path, index_path, pack_offsets

CHAT = "/v1/chat/completions"


def chat_line(custom_id: str, content: str = "hello world", *, model: str = "echo", url: str = CHAT, **body) -> dict:
    body = {"model": model, "messages": [{"role": "user", "content": content}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def chat_lines(count: int, **body) -> list[dict]:
    return [chat_line(f"line-{i}", f"hello number {i}", **body) for i in range(count)]


def jsonl(lines: list) -> bytes:
    """Return lines as a file; bytes are taken as they are."""
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def submit(client: openai.OpenAI, lines: list, endpoint: str = CHAT, **fields):
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    uploaded = client.files.create(file=("input.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=uploaded.id, endpoint=endpoint, completion_window="24h", **fields)


def wait_for(client: openai.OpenAI, batch_id: str, *statuses: str, seconds: float = 60, poll_seconds: float = 0.05):
    """Return the batch once it is in one of `statuses` (any final one by default)."""
    statuses = statuses or ("completed", "failed", "cancelled", "expired")
    deadline = time.monotonic() + seconds
    while (batch := client.batches.retrieve(batch_id)).status not in statuses:
        assert time.monotonic() < deadline, f"still {batch.status}: {batch.request_counts}"
        time.sleep(poll_seconds)
    return batch


def read_lines(client: openai.OpenAI, file_id: str) -> dict[str, dict]:
    """Return a file's lines by custom_id, each of which stands there once."""
    rows = [json.loads(line) for line in client.files.content(file_id).read().splitlines()]
    by_id = {row["custom_id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


def make_job(engine: Engine, store: Store, lines: list, *, tenant_id: str = "default", **fields) -> UUID:
    """Write a file and a batch on it straight into store and database, as the gateway does."""
    content = jsonl(lines)
    reader = LineReader()
    reader.feed(content)
    reader.finish()
    file_id = uuid4()
    paths = file_path(tenant_id, file_id), index_path(tenant_id, file_id)
    for path, data in zip(paths, (content, pack_offsets(reader.offsets))):
        writer = store.writer(path)
        writer.write(data)
        writer.commit()
    summary = reader.checker.summary()
    columns = {"endpoint": CHAT, "priority": 5, "completion_window": "24h", "completion_seconds": 86400.0} | fields
    with tenant_transaction(engine, tenant_id) as connection:
        files.add(
            connection,
            tenant_id=tenant_id,
            file_id=file_id,
            purpose="batch",
            filename="x.jsonl",
            bytes=len(content),
            sha256="0",
            store_path=paths[0],
            index_path=paths[1],
            lines=summary["lines"],
            validation=summary,
            expires_after_seconds=None,
        )
        batch = NewBatch(
            tenant_id=tenant_id,
            key_id=None,
            model=batch_model(summary),
            input_file_id=file_id,
            deadline=None,
            spec={},
            metadata=None,
            idempotency_key=None,
            **columns,
        )
        return jobs.accept_batch(connection, batch)


def scalar(engine: Engine, statement: str, **parameters):
    with engine.begin() as connection:
        return connection.execute(text(statement), parameters).scalar_one()


def rows(engine: Engine, statement: str, **parameters):
    with engine.begin() as connection:
        return connection.execute(text(statement), parameters).all()
