"""uvicorn with our protocol: who stops sending is cut off, who is slow is not."""

import contextlib
import socket
import threading
import time

import pytest
import uvicorn

from services.gateway import protocol
from services.gateway.protocol import BoundedProtocol
from tests.support.servers import wait_until

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n"


async def count_body(scope, receive, send):
    """Answer with how many bytes a body had."""
    if scope["type"] == "lifespan":
        return
    size = 0
    while (message := await receive())["type"] == "http.request":
        size += len(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(protocol, "STALLED_SECONDS", 1.0)
    config = uvicorn.Config(count_body, port=0, http=BoundedProtocol, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 10)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("sent", [b"", HEAD[:20], HEAD, HEAD + b"ab"], ids=["nothing", "half a head", "head", "half"])
def test_a_client_that_stops_sending_is_cut_off(port, sent):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        started = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        assert 0.5 < time.monotonic() - started < 5


def test_a_head_that_never_ends_is_cut_off_however_it_trickles(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for number in range(30):
                connection.sendall(b"X-%d: y\r\n" % number)
                time.sleep(0.3)


def test_a_slow_body_is_read_to_its_end_and_the_connection_goes_on(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for _ in range(2):
            connection.sendall(HEAD)
            for byte in (b"a", b"b", b"c", b"d"):
                time.sleep(0.6)
                connection.sendall(byte)
            assert connection.recv(1000).endswith(b"\r\n\r\n4")
