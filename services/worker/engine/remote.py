"""The remote engine: a model that another server serves, behind the same protocol as our own (ADR 0010).

HTTP lives in a thread of its own with one event loop. The child's loop hands calls over and takes answers out, so it
never waits for a server, and what hangs there hangs nobody here.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from services.worker.engine.remote_client import RemoteServer
from services.worker.engine.remote_dispatcher import Call, Dispatcher, Patience
from services.worker.engine.remote_policy import FlowControl
from services.worker.protocol import EngineStatistics, ModelSpec, Output, Request, Response
from services.worker.threads import vital
from shared.domain.remote import RemoteAddress
from shared.settings import RemoteSettings, read_secret

ONLINE_PATIENCE_SECONDS = 10.0
"""How long an online call waits for a server that is away, if a batch line may wait for longer."""
LOOK_SECONDS = 0.5
CLOSE_SECONDS = 5.0


class RemoteEngine:
    """Serves one model of one OpenAI-compatible server. `wake` is called, from another thread, when `step` has news."""

    def __init__(self, address: RemoteAddress, settings: RemoteSettings, wake: Callable[[], None]) -> None:
        self._address, self._settings, self._wake = address, settings, wake
        self._calls: dict[int, Call] = {}
        """What has no answer yet, or one that no step has given out yet."""
        self._news: deque[Output] = deque()
        self._is_told = False
        self._tokens = self._prompt_tokens = self._cached_tokens = self._aborts = 0
        self._loop = asyncio.new_event_loop()
        self._dispatcher = self._loop.run_until_complete(self._connect())
        name = f"remote {address.host}"
        self._thread = threading.Thread(target=vital, args=(self._run,), name=name, daemon=True)
        self._thread.start()

    async def _connect(self) -> Dispatcher:
        settings, address = self._settings, self._address
        flow = FlowControl(most=address.concurrency or settings.remote_concurrency)
        patience = Patience(
            settings.remote_patience_seconds,
            min(ONLINE_PATIENCE_SECONDS, settings.remote_patience_seconds),
            settings.remote_silence_seconds,
        )
        server = RemoteServer(address, lambda: read_secret(address.key_variable or ""), settings.remote_timeout_seconds)
        return Dispatcher(server, flow, patience, self._tell)

    def _run(self) -> None:
        self._loop.run_until_complete(self._dispatcher.run())
        self._loop.close()

    def _tell(self, output: Output) -> None:
        """Hand an output to the next step; called in the thread of the event loop."""
        self._news.append(output)
        if not self._is_told:
            self._is_told = True
            self._wake()

    @property
    def weight_bytes(self) -> int:
        return 0

    @property
    def progress(self) -> int:
        """Grows as long as the event loop turns: a call may take minutes, and has time-outs of its own."""
        return self._dispatcher.ticks

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def statistics(self) -> EngineStatistics:
        in_flight = self._dispatcher.in_flight
        return EngineStatistics(
            tokens=self._tokens,
            prompt_tokens_computed=self._prompt_tokens - self._cached_tokens,
            prompt_tokens_cached=self._cached_tokens,
            aborts=self._aborts,
            running=in_flight,
            waiting=max(0, len(self._calls) - in_flight),
        )

    def add(self, request: Request) -> None:
        call = self._calls[request.id] = Call(request)
        self._loop.call_soon_threadsafe(self._dispatcher.add, call)

    def abort(self, request_id: int) -> Response | None:
        call = self._calls.pop(request_id, None)
        if call is None:
            return None
        self._loop.call_soon_threadsafe(self._dispatcher.drop, call)
        self._aborts += 1
        return call.used

    def step(self) -> Output:
        """Give out what has come; what came for a request that was aborted meanwhile is dropped."""
        self._is_told = False  # before the news are taken: what comes now tells of itself again
        output = Output([], [])
        while self._news:
            news = self._news.popleft()
            output.deltas += [delta for delta in news.deltas if delta.id in self._calls]
            output.responses += [response for response in news.responses if self._calls.pop(response.id, None)]
        for response in output.responses:
            self._tokens += response.completion_tokens or (response.prompt_tokens if response.embeddings else 0)
            self._prompt_tokens += response.prompt_tokens
            self._cached_tokens += response.cached_tokens
        # An answer that is no fault goes first: what gives a whole slice back must not cost it what has come with it.
        output.responses.sort(key=lambda response: response.fault is not None)
        return output

    def wait_seconds(self) -> float | None:
        if self._news:
            return 0.0
        return LOOK_SECONDS if self._calls else None

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._dispatcher.stop)
        self._thread.join(CLOSE_SECONDS)

    def check_integrity(self) -> None:
        """Raise AssertionError when calls are in flight that nobody waits for; for when there is nothing to do."""
        assert self._calls or not self._dispatcher.in_flight, "calls are in flight that nobody waits for"


def load_remote(spec: ModelSpec, settings: RemoteSettings, wake: Callable[[], None]) -> RemoteEngine:
    """Return the engine of a registered remote model; raises ModelRefused for an address that may not be used.

    The server is not asked for anything yet: one that is away now may be there when the first call comes.
    """
    address = RemoteAddress.parse(spec.source, spec.revision or spec.name)
    address.check_allowed(settings.remote_hosts)
    return RemoteEngine(address, settings, wake)
