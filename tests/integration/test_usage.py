"""`/v1/usage`: sums by bucket and group, of jobs and online calls, against what they said themselves."""

import csv
import io
import time
from datetime import UTC, datetime

import httpx
import openai
import pytest
from lamplighter.client import Client
from lamplighter.errors import ApiError

from tests.support.batches import chat_line, chat_lines, submit, wait_for
from tests.support.servers import wait_until

SUMS = ("requests", "input_tokens", "output_tokens", "device_seconds")


@pytest.fixture(scope="module")
def consumer(native, stack):
    """A tenant of its own with two keys, a batch on each, and five calls on one."""
    native.request("POST", "/v1/tenants", json={"id": "consumer"})
    keys = [native.request("POST", "/v1/keys", json={"tenant": "consumer"}) for _ in range(2)]
    began = int(time.time())
    batches = []
    for number, key in enumerate(keys):
        with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key["key"]) as sdk:
            lines = [*chat_lines(10 + number), chat_line("bad", temperature=9)]
            batches.append(wait_for(sdk, submit(sdk, lines).id))
            for _ in range(5 * number):
                sdk.chat.completions.create(model="echo", messages=[{"role": "user", "content": "one two three"}])
    with Client(stack.url, keys[0]["key"]) as client:
        yield client, [key["id"] for key in keys], batches, began


def table_of(stack, native, **query):
    """Return the rows of a key of the consumer's, as a spreadsheet reads them."""
    key = native.request("POST", "/v1/keys", json={"tenant": "consumer", "scopes": ["read"]})["key"]
    headers = {"Authorization": f"Bearer {key}", "Accept": "text/csv"}
    answer = httpx.get(f"{stack.url}/v1/usage", params=query, headers=headers)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/csv")
    return list(csv.DictReader(io.StringIO(answer.text)))


def used(client, **query):
    return client.request("GET", "/v1/usage", params=query)["data"]


def totals(buckets, *groups):
    """Return {groups: sums} over all buckets."""
    found = {}
    for bucket in buckets:
        for row in bucket["results"]:
            assert set(row) == {*groups, *SUMS}
            sums = found.setdefault(tuple(row[group] for group in groups), dict.fromkeys(SUMS, 0))
            for name in SUMS:
                sums[name] += row[name]
    return found


def test_everything_is_counted_once_by_hour_and_day(consumer):
    client, keys, batches, _ = consumer
    by_day = wait_until(
        lambda: (t := totals(used(client))) and t[()]["requests"] == 10 + 1 + 11 + 1 + 5 and t,
        10,
        "all of it is recorded",
    )
    assert totals(used(client, bucket="hour")) == by_day
    for groups in (("key",), ("model",), ("job",), ("tenant",), ("key", "model", "job")):
        parts = totals(used(client, group_by=list(groups)), *groups)
        assert sum(part["requests"] for part in parts.values()) == 28
        assert sum(part["output_tokens"] for part in parts.values()) == by_day[()]["output_tokens"]
    by_key = totals(used(client, group_by="key"), "key")
    assert {key: by_key[key,]["requests"] for key in keys} == {keys[0]: 11, keys[1]: 17}
    by_job = totals(used(client, group_by="job"), "job")
    for batch in batches:
        assert by_job[batch.id,]["output_tokens"] == batch.usage.output_tokens
        assert by_job[batch.id,]["input_tokens"] == batch.usage.input_tokens
    assert by_job[None,]["requests"] == 5 and by_job[None,]["output_tokens"] == 15


def test_buckets_are_whole_and_empty_ones_are_there(consumer):
    client, _, _, began = consumer
    hours = used(client, bucket="hour", start=began - 7200, end=began)
    starts = [bucket["start"] for bucket in hours]
    assert starts == list(range(began - 7200 - began % 3600, began + 1, 3600))[: len(starts)] and len(starts) in (2, 3)
    assert all(bucket["end"] - bucket["start"] == 3600 for bucket in hours) and hours[0]["results"] == []
    days = used(client, bucket="day")
    assert len(days) == 30 and all(bucket["start"] % 86_400 == 0 for bucket in days)
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    assert days[-1]["start"] <= int(today.timestamp()) <= days[-1]["end"]
    assert used(client, bucket="day", start=0, end=86_400 * 3)[0]["results"] == []


def test_as_a_table(consumer, stack, native):
    _, keys, _, _ = consumer
    table = table_of(stack, native, group_by=["key", "model"])
    assert list(table[0]) == ["start", "end", "key", "model", *SUMS]
    assert {row["key"] for row in table} == set(keys)
    assert sum(int(row["requests"]) for row in table) == 28


def test_who_sees_what(consumer, native):
    """An admin sees all tenants or the one that is named; everybody else their own, whatever they name."""
    client, _, _, _ = consumer
    assert ("consumer",) in totals(used(native, group_by="tenant"), "tenant")
    assert set(totals(used(native, group_by="tenant", tenant="consumer"), "tenant")) == {("consumer",)}
    assert set(totals(used(client, group_by="tenant", tenant="default"), "tenant")) == {("consumer",)}


def test_more_sums_than_anybody_reads_are_refused(database):
    """The answer would not fit into the gateway, whoever asks."""
    from datetime import timedelta

    from sqlalchemy import text

    from shared.db import usage
    from shared.domain.errors import InvalidRequest

    with database.engine("migration").begin() as connection:
        connection.execute(
            text(
                "INSERT INTO online_usage SELECT 'default', date_trunc('hour', now()) - n % 200 * interval '1 hour', '',"
                " 'm' || n / 200, 1, 1, 1, 1 FROM generate_series(0, 60000) n"
            )
        )
        now = datetime.now(UTC)
        asked = {"start": now - timedelta(days=30), "end": now, "bucket": "hour"}
        with pytest.raises(InvalidRequest, match="fewer groups"):
            usage.used(connection, **asked, groups=["model"])
        assert sum(row["requests"] for row in usage.used(connection, **asked)) == 60_001


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"bucket": "week"}, "bucket"),
        ({"group_by": "colour"}, "group_by"),
        ({"start": 2000, "end": 1000, "bucket": "hour"}, "start"),
        ({"start": 0, "end": 2_000_000_000, "bucket": "hour"}, "start"),
        ({"start": -5}, "start"),
        ({"end": "tomorrow"}, "end"),
    ],
)
def test_what_cannot_be_asked(native, query, param):
    with pytest.raises(ApiError) as refused:
        used(native, **query)
    assert refused.value.status == 400 and refused.value.param.startswith(param)
