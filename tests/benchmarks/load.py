"""A load generator that costs little: HTTP/1.1 over raw asyncio streams, so that what is measured is the server."""

import asyncio
import json
import time
from collections import deque
from dataclasses import dataclass, field


FAILED = 0
"""The status of a call that got no whole answer: refused, reset, cut off, broken within its stream, or overdue."""
ANSWER_SECONDS = 120.0
IDLE_SECONDS = 30.0
"""Connections that lay idle for longer are not used again: the server may be closing them."""


@dataclass
class Sample:
    """One call; times in seconds. `first` is when the body's first bytes came, `at` when the call was over."""

    status: int
    first: float
    total: float
    at: float = field(default_factory=time.monotonic)


class Connection:
    """One kept-alive connection."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._key = port, key
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.used_at = time.monotonic()

    async def post(self, path: str, body: bytes, *, until: bytes | None = None) -> Sample:
        """Send a POST and read its whole answer; with `until`, `first` is when these bytes came.

        Whatever goes wrong is a sample with the status FAILED: a call that is lost must not be lost to the count.
        """
        started = time.perf_counter()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                sample = await self._post(path, body, until)
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
            self.close()
            seconds = time.perf_counter() - started
            sample = Sample(FAILED, seconds, seconds)
        self.used_at = time.monotonic()
        return sample

    async def _post(self, path: str, body: bytes, until: bytes | None) -> Sample:
        started = time.perf_counter()
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        reader = self._reader
        header = await reader.readuntil(b"\r\n\r\n")
        status = int(header[9:12])
        lower = header.lower()
        first, end = None, b""
        if b"transfer-encoding: chunked" in lower:
            while size := int(await reader.readline(), 16):
                chunk = await reader.readexactly(size + 2)
                end = (end + chunk)[-64:]
                if first is None and (until is None or until in chunk):
                    first = time.perf_counter()
            await reader.readexactly(2)
        else:
            start = lower.index(b"content-length: ") + 16
            await reader.readexactly(int(lower[start : lower.index(b"\r", start)]))
        ended = time.perf_counter()
        if b"text/event-stream" in lower and b"data: [DONE]" not in end:
            status = FAILED  # the status was sent before the stream broke
        return Sample(status, (first or ended) - started, ended - started)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def chat_body(text: str = "one two three", **more) -> bytes:
    return json.dumps({"model": "echo", "messages": [{"role": "user", "content": text}]} | more).encode()


async def closed_loop(
    port: int, key: str, concurrency: int, seconds: float, body: bytes, *, warm_seconds: float = 1.0
) -> list[Sample]:
    """Keep `concurrency` calls in flight for so long, after some warming up; those sent in that time count, all of them."""
    samples: list[Sample] = []
    began = time.monotonic() + warm_seconds

    async def caller():
        connection = Connection(port, key)
        while time.monotonic() < began + seconds:
            sent_at = time.monotonic()
            sample = await connection.post("/v1/chat/completions", body)
            if began < sent_at:
                samples.append(sample)
            if sample.status == FAILED:
                await asyncio.sleep(0.1)
        connection.close()

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return samples


async def open_loop(port: int, key: str, rate: float, seconds: float, path: str, body: bytes) -> list[Sample]:
    """Send calls at a fixed rate, whether or not earlier ones were answered; every call sent has a sample."""
    idle: deque[Connection] = deque()

    async def call():
        while idle and time.monotonic() - idle[0].used_at > IDLE_SECONDS:
            idle.popleft().close()
        connection = idle.pop() if idle else Connection(port, key)
        sample = await connection.post(path, body)
        idle.append(connection)
        return sample

    tasks = []
    began = time.monotonic()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        tasks.append(asyncio.ensure_future(call()))
    samples = await asyncio.gather(*tasks)
    assert len(samples) == len(tasks) == int(rate * seconds)
    for connection in idle:
        connection.close()
    return samples


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that `share` of the values do not pass."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
