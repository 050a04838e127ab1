"""A user of a real Redis that can be refused for a while: an outage that one party sees and others do not."""

from collections.abc import Iterator
from contextlib import contextmanager

from redis import Redis

from services.local.valkey import ValkeyServer

NAME, PASSWORD = "worker", "of-a-test"


@contextmanager
def own_user(server: ValkeyServer, client: Redis) -> Iterator[str]:
    """Make the user and yield the URL with which it connects."""
    client.acl_setuser(NAME, enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], commands=["+@all"])
    try:
        yield f"redis://{NAME}:{PASSWORD}@127.0.0.1:{server.port}/0"
    finally:
        client.acl_deluser(NAME)


@contextmanager
def refused_user(client: Redis) -> Iterator[None]:
    """Cut the user's connections and refuse new ones inside the block."""
    client.acl_setuser(NAME, enabled=False)
    client.client_kill_filter(user=NAME)
    try:
        yield
    finally:
        client.acl_setuser(NAME, enabled=True)
