"""Backs a deployment up, and restores it, each in one command. It needs Python and Docker Compose, nothing else.

    python3 tools/backup.py save FOLDER      while everything runs
    python3 tools/backup.py check FOLDER     are the archives what was written?
    python3 tools/backup.py restore FOLDER   where nothing is; it is checked, and then everything is started

A backup is Postgres as it lies on disk, then the store, models and weights, then the secrets, and last a manifest of
their SHA-256. Postgres goes first: files are written before the row that names them, so the store's copy has all that a
row names. It is not dumped: events are read in the order of its transactions' numbers, which a dump does not keep.

`restore --no-start` ends when all has been compared: for a rehearsal beside the deployment that it is of, whose
webhooks and schedules would otherwise go off twice. `restore --only store` is for a store that was lost alone, and
`--only postgres` for a Postgres: the other one stays as it is.

With `--data DIR` it does the same for `lamplighter up --data DIR` (run it with `.venv/bin/python`), without models,
which may lie anywhere. Restore such a one to where it was: models that were trained name their directories in full.
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
import tarfile
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Protocol

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "manifest.json"
POSTGRES, STORE, WEIGHTS, MODELS = "postgres.tar", "store.tar", "weights.tar", "models.tar"
SECRETS, VARIABLES = "secrets.tar", "env"
UNPACKED_FIRST = (SECRETS, VARIABLES)
BLOCK_BYTES = 1 << 20
READY_SECONDS = 180
LOG_CHARACTERS = 3000
BASE_BACKUP = ["-D", "-", "-Ft", "-X", "fetch", "-c", "fast"]
"""One archive on standard output, with the log that was written meanwhile, begun at once."""
FORMAT = 3
FORMATS = (2, FORMAT)
"""Those that are read; the second one says of which kind it is."""
PACK = 'tar -C {} --exclude="*.part" --exclude=./.restoring -cf - . || [ $? -eq 1 ]'
"""Of a file that is being written only the finished form counts. GNU tar ends with 1 when something went or grew while
it was read; what counts is looked at after a restore. A Compose that failed ends with 1, too: hence the shell."""
IS_EMPTY = 'if [ -z "$(ls -A {} 2>/dev/null)" ]; then echo is empty; else echo is full; fi'
"""Told by words: a status may as well be that of a Compose that found no engine, image or secret."""
BEGUN = ".restoring"
"""Where models are unpacked before each is put in its place, whole."""
UNPACK_POSTGRES = """
set -e
mkdir -p "$PGDATA"; tar -C "$PGDATA" -xpf -
chown -R postgres "$PGDATA"; chmod 700 "$PGDATA"
status=0
PATH="$PATH:$(echo /usr/lib/postgresql/*/bin | tr ' ' :)" pg_verifybackup "$PGDATA" >&2 || status=$?
# One that was killed by a signal, or is not there, has found nothing: the archive's SHA-256 has been compared before.
if [ "$status" -ge 126 ]; then echo "pg_verifybackup could not look (status $status)" >&2; else exit "$status"; fi
"""
SET_PASSWORD = b"\\set password `cat /run/secrets/postgres_password`\nALTER ROLE postgres PASSWORD :'password';\n"
"""By standard input and the container's own file: a command line is seen by everybody on the machine."""


class Deployment(Protocol):
    """What is backed up. A backup of one `kind` is not restored as another."""

    kind: str

    def packers(self) -> dict[str, list[str]]:
        """Return commands that write an archive to their standard output, by its name."""
        ...

    def psql(self) -> list[str]: ...
    def require_empty(self, name: str) -> None:
        """Raise SystemExit when there is something already where an archive is to be unpacked."""
        ...

    def unpack(self, name: str, archive: BinaryIO) -> None: ...
    def audit(self) -> dict[str, Any]:
        """Start Postgres alone and return what `services.scheduler.store_audit` finds."""
        ...

    def install_secrets(self, folder: Path, names: "list[str]") -> None:
        """Put a backup's secrets where there are none, for their owner alone; `names` are about to be unpacked."""
        ...

    def start(self) -> None: ...


def save(deployment: Deployment, folder: Path) -> None:
    """Make a backup in a folder that is not there yet; without a manifest it is not whole."""
    packers = deployment.packers()
    folder.mkdir(parents=True, mode=0o700)
    parts = {}
    with _log_kept(deployment.psql()):
        parts[POSTGRES] = _collect(packers.pop(POSTGRES), folder / POSTGRES)
    for name, command in packers.items():
        parts[name] = _collect(command, folder / name)
    made_at = datetime.now(timezone.utc).isoformat()  # noqa: UP017  # 3.9
    manifest = {"format": FORMAT, "kind": deployment.kind, "made_at": made_at, "parts": parts}
    with (folder / MANIFEST).open("x") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    print(f"saved {sum(part['bytes'] for part in parts.values()):,} bytes to {folder}")


@contextlib.contextmanager
def _log_kept(psql: list[str]) -> Iterator[None]:
    """Have Postgres keep its log inside the block: the end of a backup needs that of its beginning."""
    command = [*psql, "-qAt", "-v", "ON_ERROR_STOP=1"]
    slot = f"backup_{os.getpid()}_{int(time.time())}"
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write(f"SELECT pg_create_physical_replication_slot('{slot}', true, true) IS NOT NULL;\n")
        session.stdin.flush()
        if session.stdout.readline().strip() != "t":
            raise SystemExit("Postgres does not run, or keeps no log: nothing was saved.")
        yield  # the slot is temporary: it ends with its session


def _collect(command: list[str], path: Path) -> dict[str, Any]:
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
    if process.returncode or not size:
        raise SystemExit(
            f"{path.name}: {shlex.join(command[:4])} … ended with {process.returncode}; this is no backup."
        )
    return {"bytes": size, "sha256": digest.hexdigest()}


def check(folder: Path) -> dict[str, Any]:
    """Return the manifest, compared with the archives. Raises SystemExit that names what is not as it was written."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] not in FORMATS:
            raise SystemExit(f"{folder} has format {manifest['format']}, which another release of this tool reads.")
        manifest.setdefault("kind", Composed.kind if VARIABLES in manifest["parts"] else Embedded.kind)
        for name, part in manifest["parts"].items():
            if _sha256(folder / name) != part["sha256"]:
                raise SystemExit(f"{folder / name} is not what was written: its SHA-256 is another.")
        print(f"{folder}, of {manifest['kind']} on {manifest['made_at']}, is what was written")
    except FileNotFoundError as error:
        cut_off = " It is no backup, or one that was cut off." if error.filename == str(folder / MANIFEST) else ""
        raise SystemExit(f"{error.filename} is missing.{cut_off}") from None
    except OSError as error:
        raise SystemExit(f"{error.filename or folder} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{folder / MANIFEST} is damaged: {error!r}.") from None
    return manifest


def _sha256(path: Path) -> str:
    """Return a file's digest. Raises OSError that names it."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        error.filename = str(path)  # what fails in the middle names nothing
        raise
    return digest.hexdigest()


def restore(
    deployment: Deployment,
    folder: Path,
    *,
    only: "str | None" = None,
    is_started: bool = True,
    is_patient: bool = False,
) -> None:
    """Check a backup, unpack it where nothing is, compare every file with what Postgres says of it, and start.

    With `is_patient` what is not as Postgres says is told, and hinders nothing.
    """
    manifest = check(folder)
    if manifest["kind"] != deployment.kind:
        raise SystemExit(f"{folder} is of {manifest['kind']}, and not of {deployment.kind}. Nothing was restored.")
    names = [name for name in manifest["parts"] if name not in UNPACKED_FIRST and only in (None, name)]
    if POSTGRES in names:
        deployment.install_secrets(folder, names)
    for name in names:  # all are looked at before one is written
        deployment.require_empty(name)
    for name in names:
        with (folder / name).open("rb") as archive:
            deployment.unpack(name, archive)
    found = deployment.audit()
    for sentence in [*found["unknown"], *found["wrong"]]:
        print(sentence, file=sys.stderr)
    if found["wrong"] and not is_patient:
        raise SystemExit(
            f"unpacked, but {len(found['wrong'])} things are not as Postgres says, and nothing else was started. Jobs "
            "that need them will fail. To start all the same: docker compose up -d (lamplighter up)."
        )
    rest = f"; {len(found['wrong'])} things are not" if found["wrong"] else ""
    rest += f"; of {len(found['unknown'])} nobody can say" if found["unknown"] else ""
    print(f"restored; {found['objects']:,} objects of the store, {found['bytes']:,} bytes, are as Postgres says{rest}")
    if is_started:
        deployment.start()


def _unpack_privately(archive: Path, directory: Path) -> None:
    """Unpack into a directory that is its owner's alone from the beginning."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with archive.open("rb") as file:
        _run(["tar", "-C", str(directory), "-xpf", "-"], stdin=file)


class Composed:
    """A deployment of docker-compose.yml."""

    kind = "docker-compose.yml"
    PLACES = {STORE: "/data/store", WEIGHTS: "/data/weights", MODELS: "/models"}  # noqa: RUF012  # read only
    """Where archives lie in the gateway's container, which may write the first two."""

    def __init__(self, command: str, env_file: Path) -> None:
        self._env_file = env_file
        self._command = [*shlex.split(command), "--env-file", str(env_file)]

    def packers(self) -> dict[str, list[str]]:
        postgres = [*self._command, "exec", "-T", "postgres", "pg_basebackup", "-U", "postgres", *BASE_BACKUP]
        packers = {POSTGRES: postgres}
        for name, place in self.PLACES.items():
            packers[name] = self._inside("gateway", "sh", "-c", PACK.format(place))
        packers[SECRETS] = ["tar", "-C", str(self._named("LAMPLIGHTER_SECRETS", "secrets")), "-cf", "-", "."]
        packers[VARIABLES] = ["cat", str(self._env_file)]
        return packers

    def _inside(self, service: str, *command: str) -> list[str]:
        """Return a command that runs in a new container of a service, beside its volumes."""
        return [*self._command, "run", "--rm", "-T", "--no-deps", "--entrypoint", command[0], service, *command[1:]]

    def psql(self) -> list[str]:
        return [*self._command, "exec", "-T", "postgres", "psql", "-U", "postgres"]

    def _named(self, variable: str, usual: str) -> Path:
        """Return a directory of this machine, as the deployment's variables have it."""
        lines = self._env_file.read_text().splitlines()
        written = [line.partition("=")[2] for line in lines if line.startswith(f"{variable}=")]
        return ROOT / (os.environ.get(variable) or (written and _unquoted(variable, written[-1])) or usual)

    def install_secrets(self, folder: Path, names: "list[str]") -> None:  # noqa: ARG002  # volumes have no secrets
        if self._env_file.exists():
            return  # this deployment has its own
        directory = self._env_file.parent / "secrets"
        if directory.exists() and any(directory.iterdir()):
            raise SystemExit(f"{directory} is another deployment's: restore with an --env-file in a place of its own.")
        _unpack_privately(folder / SECRETS, directory)
        lines = (folder / VARIABLES).read_text().splitlines()
        own = [line for line in lines if not line.startswith("LAMPLIGHTER_SECRETS=")]
        with os.fdopen(os.open(self._env_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write("\n".join([*own, f"LAMPLIGHTER_SECRETS={directory}"]) + "\n")

    def require_empty(self, name: str) -> None:
        if name == MODELS:  # what is there stays, as a machine may well have them already
            # Made here: Docker would make it for itself, and nobody else could write to it.
            self._named("LAMPLIGHTER_MODELS", "models").mkdir(parents=True, exist_ok=True)
            return
        service, place = ("postgres", '"$PGDATA"') if name == POSTGRES else ("gateway", self.PLACES[name])
        said = _last_line(self._inside(service, "sh", "-c", IS_EMPTY.format(place)))
        if said == "is full":
            raise SystemExit(
                f"{name}: its volume is not empty, and nothing was unpacked. What is in it may be of a restore that "
                "was cut off: if it may go, remove it (docker volume ls, docker volume rm) and begin again."
            )
        if said != "is empty":
            raise SystemExit(f"{name}: nobody could look at its volume, for the reason above. Nothing was unpacked.")

    def unpack(self, name: str, archive: BinaryIO) -> None:
        if name == POSTGRES:
            _run(self._inside("postgres", "sh", "-c", UNPACK_POSTGRES), stdin=archive)
        elif name != MODELS:
            _run(self._inside("gateway", "tar", "-C", self.PLACES[name], "-xf", "-"), stdin=archive)
        else:
            self._unpack_models(archive)

    def _unpack_models(self, archive: BinaryIO) -> None:
        """Unpack each model that is not there, and put it in its place once it is whole."""
        directory = self._named("LAMPLIGHTER_MODELS", "models")
        shutil.rmtree(directory / BEGUN, ignore_errors=True)
        with tarfile.open(fileobj=archive, mode="r:") as packed:
            models = {name.split("/")[1] for name in packed.getnames() if "/" in name} - {BEGUN}
        if there := sorted(name for name in models if os.path.lexists(directory / name)):
            print(f"{directory} has {', '.join(there)} already; they stay as they are")
        if missing := sorted(models - set(there)):
            (directory / BEGUN).mkdir()
            try:
                os.lseek(archive.fileno(), 0, os.SEEK_SET)
                wanted = [f"./{name}" for name in missing]
                _run(["tar", "-C", str(directory / BEGUN), "-xf", "-", *wanted], stdin=archive)
                for name in missing:
                    (directory / BEGUN / name).rename(directory / name)
            finally:
                shutil.rmtree(directory / BEGUN)

    def audit(self) -> dict[str, Any]:
        _run([*self._command, "up", "-d", "postgres"])
        # The superuser's password is the backup's; this deployment's may be another. The socket asks for none.
        _retry([*self.psql(), "-q", "-v", "ON_ERROR_STOP=1"], SET_PASSWORD)
        _run([*self._command, "run", "--rm", "-T", "--no-deps", "migrate"])  # the services' passwords, too
        return _audited(self._inside("scheduler", "python", "-m", "services.scheduler.store_audit"), {})

    def start(self) -> None:
        _run([*self._command, "up", "-d"])


class Embedded:
    """The servers of `lamplighter up`, or what they left in their directory."""

    kind = "lamplighter up"

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        self._places = {POSTGRES: self._directory / "postgres", STORE: self._directory / "store"}

    def packers(self) -> dict[str, list[str]]:
        return {
            POSTGRES: [*self._program("pg_basebackup"), *BASE_BACKUP],
            STORE: ["sh", "-c", PACK.format(shlex.quote(str(self._places[STORE])))],
            SECRETS: ["tar", "-C", str(self._directory), "-cf", "-", "postgres.json"],
        }

    def _program(self, name: str) -> list[str]:
        """Return a command for the server that runs now. Raises SystemExit where none does."""
        from services.local import postgres

        with contextlib.suppress(FileNotFoundError):
            # By its environment: a command line is seen by everybody.
            os.environ["PGPASSWORD"] = json.loads((self._directory / "postgres.json").read_text())["superuser"]
            port = (self._places[POSTGRES] / "postmaster.pid").read_text().splitlines()[3]
            return [str(postgres.binary(name)), "-h", "127.0.0.1", "-p", port, "-U", "postgres"]
        raise SystemExit(f"Postgres does not run on {self._directory}: nothing was saved.")

    def psql(self) -> list[str]:
        return self._program("psql")

    def install_secrets(self, folder: Path, names: "list[str]") -> None:
        for name in names:  # the secrets of what is there stay
            self.require_empty(name)
        _unpack_privately(folder / SECRETS, self._directory)  # nothing would give the restored cluster other ones

    def require_empty(self, name: str) -> None:
        self._require_stopped()
        if self._places[name].exists() and any(self._places[name].iterdir()):
            raise SystemExit(f"{self._places[name]} is not empty. Nothing was restored.")

    def _require_stopped(self) -> None:
        """Raise SystemExit while Postgres runs here: another one could not be started beside it."""
        from services.local import postgres

        with contextlib.suppress(FileNotFoundError, IndexError):
            port = (self._places[POSTGRES] / "postmaster.pid").read_text().splitlines()[3]
            # Asked, and not looked for by its number, which may be anybody's after a loss of power.
            asked = [str(postgres.binary("pg_isready")), "-q", "-h", "127.0.0.1", "-p", port]
            if subprocess.run(asked, check=False).returncode in (0, 1):
                told = f"Postgres runs on {self._directory}: stop `lamplighter up` first. Nothing was restored."
                raise SystemExit(told)

    def unpack(self, name: str, archive: BinaryIO) -> None:
        from services.local.postgres import let_user_in, system_user

        self._places[name].mkdir(parents=True, exist_ok=True, mode=0o700)
        _run(["tar", "-C", str(self._places[name]), "-xpf", "-"], stdin=archive)
        # The wheel's pg_verifybackup 18 crashes on every backup; the archive's SHA-256 has been looked at.
        if name == POSTGRES and (user := system_user()) is not None:
            let_user_in(self._places[name], user)
            _run(["chown", "-R", user, str(self._places[name])])

    def audit(self) -> dict[str, Any]:
        with self._postgres() as url:
            own = {
                "LAMPLIGHTER_DATABASE_URL": url,
                "LAMPLIGHTER_REDIS_URL": "redis://127.0.0.1:1/0",  # not asked
                "LAMPLIGHTER_STORE_URL": str(self._places[STORE]),
            }
            return _audited([sys.executable, "-m", "services.scheduler.store_audit"], own)

    def start(self) -> None:
        print(f"lamplighter up --data {self._directory}")

    @contextlib.contextmanager
    def _postgres(self) -> Iterator[str]:
        """Run the restored Postgres; yields the scheduler's URL."""
        from services.local import postgres

        cluster = postgres.prepare(self._places[POSTGRES])
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(cluster.command(), stdout=log, stderr=log, user=postgres.system_user(), cwd="/")
            try:
                asked = [str(postgres.binary("pg_isready")), "-q", "-h", "127.0.0.1", "-p", str(cluster.port)]
                _retry(asked, of=process, log=log)
                _migrate(cluster.url("migration"))
                yield cluster.url("scheduler")
            finally:
                process.send_signal(signal.SIGINT)
                process.wait()


def _migrate(url: str) -> None:
    """Bring what an earlier release has saved to this one's schema."""
    from sqlalchemy import create_engine

    from shared.db.setup import migrate

    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://", 1))
    migrate(engine)
    engine.dispose()


def _audited(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Return what the audit prints. Raises SystemExit when it could not look."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | environment, check=False)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise SystemExit(f"unpacked, but the store could not be compared with Postgres (status {done.returncode}).")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _run(command: list[str], stdin: "BinaryIO | None" = None) -> None:
    """Run a command to its end. Raises SystemExit when it fails."""
    done = subprocess.run(command, cwd=ROOT, stdin=stdin or subprocess.DEVNULL, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)[:300]} ended with {done.returncode}.")


def _last_line(command: list[str]) -> str:
    """Return the last line that a command prints; what it says before, of images that are made, is passed on."""
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(last, end="", file=sys.stderr)
            last = line
    return last.strip()


def _unquoted(variable: str, value: str) -> str:
    """Return a value of an `.env` as Compose understands it. Raises SystemExit where it is made of others."""
    value = value.strip()
    if value[:1] in ("'", '"'):
        text, closed, _ = value[1:].partition(value[0])
        value = text if closed else value
    else:
        value = value.partition(" #")[0].strip()
    if "$" in value:
        raise SystemExit(f"{variable}: write it without $, which only Compose can read.")
    return value


def _retry(
    command: list[str],
    said: bytes = b"",
    of: "subprocess.Popen[bytes] | None" = None,
    log: "BinaryIO | None" = None,
) -> None:
    """Run a command until it succeeds, with `said` as its input: what it asks is being started.

    Raises SystemExit after `READY_SECONDS`, or with the end of `log` once the process `of` that it asks has ended.
    """
    deadline = time.monotonic() + READY_SECONDS
    while subprocess.run(command, cwd=ROOT, input=said, capture_output=True, check=False).returncode:
        if of is not None and of.poll() is not None:
            if log is not None:
                log.seek(0)
                sys.stderr.write(log.read().decode(errors="replace")[-LOG_CHARACTERS:])
            raise SystemExit(f"unpacked, but Postgres ended with {of.returncode} at its start.")
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
    parser.add_argument(
        "--no-start", action="store_true", help="of restore: compare everything, and start nothing else"
    )
    parser.add_argument(
        "--start-anyway", action="store_true", help="of restore: also when something is not as Postgres says"
    )
    parser.add_argument("--only", choices=("store", "postgres"), help="of restore: this alone; the other one is well")
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
    folder = arguments.folder.resolve()
    if arguments.what == "save":
        save(deployment, folder)
    else:
        only = f"{arguments.only}.tar" if arguments.only else None
        # Of what was lost alone, all that came since the backup is missing, which is no reason to stand still.
        is_patient = arguments.start_anyway or only is not None
        restore(deployment, folder, only=only, is_started=not arguments.no_start, is_patient=is_patient)


if __name__ == "__main__":
    main()
