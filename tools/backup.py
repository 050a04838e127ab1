"""Backs a deployment up, and restores it, each in one command. It needs Python and Docker Compose, nothing else.

    python3 tools/backup.py save FOLDER      while everything runs
    python3 tools/backup.py check FOLDER     are the archives what was written?
    python3 tools/backup.py restore FOLDER   into volumes that are empty; then everything is started and checked

A backup is Postgres as it lies on disk, then the store, then the secrets, and last a manifest of their SHA-256.
Postgres goes first: files are written before the row that names them, so the store's copy has all that a row names.
Postgres is not dumped: events are read in the order of its transactions' numbers, which a dump does not keep.

With `--data DIR` it does the same for `lamplighter up --data DIR` (run it with `.venv/bin/python`). Restore such a one
to the path where it was: models name their directories in full.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Protocol

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "manifest.json"
POSTGRES, STORE, SECRETS = "postgres.tar", "store.tar", "secrets"
BLOCK_BYTES = 1 << 20
READY_SECONDS = 180
BASE_BACKUP = ["-D", "-", "-Ft", "-X", "fetch", "-c", "fast"]
"""One archive on standard output, with the log that was written meanwhile, begun at once."""
CHANGED_MEANWHILE = 1
"""How GNU tar ends when something went or grew while it was read. What counts is looked at after a restore."""
UNPACK_POSTGRES = """
set -e
if [ -n "$(ls -A "$PGDATA" 2>/dev/null)" ]; then echo "Postgres' volume is not empty" >&2; exit 1; fi
mkdir -p "$PGDATA"; tar -C "$PGDATA" -xpf -
chown -R postgres "$PGDATA"; chmod 700 "$PGDATA"
PATH="$PATH:$(echo /usr/lib/postgresql/*/bin | tr ' ' :)" pg_verifybackup "$PGDATA" >&2
"""
UNPACK_STORE = """
set -e
if [ -n "$(ls -A /data/store)" ]; then echo "the store's volume is not empty" >&2; exit 1; fi
tar -C /data/store -xf -
"""


class Deployment(Protocol):
    """What is backed up. Commands write an archive to their standard output, or read one from their input."""

    secrets: Path

    def pack_postgres(self) -> list[str]: ...
    def pack_store(self) -> list[str]: ...
    def unpack(self, postgres: BinaryIO, store: BinaryIO) -> None: ...
    def audit(self) -> dict[str, Any]:
        """Start what was restored and return what `services.scheduler.store_audit` found."""
        ...


def save(deployment: Deployment, folder: Path) -> None:
    """Make a backup in a folder that is not there yet; without a manifest it is not whole."""
    folder.mkdir(parents=True, mode=0o700)
    parts = {
        POSTGRES: _collect(deployment.pack_postgres(), folder / POSTGRES, accepted={0}),
        STORE: _collect(deployment.pack_store(), folder / STORE, accepted={0, CHANGED_MEANWHILE}),
        SECRETS: _collect(["cat", str(deployment.secrets)], folder / SECRETS, accepted={0}),
    }
    manifest = {"format": 1, "made_at": datetime.now(timezone.utc).isoformat(), "parts": parts}  # noqa: UP017  # 3.9
    with (folder / MANIFEST).open("x") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    print(f"saved {sum(part['bytes'] for part in parts.values()):,} bytes to {folder}")


def _collect(command: list[str], path: Path, accepted: set[int]) -> dict[str, Any]:
    """Write what a command prints to a file only its owner can read; return its size and digest."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file, subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        while block := process.stdout.read(BLOCK_BYTES):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    if process.returncode not in accepted:
        raise SystemExit(
            f"{path.name}: {shlex.join(command[:4])} … ended with {process.returncode}; this is no backup."
        )
    return {"bytes": size, "sha256": digest.hexdigest()}


def check(folder: Path) -> None:
    """Compare the archives with the manifest. Raises SystemExit that names what is not as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise SystemExit(f"{folder} has no {MANIFEST}: it is no backup, or one that was cut off.") from None
    for name, part in manifest["parts"].items():
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        if digest.hexdigest() != part["sha256"]:
            raise SystemExit(f"{folder / name} is not what was written: its SHA-256 is another. Nothing was restored.")
    print(f"{folder} of {manifest['made_at']} is what was written")


def restore(deployment: Deployment, folder: Path) -> None:
    """Check a backup, unpack it where nothing is, start, and compare every file with what Postgres says of it."""
    check(folder)
    if not deployment.secrets.exists():
        deployment.secrets.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / SECRETS, deployment.secrets)
        deployment.secrets.chmod(0o600)
    with (folder / POSTGRES).open("rb") as postgres, (folder / STORE).open("rb") as store:
        deployment.unpack(postgres, store)
    found = deployment.audit()
    for sentence in found["wrong"]:
        print(sentence, file=sys.stderr)
    if found["wrong"]:
        raise SystemExit(f"restored, but {len(found['wrong'])} objects of the store are not as Postgres says.")
    print(f"restored; {found['objects']:,} objects of the store, {found['bytes']:,} bytes, are as Postgres says")


class Composed:
    """A deployment of docker-compose.yml."""

    def __init__(self, command: str, env_file: Path) -> None:
        self.secrets = env_file
        self._command = [*shlex.split(command), "--env-file", str(env_file)]

    def _inside(self, service: str, *command: str) -> list[str]:
        """Return a command that runs in a new container of a service, beside its volumes."""
        return [*self._command, "run", "--rm", "-T", "--no-deps", "--entrypoint", command[0], service, *command[1:]]

    def pack_postgres(self) -> list[str]:
        return [*self._command, "exec", "-T", "postgres", "pg_basebackup", "-U", "postgres", *BASE_BACKUP]

    def pack_store(self) -> list[str]:
        # Of a file that is being written only the finished form counts.
        return self._inside("scheduler", "tar", "-C", "/data/store", "--exclude=*.part", "-cf", "-", ".")

    def unpack(self, postgres: BinaryIO, store: BinaryIO) -> None:
        _run(self._inside("scheduler", "sh", "-c", UNPACK_STORE), stdin=store)
        _run(self._inside("postgres", "sh", "-c", UNPACK_POSTGRES), stdin=postgres)
        _run([*self._command, "up", "-d", "postgres"])
        # The superuser's password is the backup's; this deployment's may be another. The socket asks for none.
        change = "ALTER ROLE postgres PASSWORD :'password'"
        psql = 'psql -q -U postgres -v "password=$POSTGRES_PASSWORD" -v ON_ERROR_STOP=1'
        _retry([*self._command, "exec", "-T", "postgres", "sh", "-c", f'echo "{change}" | {psql}'])
        _run([*self._command, "up", "-d"])

    def audit(self) -> dict[str, Any]:
        command = [*self._command, "exec", "-T", "scheduler", "python", "-m", "services.scheduler.store_audit"]
        return _audited(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False))


class Embedded:
    """The servers of `lamplighter up`, or what they left in their directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        self._cluster, self.secrets = self._directory / "postgres", self._directory / "postgres.json"

    def pack_postgres(self) -> list[str]:
        from services.local import postgres

        try:
            port = (self._cluster / "postmaster.pid").read_text().splitlines()[3]
        except FileNotFoundError:
            raise SystemExit(f"nothing runs on {self._directory}: lamplighter up --data {self._directory}") from None
        password = json.loads(self.secrets.read_text())["superuser"]
        # By its environment: a command line is seen by everybody.
        os.environ["PGPASSWORD"] = password
        where = ["-h", "127.0.0.1", "-p", port, "-U", "postgres"]
        return [str(postgres.binary("pg_basebackup")), *where, *BASE_BACKUP]

    def pack_store(self) -> list[str]:
        return ["tar", "-C", str(self._directory / "store"), "--exclude=*.part", "-cf", "-", "."]

    def unpack(self, postgres: BinaryIO, store: BinaryIO) -> None:
        from services.local.postgres import let_user_in, system_user

        for path in (self._cluster, self._directory / "store"):
            if path.exists() and any(path.iterdir()):
                raise SystemExit(f"{path} is not empty. Nothing was restored.")
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        _run(["tar", "-C", str(self._directory / "store"), "-xf", "-"], stdin=store)
        _run(["tar", "-C", str(self._cluster), "-xpf", "-"], stdin=postgres)
        # The wheel's pg_verifybackup 18 crashes on every backup; the archive's SHA-256 has been looked at.
        if (user := system_user()) is not None:
            let_user_in(self._cluster, user)
            _run(["chown", "-R", user, str(self._cluster)])

    def audit(self) -> dict[str, Any]:
        with self._postgres() as url:
            own = {
                "LAMPLIGHTER_DATABASE_URL": url,
                "LAMPLIGHTER_REDIS_URL": "redis://127.0.0.1:1/0",  # not asked
                "LAMPLIGHTER_STORE_URL": str(self._directory / "store"),
            }
            command = [sys.executable, "-m", "services.scheduler.store_audit"]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | own, check=False)
        return _audited(done)

    @contextlib.contextmanager
    def _postgres(self) -> Iterator[str]:
        """Run the restored Postgres; yields the scheduler's URL."""
        from services.local import postgres

        cluster = postgres.prepare(self._cluster)
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(cluster.command(), stdout=log, stderr=log, user=postgres.system_user(), cwd="/")
            try:
                _retry([str(postgres.binary("pg_isready")), "-q", "-h", "127.0.0.1", "-p", str(cluster.port)])
                yield cluster.url("scheduler")
            finally:
                process.send_signal(signal.SIGINT)
                process.wait()


def _audited(done: "subprocess.CompletedProcess[bytes]") -> dict[str, Any]:
    """Return what the audit printed. Raises SystemExit when it could not look."""
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise SystemExit(f"restored, but the store could not be compared with Postgres (status {done.returncode}).")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _run(command: list[str], stdin: "BinaryIO | None" = None) -> None:
    """Run a command to its end. Raises SystemExit when it fails."""
    done = subprocess.run(command, cwd=ROOT, stdin=stdin or subprocess.DEVNULL, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)[:300]} ended with {done.returncode}.")


def _retry(command: list[str]) -> None:
    """Run a command until it succeeds: what it asks is being started."""
    deadline = time.monotonic() + READY_SECONDS
    while subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            raise SystemExit(f"{shlex.join(command)[:300]} did not succeed within {READY_SECONDS} s.")
        time.sleep(0.5)


def _compose() -> str:
    """Return the command of whichever Compose there is."""
    asked = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return "docker compose" if asked.returncode == 0 else "docker-compose"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("save", "check", "restore"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="of `lamplighter up`; without it, what docker-compose.yml deploys")
    parser.add_argument("--compose", help="command, such as 'docker compose -p other -f docker-compose.yml'")
    parser.add_argument("--env-file", type=Path, default=ROOT / ".env")
    arguments = parser.parse_args()
    if arguments.what == "check":
        check(arguments.folder)
        return
    deployment: Deployment
    if arguments.data is not None:
        sys.path.insert(0, str(ROOT))
        deployment = Embedded(arguments.data)
    else:
        deployment = Composed(arguments.compose or _compose(), arguments.env_file.resolve())
    {"save": save, "restore": restore}[arguments.what](deployment, arguments.folder.resolve())


if __name__ == "__main__":
    main()
