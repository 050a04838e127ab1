"""What an engine is. One engine serves one loaded model; the child's loop steps every engine that has work."""

from typing import Protocol

from services.worker.protocol import EngineStatistics, Output, Request, Response

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions."""


class Engine(Protocol):
    """Serves one model. All methods are called from the child's loop, one at a time."""

    @property
    def weight_bytes(self) -> int:
        """Memory that the loaded model holds, caches included."""
        ...

    @property
    def progress(self) -> int:
        """A number that grows while the engine works; standing still with work in hand means hanging."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens generated (or embedded) so far."""
        ...

    @property
    def statistics(self) -> EngineStatistics:
        """What it has done since it was loaded, and what it holds; zeros for what it has nothing of."""
        ...

    def add(self, request: Request) -> None:
        """Take a request in; it is answered by some later `step`."""
        ...

    def abort(self, request_id: int) -> Response | None:
        """Forget a request and return what it has used; None for one that is not known."""
        ...

    def step(self) -> Output:
        """Do some work and return the requests that it finished or refused, and what it has of streamed ones."""
        ...

    def wait_seconds(self) -> float | None:
        """Return how long nothing will happen: 0 when there is work to do now, None when there is none at all."""
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...
