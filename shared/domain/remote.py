"""Where a remote model is: an OpenAI-compatible server and the model's name there, as the registry keeps them.

In the registry `source` is the server's base URL and `revision` the name there. How the server is to be used stands in
the URL's fragment, a part that is never sent anywhere: `http://gpu-1:8000/v1#key=LAMPLIGHTER_REMOTE_KEY_VLLM`, and
`&concurrency=64`. `key` is the *name* of the variable that holds the server's key on the worker: no database has it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import SplitResult, parse_qs, urlencode, urlsplit

from shared.domain.errors import ModelRefused

KEY_VARIABLE = r"^LAMPLIGHTER_REMOTE_KEY_[A-Z0-9_]{1,100}$"
"""Names of variables that may hold a remote server's key: with any other, an admin could have secrets sent away."""
MOST_CONCURRENCY = 1024
_SCHEMES = {"http": 80, "https": 443}
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f-\x9f\\]")


def is_remote(source: str) -> bool:
    """Return whether a model's source is a server and not a directory or a hub id."""
    return source.lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class RemoteAddress:
    """`url` is what stands before `/chat/completions`; `concurrency` bounds the calls that one worker has there."""

    url: str
    model: str
    key_variable: str | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        """Raise ModelRefused for a URL that cannot be used, or that holds what must not be kept."""
        parts = _split(self.url)
        if parts.username is not None or parts.password is not None:
            raise ModelRefused("The URL holds credentials. Name the variable that holds the server's key instead.")
        if parts.query or parts.fragment or self.url.endswith(("?", "#")):
            raise ModelRefused("The URL of a server ends with its path, such as http://HOST:PORT/v1.")
        if not self.model:
            raise ModelRefused("The model has no name on its server.")
        if self.key_variable is not None and not re.fullmatch(KEY_VARIABLE, self.key_variable):
            raise ModelRefused(f"{self.key_variable[:200]!r} is no name like LAMPLIGHTER_REMOTE_KEY_NAME.")
        if self.concurrency is not None and not 1 <= self.concurrency <= MOST_CONCURRENCY:
            raise ModelRefused(f"The concurrency must be from 1 to {MOST_CONCURRENCY}.")

    @classmethod
    def parse(cls, source: str, model: str) -> "RemoteAddress":
        """Return the address that the registry's `source` and `revision` stand for. Raises ModelRefused."""
        url, _, fragment = source.partition("#")
        options = parse_qs(fragment)
        concurrency = options.get("concurrency", [None])[0]
        if concurrency is not None and not concurrency.isdecimal():
            raise ModelRefused("The concurrency must be a number.")
        return cls(url, model, options.get("key", [None])[0], int(concurrency) if concurrency else None)

    @property
    def source(self) -> str:
        """What the registry keeps, the model's name apart."""
        options = {"key": self.key_variable, "concurrency": self.concurrency}
        fragment = urlencode({name: value for name, value in options.items() if value is not None})
        return f"{self.url.rstrip('/')}#{fragment}" if fragment else self.url.rstrip("/")

    @property
    def host(self) -> str:
        """`HOST:PORT`, the port always there."""
        parts = _split(self.url)
        return f"{parts.hostname}:{parts.port or _SCHEMES[parts.scheme]}"

    def endpoint(self, path: str) -> str:
        """Return the URL of one of the server's endpoints."""
        return f"{self.url.rstrip('/')}/{path}"

    def check_allowed(self, hosts: Sequence[str]) -> None:
        """Raise ModelRefused unless one of `hosts` matches: `HOST`, `HOST:PORT`, with `*` for any characters."""
        host, _, port = self.host.rpartition(":")
        names = {host.lower(), f"{host}:{port}".lower()}
        if not any(fnmatchcase(name, pattern.lower()) for pattern in hosts for name in names):
            raise ModelRefused(f"The host {self.host} is not among those that LAMPLIGHTER_REMOTE_HOSTS allows.")


def _split(url: str) -> SplitResult:
    """Return a URL's parts; raises ModelRefused unless it names a server by http or https."""
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or _UNPRINTABLE.search(url):
        # Not repeated: what is wrong with it may be a password in the wrong place.
        raise ModelRefused("The URL is not one of a server, such as http://HOST:PORT/v1.")
    return parts
