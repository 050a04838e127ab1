"""A load generator that costs little: HTTP/1.1 over raw asyncio streams, so that what is measured is the server."""

import asyncio
import json
import time
from collections import deque
from dataclasses import dataclass, field


@dataclass
class Sample:
    """One call; times in seconds. `first` is when the body's first bytes came."""

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

    async def post(self, path: str, body: bytes, *, until: bytes | None = None) -> Sample:
        """Send a POST and read its whole answer; with `until`, `first` is when these bytes came."""
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
        first = None
        if b"transfer-encoding: chunked" in header.lower():
            while size := int(await reader.readline(), 16):
                chunk = await reader.readexactly(size + 2)
                if first is None and (until is None or until in chunk):
                    first = time.perf_counter()
            await reader.readexactly(2)
        else:
            lower = header.lower()
            start = lower.index(b"content-length: ") + 16
            await reader.readexactly(int(lower[start : lower.index(b"\r", start)]))
        ended = time.perf_counter()
        return Sample(status, (first or ended) - started, ended - started)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def chat_body(text: str = "one two three", **more) -> bytes:
    return json.dumps({"model": "echo", "messages": [{"role": "user", "content": text}]} | more).encode()


async def closed_loop(port: int, key: str, concurrency: int, seconds: float, body: bytes) -> list[Sample]:
    """Keep `concurrency` calls in flight for so long, after a second of warming up; calls that end later do not count."""
    samples: list[Sample] = []
    began = time.monotonic()

    async def caller():
        connection = Connection(port, key)
        while time.monotonic() < began + seconds + 1:
            sample = await connection.post("/v1/chat/completions", body)
            if began + 1 < sample.at <= began + 1 + seconds:
                samples.append(sample)
        connection.close()

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return samples


async def open_loop(port: int, key: str, rate: float, seconds: float, path: str, body: bytes) -> list[Sample]:
    """Send calls at a fixed rate, whether or not earlier ones were answered."""
    samples: list[Sample] = []
    idle: deque[Connection] = deque()
    tasks = set()

    async def call():
        connection = idle.popleft() if idle else Connection(port, key)
        samples.append(await connection.post(path, body))
        idle.append(connection)

    began = time.monotonic()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        task = asyncio.ensure_future(call())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()
    return samples


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that `share` of the values do not pass."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
