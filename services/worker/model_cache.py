"""Models that a child has loaded: each once, kept by recency within a byte budget, never dropped while in use."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from services.worker.engine.engine import Engine
from services.worker.protocol import ModelSpec
from shared.domain.errors import ModelRefused

PATIENCE_SECONDS = 10.0
LOADS_OF_PATIENCE = 5.0
"""A model that finds all others in use waits so long, or so many times as long as one of them took to load."""
FORGET_SECONDS = 30.0
"""A model that was not asked for during so long waits no more: its requests were aborted."""

Loader = Callable[[ModelSpec], Engine]
Sizer = Callable[[ModelSpec], int]


@dataclass
class _Loading:
    """A load in a thread of its own; everybody who wants the model waits for this one."""

    spec: ModelSpec
    bytes: int
    began_at: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)
    engine: Engine | None = None
    error: Exception | None = None


@dataclass
class _Entry:
    engine: Engine
    name: str
    bytes: int
    used_at: float
    loaded_at: float
    load_seconds: float


@dataclass
class _Want:
    """A model that waits for room. Once it has waited long enough, `leaving` takes nothing new until it is idle."""

    since: float
    asked_at: float
    leaving: str | None = None


class ModelCache:
    """`get` never blocks: it returns an engine, or None while the model is being loaded or has to wait for room."""

    def __init__(self, budget_bytes: int, load: Loader, size: Sizer) -> None:
        self.budget_bytes = budget_bytes
        self.loads = 0
        self._load, self._size = load, size
        self._entries: dict[str, _Entry] = {}
        self._loading: dict[str, _Loading] = {}
        self._wants: dict[str, _Want] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of loaded models, and of those being loaded."""
        loaded = sum(entry.bytes for entry in self._entries.values())
        return loaded + sum(loading.bytes for loading in self._loading.values())

    @property
    def names(self) -> list[str]:
        return sorted({entry.name for entry in self._entries.values()})

    def engines(self) -> list[Engine]:
        return [entry.engine for entry in self._entries.values()]

    def get(self, spec: ModelSpec) -> Engine | None:
        """Return the model's engine, or None: ask again later. Raises ModelRefused when it can never be served.

        Models that do not fit together take turns: none keeps another waiting for as long as it has work.
        """
        entry = self._entries.get(spec.key)
        if entry is not None:
            if self._must_leave(spec.key):
                return None
            entry.used_at = time.monotonic()
            return entry.engine
        loading = self._loading.get(spec.key)
        if loading is not None:
            return self._take_loaded(loading) if loading.done.is_set() else None
        self._begin(spec)
        return None

    def _take_loaded(self, loading: _Loading) -> Engine:
        del self._loading[loading.spec.key]
        if loading.engine is None:
            raise loading.error or ModelRefused
        self.loads += 1
        size, now = max(loading.bytes, loading.engine.weight_bytes), time.monotonic()
        self._entries[loading.spec.key] = _Entry(loading.engine, loading.spec.name, size, now, now, loading.seconds)
        return loading.engine

    def _must_leave(self, key: str) -> bool:
        now = time.monotonic()
        self._wants = {name: want for name, want in self._wants.items() if now - want.asked_at < FORGET_SECONDS}
        return any(want.leaving == key for want in self._wants.values())

    def _wait_for_room(self, spec: ModelSpec) -> None:
        """Note that a model waits; in time, have the one that was there for longest end what it has and go."""
        now = time.monotonic()
        want = self._wants.setdefault(spec.key, _Want(now, now))
        want.asked_at = now
        if want.leaving not in self._entries and self._entries:
            key, oldest = min(self._entries.items(), key=lambda item: item[1].loaded_at)
            patience = max(PATIENCE_SECONDS, LOADS_OF_PATIENCE * oldest.load_seconds)
            want.leaving = key if now - max(want.since, oldest.loaded_at) > patience else None

    def _begin(self, spec: ModelSpec) -> None:
        """Start to load a model if there is room for it, or room can be made."""
        needed = self._size(spec)
        if needed > self.budget_bytes:
            raise ModelRefused(f"The model needs {needed} bytes; the cache has {self.budget_bytes}.")
        while self.used_bytes + needed > self.budget_bytes:
            if not self._evict_one():
                self._wait_for_room(spec)
                return
        self._wants.pop(spec.key, None)
        loading = _Loading(spec, needed)
        self._loading[spec.key] = loading
        threading.Thread(target=self._run, args=(loading,), name=f"load {spec.name}", daemon=True).start()

    def _evict_one(self) -> bool:
        """Drop the model that was not used for longest; False when all are in use."""
        idle = [key for key, entry in self._entries.items() if entry.engine.wait_seconds() is None]
        if not idle:
            return False
        key = min(idle, key=lambda k: self._entries[k].used_at)
        self._entries.pop(key).engine.close()
        return True

    def _run(self, loading: _Loading) -> None:
        try:
            loading.engine = self._load(loading.spec)
        except Exception as error:  # noqa: BLE001  # handed to whoever asked for the model
            loading.error = error
        finally:
            loading.seconds = time.monotonic() - loading.began_at
            loading.done.set()

    def check_integrity(self) -> None:
        """Raise AssertionError when the books do not add up; called when idle."""
        assert self.used_bytes <= self.budget_bytes, "the cache is over its budget"
        assert not self._entries.keys() & self._loading.keys(), "a loaded model is being loaded again"
