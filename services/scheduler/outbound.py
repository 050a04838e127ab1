"""Requests to addresses that somebody else chose: public ones only, unless allowed, and never for long.

The address that is judged is the one that is connected to: a name is resolved once, here, and what it stands for a
moment later does not matter. No redirect is followed, no proxy of the environment asked, no answer's body read.
"""

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import certifi
import httpcore

from shared.domain.webhooks import IPNetwork, may_reach


class Unreachable(Exception):
    """Nothing answered, in words for whoever registered the target."""


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def cut(self, timeout: float | None) -> float:
        """Return how long one operation may still take. Raises httpcore.TimeoutException."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise httpcore.TimeoutException
        return left if timeout is None else min(left, timeout)


class _BoundedStream(httpcore.NetworkStream):
    """A stream whose operations end in time all together: a target that trickles holds nobody up."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.cut(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.cut(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        secured = self._stream.start_tls(ssl_context, server_hostname, self._deadline.cut(timeout))
        return _BoundedStream(secured, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _GuardedBackend(httpcore.NetworkBackend):
    """Connects to addresses that may be reached."""

    def __init__(self, allowed: Sequence[IPNetwork], deadline: _Deadline) -> None:
        self._allowed, self._deadline = allowed, deadline
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        failure: Exception = Unreachable(f"The host {host} has no address.")
        for address in self._addresses(host, port):
            try:
                limit = self._deadline.cut(timeout)
                stream = self._plain.connect_tcp(address, port, limit, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
                continue
            return _BoundedStream(stream, self._deadline)
        raise failure

    def _addresses(self, host: str, port: int) -> list[str]:
        """Return what a name stands for. Raises Unreachable when any of it is out of bounds."""
        # In a thread of its own: nothing bounds a resolver that waits, and it must not outlast the delivery.
        resolver = ThreadPoolExecutor(1, thread_name_prefix="resolver")
        try:
            resolved = resolver.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
            found = {str(info[4][0]) for info in resolved.result(self._deadline.cut(None))}
        except TimeoutError as error:
            raise httpcore.ConnectTimeout from error
        except (OSError, UnicodeError) as error:
            raise Unreachable(f"The host {host} has no address.") from error
        finally:
            resolver.shutdown(wait=False, cancel_futures=True)
        for address in sorted(found):
            if not may_reach(ipaddress.ip_address(address.partition("%")[0]), self._allowed):
                raise Unreachable(f"The host {host} has a private address, which is not among the allowed networks.")
        return sorted(found, key=lambda address: (":" in address, address))


@cache
def _trust() -> ssl.SSLContext:
    """Return whose certificates are trusted: the system's authorities, a company's own too, and the public ones."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def post(
    url: str, body: bytes, headers: Mapping[str, str], *, allowed: Sequence[IPNetwork], timeout_seconds: float
) -> int:
    """Send a request and return its answer's status; raises Unreachable when there is none in time."""
    deadline = _Deadline(timeout_seconds)
    timeout = dict.fromkeys(("connect", "read", "write", "pool"), timeout_seconds)
    try:
        with (
            httpcore.ConnectionPool(_trust(), network_backend=_GuardedBackend(allowed, deadline)) as pool,
            pool.stream(
                "POST", url, headers=list(headers.items()), content=body, extensions={"timeout": timeout}
            ) as answer,
        ):
            status: int = answer.status
            return status
    except httpcore.TimeoutException as error:
        raise Unreachable(f"There was no answer within {timeout_seconds:.0f} seconds.") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError) as error:
        raise Unreachable(f"The connection failed: {error or type(error).__name__}."[:300]) from error
