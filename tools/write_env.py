"""Writes `.env` for docker-compose.yml: every secret random, readable by its owner only. Overwrites none."""

import argparse
import os
import secrets
from pathlib import Path

HOSTS = ("localhost", "127.0.0.1", "[::1]", "gateway")
"""What the gateway of docker-compose.yml is called from the start."""
PASSWORDS = ("POSTGRES", "REDIS", "FLOWER", "GRAFANA", "MIGRATION", "GATEWAY", "PREPROCESSOR", "WORKER", "SCHEDULER")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=Path(".env"))
    parser.add_argument(
        "--host", action="append", default=[], metavar="NAME", help="further name of the gateway; may be repeated"
    )
    arguments = parser.parse_args()
    path: Path = arguments.path
    lines = [f"{name}_PASSWORD={secrets.token_hex(24)}" for name in PASSWORDS]
    lines.append(f"ADMIN_KEY=lk-{secrets.token_hex(8)}-{secrets.token_urlsafe(32)}")
    if arguments.host:
        lines.append(f"LAMPLIGHTER_ALLOWED_HOSTS={','.join([*HOSTS, *arguments.host])}")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SystemExit(f"{path} is there already; it stays as it is.") from None
    with os.fdopen(descriptor, "w") as file:
        file.write("\n".join(lines) + "\n")
    print(f"wrote {path}; the admin key is ADMIN_KEY in it")


if __name__ == "__main__":
    main()
