"""Makes `.env` of `.env.example` for docker-compose.yml: random secrets, for its owner only. Overwrites none."""

import argparse
import os
import secrets
from pathlib import Path

HOSTS = ("localhost", "127.0.0.1", "[::1]", "gateway")
"""What the gateway of docker-compose.yml is called from the start."""
WORKER_SECRETS = ("WORKER_PASSWORD=", "REDIS_PASSWORD=")
WORKER_PLACES = ("LAMPLIGHTER_MAIN_ADDRESS", "LAMPLIGHTER_STORE", "LAMPLIGHTER_WEIGHTS", "LAMPLIGHTER_MODELS")
EXAMPLE = Path(__file__).resolve().parents[1] / ".env.example"


def filled(line: str) -> str:
    """Return a line of the example, with a value for a secret that has none."""
    name, _, value = line.partition("=")
    if value or line.startswith("#"):
        return line
    if name.endswith("_PASSWORD"):
        return f"{name}={secrets.token_hex(24)}"
    return f"{name}=lk-{secrets.token_hex(8)}-{secrets.token_urlsafe(32)}" if name == "ADMIN_KEY" else line


def of_a_worker(path: Path) -> list[str]:
    """Return what a machine with workers alone needs of a deployment's variables, and the names of what to fill in."""
    secrets_of = [line for line in path.read_text().splitlines() if line.startswith(WORKER_SECRETS)]
    if len(secrets_of) < len(WORKER_SECRETS):
        raise SystemExit(f"{path} has not {' and '.join(WORKER_SECRETS)}: it is no deployment's.")
    return [*secrets_of, *(f"{name}=" for name in WORKER_PLACES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=Path(".env"))
    parser.add_argument(
        "--host", action="append", default=[], metavar="NAME", help="further name of the gateway; may be repeated"
    )
    parser.add_argument(
        "--worker",
        type=Path,
        metavar="FROM",
        help="for docker-compose.worker.yml on another machine: of this one's .env",
    )
    arguments = parser.parse_args()
    path: Path = arguments.path
    if arguments.worker is not None:
        lines = of_a_worker(arguments.worker)
    else:
        lines = [filled(line) for line in EXAMPLE.read_text().splitlines()]
    if arguments.host:
        lines.append(f"LAMPLIGHTER_ALLOWED_HOSTS={','.join([*HOSTS, *arguments.host])}")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SystemExit(f"{path} is there already; it stays as it is.") from None
    with os.fdopen(descriptor, "w") as file:
        file.write("\n".join(lines) + "\n")
    print(f"wrote {path}; " + ("fill in its last lines" if arguments.worker else "the admin key is ADMIN_KEY in it"))


if __name__ == "__main__":
    main()
