"""The engine child's loop: take requests in, step every engine that has work, send answers out.

Torch is imported only when a model needs it, so a child that serves `echo` starts at once.
"""

import argparse
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable

from services.worker.engine.echo import EchoEngine
from services.worker.engine.engine import Engine
from services.worker.engine.statistics import merged
from services.worker.model_cache import ModelCache
from services.worker.protocol import (
    Abort,
    Budget,
    Channel,
    EngineStatistics,
    ModelSpec,
    Output,
    Ping,
    Pong,
    Request,
    RequestFault,
    Response,
    Stop,
    Submit,
    ToChild,
)
from shared.domain.errors import ModelRefused
from shared.logging import configure_logging
from shared.model_files import DEFAULT_KV_TOKENS

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.5
LOAD_POLL_SECONDS = 0.02


class EngineProcess:
    """The loop's state: engines behind the cache, and requests that wait for their model."""

    def __init__(self, channel: Channel, cache: ModelCache) -> None:
        self._channel, self._cache = channel, cache
        self._inbox: queue.SimpleQueue[ToChild | None] = queue.SimpleQueue()
        self._waiting: dict[str, tuple[ModelSpec, list[Request]]] = {}
        self._owner: dict[int, Engine] = {}
        self._turns = 0
        self._placements = 0

    def run(self) -> None:
        """Serve until the worker says stop or is gone."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        while self._handle(self._messages()):
            self._turns += 1
            self._send(Output(self._place_waiting()))
            for engine in self._cache.engines():
                if engine.wait_seconds() is not None:
                    self._send(engine.step())

    def _read(self) -> None:
        while (message := self._channel.receive_in_child()) is not None:
            self._inbox.put(message)
        # The worker is gone, so nobody wants the answers: end now, even in the middle of a forward pass.
        os._exit(0)

    def wake(self) -> None:
        """Have the loop look at its engines now: one of them has something that came from elsewhere. For any thread."""
        self._inbox.put(None)

    def _messages(self) -> list[ToChild]:
        """Return what has arrived; wait for it as long as no engine has anything to do."""
        messages: list[ToChild] = []
        try:
            message = self._inbox.get(timeout=self._idle_seconds())
            while message is not None:
                messages.append(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return messages
        return messages

    def _idle_seconds(self) -> float:
        waits = [wait for engine in self._cache.engines() if (wait := engine.wait_seconds()) is not None]
        if self._waiting:
            waits.append(LOAD_POLL_SECONDS)
        if not waits:
            self._cache.shrink()
            self._cache.check_integrity()
        return min([*waits, IDLE_SECONDS])

    def _handle(self, messages: list[ToChild]) -> bool:
        for message in messages:
            if isinstance(message, Submit):
                for request in message.requests:
                    request.adapter = message.model.adapter
                self._waiting.setdefault(message.model.key, (message.model, []))[1].extend(message.requests)
            elif isinstance(message, Abort):
                self._send(Output(self._abort(set(message.ids))))
            elif isinstance(message, Budget):
                self._cache.resize(message.cache_bytes)
            elif isinstance(message, Ping):
                self._cache.shrink()
                self._pong()
            elif isinstance(message, Stop):
                return False
        return True

    def _abort(self, ids: set[int]) -> list[Response]:
        """Forget requests; return what each of those that are known has used."""
        aborted = []
        for identifier in ids:
            engine = self._owner.pop(identifier, None)
            if engine is not None and (response := engine.abort(identifier)) is not None:
                aborted.append(response)
        for _, requests in self._waiting.values():
            aborted += [Response(request.id, is_aborted=True) for request in requests if request.id in ids]
            requests[:] = [request for request in requests if request.id not in ids]
        return aborted

    def _place_waiting(self) -> list[Response]:
        """Give requests to their engines once these are loaded; refuse those whose model cannot be served."""
        refused: list[Response] = []
        for key, (spec, requests) in list(self._waiting.items()):
            try:
                engine = self._cache.get(spec)
            except ModelRefused as error:
                fault = RequestFault(f"The model {spec.name!r}: {error.message}", 400, "model", "model_refused")
            except Exception:
                # Not the model's fault, as far as is known: memory, a disk. Without a status it is tried again.
                log.exception("model did not load", extra={"model": spec.name})
                fault = RequestFault(f"The model {spec.name!r} could not be loaded just now.")
            else:
                if engine is not None:
                    del self._waiting[key]
                    self._placements += 1
                    refused += [refusal for request in requests if (refusal := self._give(engine, request))]
                continue
            del self._waiting[key]
            refused += [Response(request.id, fault=fault) for request in requests]
        return refused

    def _give(self, engine: Engine, request: Request) -> Response | None:
        """Hand a request over; return a refusal when its text cannot be made into tokens, which harms nobody else."""
        self._owner[request.id] = engine
        try:
            engine.add(request)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  # answered to whoever asked
            # Chat templates refuse roles and orders by raising, and tokenizers have opinions of their own.
            log.warning("request refused", extra={"reason": type(error).__name__, "tenant": request.namespace})
            del self._owner[request.id]
            param = "prompt" if request.messages is None else "messages"
            message = f"The model cannot take this request: {str(error)[:300]}"
            return Response(request.id, fault=RequestFault(message, 400, param, "invalid_value"))
        return None

    def _send(self, output: Output) -> None:
        if output:
            for response in output.responses:
                self._owner.pop(response.id, None)
            self._channel.send(output)

    def _pong(self) -> None:
        engines = self._cache.engines()
        waiting = list(self._waiting.values())
        n_waiting = sum(len(requests) for _, requests in waiting)
        # A load may take minutes and moves nothing: as long as the loop turns for it, the child is well.
        progress = sum(engine.progress for engine in engines) + (self._turns if n_waiting else 0)
        self._channel.send(
            Pong(
                progress=progress,
                in_flight=len(self._owner) + n_waiting,
                models=self._cache.names,
                load_seconds=self._cache.load_seconds,
                model_loads=self._cache.loads,
                cache_bytes=self._cache.used_bytes,
                tokens=sum(engine.tokens for engine in engines),
                # Each load is followed by one placement, which had to wait for it (or for an adapter that it is for).
                model_hits=max(0, self._placements - self._cache.loads),
                engines=self._statistics(engines),
                at_seconds=time.monotonic(),
                budget_bytes=self._cache.budget_bytes,
                lacking_room=sum(len(requests) for spec, requests in waiting if self._cache.lacks_room(spec)),
            )
        )

    def _statistics(self, engines: list[Engine]) -> dict[str, EngineStatistics]:
        by_name: dict[str, EngineStatistics] = {}
        for engine in engines:
            name, statistics = self._cache.name_of(engine), engine.statistics
            by_name[name] = merged(by_name[name], statistics) if name in by_name else statistics
        return by_name


def load_engine(spec: ModelSpec, device: str, kv_tokens: int, wake: Callable[[], None]) -> Engine:
    """Load a model; torch comes in here, and only here. `wake` is for engines to which things come from elsewhere."""
    if spec.kind == "echo":
        return EchoEngine()
    if spec.kind == "remote":
        from services.worker.engine.remote import load_remote
        from shared.settings import load_remote_settings

        return load_remote(spec, load_remote_settings(), wake)
    from services.worker.engine.loading import load_model

    return load_model(spec, device, kv_tokens)


def estimate_bytes(spec: ModelSpec, kv_tokens: int) -> int:
    """Return what a model will take in memory, from its files alone; raises ModelRefused."""
    if spec.kind in ("echo", "remote"):
        return 0
    from services.worker.engine.loading import model_bytes

    return model_bytes(spec, kv_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine child; started by a worker.")
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--cache-bytes", type=int, required=True)
    parser.add_argument("--kv-tokens", type=int, default=DEFAULT_KV_TOKENS)
    arguments = parser.parse_args()
    configure_logging("engine")
    channel = Channel(socket.socket(fileno=arguments.channel))
    kv_tokens = arguments.kv_tokens
    cache = ModelCache(
        arguments.cache_bytes,
        lambda spec: load_engine(spec, arguments.device, kv_tokens, process.wake),
        lambda spec: estimate_bytes(spec, kv_tokens),
    )
    process = EngineProcess(channel, cache)
    process.run()
    channel.close()
    # Threads of libraries must not hold up the end.
    os._exit(0)


if __name__ == "__main__":
    main()
