"""Makes `.env` of `.env.example` for docker-compose.yml, and a directory of random secrets beside it. Overwrites none.

The directory is its owner's alone. The files in it may be read by whoever gets that far: containers see each one by
itself, as an account without rights.
"""

import argparse
import os
import secrets
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / ".env.example"
HOSTS = ("localhost", "127.0.0.1", "[::1]", "gateway")
"""What the gateway of docker-compose.yml is called from the start."""
ROLES = ("migration", "gateway", "preprocessor", "worker", "scheduler")
SERVICES = ("gateway", "preprocessor", "worker", "scheduler")
"""Roles whose service reaches Postgres by an address of its own."""
WORKER_PLACES = ("LAMPLIGHTER_STORE", "LAMPLIGHTER_WEIGHTS", "LAMPLIGHTER_MODELS")
WORKER_SECRETS = ("worker_database_url", "redis_url")


def new_secrets(known: dict[str, str]) -> dict[str, str]:
    """Return every secret of a deployment, by the name of its file: those that are known, and new ones."""
    made = {f"{name}_password": secrets.token_hex(24) for name in ("postgres", "redis", "flower", "grafana", *ROLES)}
    made["admin_key"] = f"lk-{secrets.token_hex(8)}-{secrets.token_urlsafe(32)}"
    made |= {name: known[name] for name in made if name in known}
    made["superuser_url"] = f"postgresql://postgres:{made['postgres_password']}@postgres:5432/postgres"
    made["redis_url"] = f"redis://lamplighter:{made['redis_password']}@redis:6379/0"
    for role in SERVICES:
        login = f"lamplighter_{role}:{made[f'{role}_password']}"
        made[f"{role}_database_url"] = f"postgresql://{login}@postgres:5432/lamplighter"
    return made


def secrets_of_a_worker(known: Path, address: str) -> dict[str, str]:
    """Return the two secrets that workers on another machine need; they reach this one at `address`."""
    found = {name: (known / name).read_text() for name in WORKER_SECRETS}
    return {
        name: url.replace("@postgres:", f"@{address}:").replace("@redis:", f"@{address}:")
        for name, url in found.items()
    }


def variables(env_file: Path) -> dict[str, str]:
    """Return the variables of an `.env`."""
    lines = [line for line in env_file.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def write(env_file: Path, lines: list[str], files: dict[str, str], *, is_taken_elsewhere: bool = False) -> None:
    """Write both, side by side, to be used there or to be taken beside a docker-compose.yml.

    Raises SystemExit when one of them is there.
    """
    directory = env_file.parent / "secrets"
    env_file.parent.mkdir(parents=True, exist_ok=True)
    for path in (env_file, directory):
        if path.exists():
            raise SystemExit(f"{path} is there already; everything stays as it is.")
    directory.mkdir(mode=0o700)
    for name, value in files.items():
        (directory / name).write_text(value)
        (directory / name).chmod(0o444)
    # Compose takes a relative one from where its file is.
    is_relative = is_taken_elsewhere or env_file.parent.resolve() == ROOT
    named = "./secrets" if is_relative else str(directory.resolve())
    text = "\n".join(lines).replace("LAMPLIGHTER_SECRETS=", f"LAMPLIGHTER_SECRETS={named}", 1)
    with os.fdopen(os.open(env_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=Path(".env"))
    parser.add_argument("--host", action="append", default=[], metavar="NAME", help="further name of the gateway")
    parser.add_argument(
        "--worker", metavar="ADDRESS", help="for docker-compose.worker.yml on a machine that reaches this one there"
    )
    parser.add_argument("--from", dest="old", type=Path, metavar="ENV", help="an `.env` that held the secrets itself")
    parser.add_argument("--secrets", type=Path, default=ROOT / "secrets", help="of --worker: this machine's")
    arguments = parser.parse_args()
    path: Path = arguments.path
    if arguments.worker is not None:
        lines = ["LAMPLIGHTER_SECRETS=", *(f"{name}=" for name in WORKER_PLACES)]
        write(path, lines, secrets_of_a_worker(arguments.secrets, arguments.worker), is_taken_elsewhere=True)
        print(f"wrote {path} and secrets beside it; fill in where the first machine's directories are mounted")
        return
    old = variables(arguments.old) if arguments.old is not None else {}
    made = new_secrets({name.lower(): value for name, value in old.items()})
    lines = EXAMPLE.read_text().splitlines()
    lines += [f"{name}={value}" for name, value in old.items() if name.lower() not in made]
    if arguments.host:
        lines.append(f"LAMPLIGHTER_ALLOWED_HOSTS={','.join([*HOSTS, *arguments.host])}")
    write(path, lines, made, is_taken_elsewhere=arguments.old is not None)
    print(f"wrote {path} and secrets beside it; the admin key is in secrets/admin_key")
    if arguments.old is not None:
        print(f"move both into {ROOT}, in place of {arguments.old}")


if __name__ == "__main__":
    main()
