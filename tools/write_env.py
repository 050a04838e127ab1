"""Makes `.env` of `.env.example` for docker-compose.yml: random secrets, for its owner only. Overwrites none."""

import argparse
import os
import secrets
from pathlib import Path

HOSTS = ("localhost", "127.0.0.1", "[::1]", "gateway")
"""What the gateway of docker-compose.yml is called from the start."""
EXAMPLE = Path(__file__).resolve().parents[1] / ".env.example"


def filled(line: str) -> str:
    """Return a line of the example, with a value for a secret that has none."""
    name, _, value = line.partition("=")
    if value or line.startswith("#"):
        return line
    if name.endswith("_PASSWORD"):
        return f"{name}={secrets.token_hex(24)}"
    return f"{name}=lk-{secrets.token_hex(8)}-{secrets.token_urlsafe(32)}" if name == "ADMIN_KEY" else line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=Path(".env"))
    parser.add_argument(
        "--host", action="append", default=[], metavar="NAME", help="further name of the gateway; may be repeated"
    )
    arguments = parser.parse_args()
    path: Path = arguments.path
    lines = [filled(line) for line in EXAMPLE.read_text().splitlines()]
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
