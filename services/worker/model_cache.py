"""Models that a child has loaded, and their adapters: each once, kept by recency within a byte budget, never dropped
while in use.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

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


class LoadedAdapter(Protocol):
    @property
    def bytes(self) -> int: ...


@runtime_checkable
class AdapterHost(Protocol):
    """An engine that serves adapters of its model beside it, each known by its directory."""

    def load_adapter(self, directory: str) -> Any:
        """Return a LoadedAdapter; raises ModelRefused. Called from a thread of its own, beside the engine's steps."""
        ...

    def attach(self, directory: str, adapter: Any) -> None: ...

    def detach(self, directory: str) -> None: ...

    def uses(self, directory: str) -> bool:
        """Whether a request for it is unanswered."""
        ...


@dataclass
class _Loading:
    """A load in a thread of its own; everybody who wants the model waits for this one."""

    spec: ModelSpec
    bytes: int
    load: Callable[[], Any]
    began_at: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)
    loaded: Any = None
    """An engine, or for an adapter what its engine attaches."""
    error: Exception | None = None


@dataclass
class _Entry:
    """A loaded model; or an adapter, whose `engine` is that of its base."""

    spec: ModelSpec
    engine: Engine
    bytes: int
    used_at: float
    loaded_at: float
    load_seconds: float
    names: set[str]
    """Models of one source and number type share what is loaded: all that have been asked for, by name."""

    @property
    def is_idle(self) -> bool:
        if self.spec.adapter:
            return not _host(self.engine).uses(self.spec.adapter)
        return self.engine.wait_seconds() is None

    def drop(self) -> None:
        if self.spec.adapter:
            _host(self.engine).detach(self.spec.adapter)
        else:
            self.engine.close()


def _host(engine: Engine) -> AdapterHost:
    if not isinstance(engine, AdapterHost):
        raise ModelRefused("It takes no adapters.")
    return engine


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
        """What models may take now; the whole budget unless a trainer has a part of it."""
        self.loads = 0
        self._whole_budget_bytes = budget_bytes
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
    def load_seconds(self) -> dict[str, float]:
        """What loading each of `names` took."""
        entries = [entry for entry in self._entries.values() if not entry.spec.adapter]
        return {name: entry.load_seconds for entry in entries for name in sorted(entry.names)}

    @property
    def names(self) -> list[str]:
        """Names by which loaded models were asked for; adapters go by their bases'."""
        return sorted({name for entry in self._entries.values() if not entry.spec.adapter for name in entry.names})

    def resize(self, budget_bytes: int) -> None:
        """Hold no more than so much from now on: idle models go at once; others take nothing new until idle."""
        self.budget_bytes = min(budget_bytes, self._whole_budget_bytes)
        self.shrink()

    def shrink(self) -> None:
        """Let go of what is over the budget and idle."""
        while self.used_bytes > self.budget_bytes and self._evict_one():
            pass

    def lacks_room(self, spec: ModelSpec) -> bool:
        """Say whether a model that `get` did not return waits for others, or a trainer, to give room."""
        keys = {spec.key, spec.without_adapter.key}
        return bool(keys & self._wants.keys()) or any(self._must_leave(key) for key in keys)

    def engines(self) -> list[Engine]:
        return [entry.engine for entry in self._entries.values() if not entry.spec.adapter]

    def name_of(self, engine: Engine) -> str:
        """Return the name by which an engine's model was loaded."""
        return next(e.spec.name for e in self._entries.values() if e.engine is engine and not e.spec.adapter)

    def get(self, spec: ModelSpec) -> Engine | None:
        """Return the engine that serves a model, or None: ask again later. Raises ModelRefused when that can never be.

        Models that do not fit together take turns: none keeps another waiting for as long as it has work.
        """
        if not spec.adapter:
            return self._get(spec)
        try:
            engine = self._get(spec.without_adapter)
        except ModelRefused as error:
            raise ModelRefused(f"Its base {spec.base!r}: {error.message}") from error
        return None if engine is None else self._get(spec)

    def _get(self, spec: ModelSpec) -> Engine | None:
        entry = self._entries.get(spec.key)
        if entry is not None:
            if self._must_leave(spec.key):
                return None
            entry.used_at = time.monotonic()
            entry.names.add(spec.name)
            return entry.engine
        loading = self._loading.get(spec.key)
        if loading is not None:
            return self._take_loaded(loading) if loading.done.is_set() else None
        self._begin(spec)
        return None

    def _take_loaded(self, loading: _Loading) -> Engine:
        spec = loading.spec
        del self._loading[spec.key]
        if loading.loaded is None:
            raise loading.error or ModelRefused
        if spec.adapter:
            engine, size = self._entries[spec.without_adapter.key].engine, loading.loaded.bytes
            _host(engine).attach(spec.adapter, loading.loaded)
        else:
            engine, size = loading.loaded, max(loading.bytes, loading.loaded.weight_bytes)
            self.loads += 1
        now = time.monotonic()
        self._entries[spec.key] = _Entry(spec, engine, size, now, now, loading.seconds, {spec.name})
        return engine

    def _must_leave(self, key: str) -> bool:
        now = time.monotonic()
        self._wants = {name: want for name, want in self._wants.items() if now - want.asked_at < FORGET_SECONDS}
        return any(want.leaving == key for want in self._wants.values()) or key in self._surplus()

    def _surplus(self) -> set[str]:
        """Return those that go, longest there first, because the budget was made smaller."""
        surplus, excess = set(), self.used_bytes - self.budget_bytes
        for key, entry in sorted(self._entries.items(), key=lambda item: item[1].loaded_at):
            if excess <= 0:
                break
            surplus.add(key)
            excess -= entry.bytes
        return surplus

    def _wait_for_room(self, spec: ModelSpec, alone_bytes: int) -> None:
        """Note that a model waits; in time, have the one that was there for longest end what it has and go.

        alone_bytes: What it takes when no other is there; an adapter, with its base.
        """
        now = time.monotonic()
        want = self._wants.setdefault(spec.key, _Want(now, now))
        want.asked_at = now
        if alone_bytes > self.budget_bytes:  # others would go in vain
            return
        rivals = self._rivals(spec)
        if want.leaving not in self._entries and rivals:
            key, oldest = min(rivals.items(), key=lambda item: item[1].loaded_at)
            patience = max(PATIENCE_SECONDS, LOADS_OF_PATIENCE * oldest.load_seconds)
            want.leaving = key if now - max(want.since, oldest.loaded_at) > patience else None

    def _rivals(self, spec: ModelSpec) -> dict[str, _Entry]:
        """Return what may be asked to make room: models for a model, and for an adapter others, if there are any."""
        others = {key: entry for key, entry in self._entries.items() if key != spec.without_adapter.key}
        alike = {key: entry for key, entry in others.items() if bool(entry.spec.adapter) == bool(spec.adapter)}
        return alike or others

    def _begin(self, spec: ModelSpec) -> None:
        """Start to load a model if there is room for it, or room can be made."""
        base = self._entries.get(spec.without_adapter.key)
        needed = self._size(spec)
        alone = needed + (base.bytes if base is not None else 0)
        if alone > self._whole_budget_bytes:
            raise ModelRefused(f"The model needs {alone} bytes; the cache has {self._whole_budget_bytes}.")
        load = self._loader(spec)
        while self.used_bytes + needed > self.budget_bytes:
            if alone > self.budget_bytes or not self._evict_one(spec):
                self._wait_for_room(spec, alone)
                return
        self._wants.pop(spec.key, None)
        loading = _Loading(spec, needed, load)
        self._loading[spec.key] = loading
        threading.Thread(target=self._run, args=(loading,), name=f"load {spec.name}", daemon=True).start()

    def _loader(self, spec: ModelSpec) -> Callable[[], Any]:
        if not spec.adapter:
            return lambda: self._load(spec)
        host = _host(self._entries[spec.without_adapter.key].engine)
        return lambda: host.load_adapter(spec.adapter)

    def _evict_one(self, spec: ModelSpec | None = None) -> bool:
        """Drop what was not used for longest, but not the base of `spec`; False when all are in use."""
        kept = {loading.spec.without_adapter.key for loading in self._loading.values()}
        kept |= {spec.without_adapter.key} if spec is not None else set()
        idle = [key for key, entry in self._entries.items() if key not in kept and entry.is_idle]
        if not idle:
            return False
        entry = self._entries.pop(min(idle, key=lambda key: self._entries[key].used_at))
        if not entry.spec.adapter:  # its adapters go with it
            self._entries = {key: other for key, other in self._entries.items() if other.engine is not entry.engine}
        entry.drop()
        return True

    def _run(self, loading: _Loading) -> None:
        try:
            loading.loaded = loading.load()
        except Exception as error:  # noqa: BLE001  # handed to whoever asked for the model
            loading.error = error
        finally:
            loading.seconds = time.monotonic() - loading.began_at
            loading.done.set()

    def check_integrity(self) -> None:
        """Raise AssertionError when the books do not add up; called when idle."""
        assert self.used_bytes <= self.budget_bytes, "the cache is over its budget"
        assert not self._entries.keys() & self._loading.keys(), "a loaded model is being loaded again"
        engines = self.engines()
        assert all(entry.engine in engines for entry in self._entries.values()), "an adapter has outlived its base"
