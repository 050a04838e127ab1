"""Adapters in the model cache: beside their base, which is loaded once for all; by recency, and never while in use."""

import threading
import time
from dataclasses import dataclass

import pytest

from services.worker import model_cache
from services.worker.engine.echo import EchoEngine
from services.worker.model_cache import ModelCache
from services.worker.protocol import ModelSpec
from shared.domain.errors import ModelRefused
from tests.support.servers import wait_until

BASE_BYTES, ADAPTER_BYTES = 50, 10


@dataclass
class Attached:
    directory: str
    bytes: int = ADAPTER_BYTES


class Host:
    """An engine whose requests are a set of the adapters that they want."""

    weight_bytes = BASE_BYTES

    def __init__(self):
        self.busy, self.attached, self.wanted, self.closed = False, {}, set(), False
        self.may_load = threading.Event()
        self.may_load.set()

    def wait_seconds(self):
        return 0.0 if self.busy or self.wanted else None

    def close(self):
        self.closed = True

    def load_adapter(self, directory):
        self.may_load.wait(5)
        if "broken" in directory:
            raise ModelRefused("It is cut off.")
        return Attached(directory)

    def attach(self, directory, adapter):
        assert adapter.directory == directory
        self.attached[directory] = adapter

    def detach(self, directory):
        assert directory not in self.wanted
        del self.attached[directory]

    def uses(self, directory):
        return directory in self.wanted


def base(name="base"):
    return ModelSpec(name, "causal_lm", f"/models/{name}")


def adapter(name, of="base"):
    return ModelSpec(name, "causal_lm", f"/models/{of}", base=of, adapter=f"/adapters/{name}")


def new_cache(budget):
    return ModelCache(budget, lambda _: Host(), lambda s: ADAPTER_BYTES if s.adapter else BASE_BYTES)


def load(cache, spec):
    engine = wait_until(lambda: cache.get(spec), 5)
    cache.check_integrity()
    return engine


def test_a_base_is_loaded_once_for_all_its_adapters():
    cache = new_cache(100)
    engine = load(cache, adapter("a"))
    assert load(cache, adapter("b")) is engine and load(cache, base()) is engine
    assert cache.loads == 1 and cache.names == ["base"] and cache.engines() == [engine]
    assert sorted(engine.attached) == ["/adapters/a", "/adapters/b"]
    assert cache.used_bytes == BASE_BYTES + 2 * ADAPTER_BYTES


def test_an_adapter_is_loaded_once_however_many_ask_and_the_base_serves_meanwhile():
    cache = new_cache(100)
    engine = load(cache, base())
    engine.may_load.clear()
    assert [cache.get(adapter("a")) for _ in range(20)] == [None] * 20
    assert cache.get(base()) is engine and cache.used_bytes == BASE_BYTES + ADAPTER_BYTES
    engine.may_load.set()
    assert load(cache, adapter("a")) is engine and len(engine.attached) == 1


def test_the_adapter_that_was_not_used_for_longest_goes_first_and_none_in_use():
    cache = new_cache(BASE_BYTES + 2 * ADAPTER_BYTES)
    engine = load(cache, adapter("a"))
    load(cache, adapter("b"))
    time.sleep(0.01)
    cache.get(adapter("a"))
    load(cache, adapter("c"))
    assert sorted(engine.attached) == ["/adapters/a", "/adapters/c"]
    engine.wanted = {"/adapters/a", "/adapters/c"}
    assert cache.get(adapter("b")) is None and len(engine.attached) == 2
    engine.wanted = {"/adapters/c"}
    load(cache, adapter("b"))
    assert sorted(engine.attached) == ["/adapters/b", "/adapters/c"] and not engine.closed


def test_an_adapter_that_is_always_in_use_makes_room_in_time(monkeypatch):
    monkeypatch.setattr(model_cache, "PATIENCE_SECONDS", 0.2)
    cache = new_cache(BASE_BYTES + ADAPTER_BYTES)
    engine = load(cache, adapter("a"))
    engine.wanted = {"/adapters/a"}
    assert cache.get(adapter("b")) is None and cache.get(adapter("a")) is engine
    time.sleep(0.3)
    assert cache.get(adapter("b")) is None
    assert cache.get(adapter("a")) is None and cache.get(base()) is engine  # only the adapter takes nothing new
    engine.wanted = set()
    load(cache, adapter("b"))
    assert list(engine.attached) == ["/adapters/b"]


def test_a_model_makes_room_with_all_its_adapters():
    cache = new_cache(BASE_BYTES + 3 * ADAPTER_BYTES)
    engine = load(cache, adapter("a"))
    engine.wanted = {"/adapters/a"}
    assert cache.get(base("other")) is None and not engine.closed
    engine.wanted = set()
    other = load(cache, base("other"))
    assert engine.closed and cache.names == ["other"] and cache.used_bytes == BASE_BYTES
    again = load(cache, adapter("a"))
    assert again is not engine and other.closed and cache.loads == 3


def test_a_base_stays_while_its_adapter_is_being_loaded():
    cache = new_cache(BASE_BYTES + 2 * ADAPTER_BYTES)
    engine = load(cache, base())
    engine.may_load.clear()
    assert cache.get(adapter("a")) is None
    assert cache.get(base("other")) is None and not engine.closed
    engine.may_load.set()
    assert load(cache, adapter("a")) is engine


def test_what_can_never_be_is_refused():
    cache = new_cache(BASE_BYTES + ADAPTER_BYTES - 1)
    load(cache, base())
    with pytest.raises(ModelRefused, match="needs 60 bytes; the cache has 59"):
        cache.get(adapter("a"))
    cache = new_cache(100)
    with pytest.raises(ModelRefused, match="cut off"):
        wait_until(lambda: cache.get(adapter("broken")), 5)
    assert cache.used_bytes == BASE_BYTES and load(cache, adapter("whole"))
    plain = ModelCache(100, lambda _: EchoEngine(), lambda _: 0)
    with pytest.raises(ModelRefused, match="takes no adapters"):
        wait_until(lambda: plain.get(adapter("a")), 5)

    def refuse(_):
        raise ModelRefused("Its weights are gone.")

    gone = ModelCache(100, lambda _: Host(), refuse)
    with pytest.raises(ModelRefused, match="Its base 'base': Its weights are gone"):
        gone.get(adapter("a"))
