import threading
import time

import pytest

from services.worker import model_cache
from services.worker.model_cache import ModelCache
from services.worker.protocol import ModelSpec
from shared.domain.errors import ModelRefused
from tests.support.servers import wait_until


class FakeEngine:
    def __init__(self):
        self.busy = False
        self.closed = False
        self.weight_bytes = 0

    def wait_seconds(self):
        return 0.0 if self.busy else None

    def close(self):
        self.closed = True


def spec(name):
    return ModelSpec(name, "causal_lm", f"/models/{name}")


@pytest.fixture
def cache():
    return ModelCache(100, lambda _: FakeEngine(), lambda s: {"big": 101}.get(s.name, 40))


def load(cache, name):
    return wait_until(lambda: cache.get(spec(name)), 5)


def test_a_model_is_loaded_once_however_many_ask():
    started, release = [], threading.Event()

    def slow(s):
        started.append(s.name)
        release.wait(5)
        return FakeEngine()

    cache = ModelCache(100, slow, lambda _: 10)
    assert [cache.get(spec("a")) for _ in range(20)] == [None] * 20
    release.set()
    first = load(cache, "a")
    assert cache.get(spec("a")) is first and started == ["a"] and cache.loads == 1


def test_a_model_that_is_always_busy_makes_room_in_time(cache, monkeypatch):
    monkeypatch.setattr(model_cache, "PATIENCE_SECONDS", 0.2)
    a, b = load(cache, "a"), load(cache, "b")
    a.busy = b.busy = True
    assert cache.get(spec("c")) is None and cache.get(spec("a")) is a  # not at once
    time.sleep(0.3)
    assert cache.get(spec("c")) is None
    assert cache.get(spec("a")) is None and cache.get(spec("b")) is b  # the oldest takes nothing new
    assert not a.closed
    a.busy = False  # it has ended what it had
    load(cache, "c").busy = True
    assert a.closed and cache.names == ["b", "c"]
    # Whoever had to go waits its own turn: the next to go is the one that is there for longest.
    assert cache.get(spec("a")) is None and cache.get(spec("b")) is b
    time.sleep(0.3)
    assert cache.get(spec("a")) is None and cache.get(spec("b")) is None


def test_a_model_that_nobody_wants_any_more_keeps_none_from_working(cache, monkeypatch):
    monkeypatch.setattr(model_cache, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(model_cache, "FORGET_SECONDS", 0.3)
    a, b = load(cache, "a"), load(cache, "b")
    a.busy = b.busy = True
    assert cache.get(spec("c")) is None
    time.sleep(0.1)
    assert cache.get(spec("c")) is None and cache.get(spec("a")) is None
    time.sleep(0.4)
    assert cache.get(spec("a")) is a


def test_the_least_recently_used_model_makes_room(cache):
    a, b = load(cache, "a"), load(cache, "b")
    time.sleep(0.01)
    cache.get(spec("a"))
    load(cache, "c")
    assert b.closed and not a.closed and cache.names == ["a", "c"]
    cache.check_integrity()


def test_a_model_in_use_is_never_dropped(cache):
    a, b = load(cache, "a"), load(cache, "b")
    a.busy = b.busy = True
    assert cache.get(spec("c")) is None and cache.names == ["a", "b"]
    a.busy = False
    load(cache, "c")
    assert a.closed and not b.closed


def test_a_model_beyond_the_budget_is_refused(cache):
    with pytest.raises(ModelRefused):
        cache.get(spec("big"))


def test_a_failed_load_is_told_and_may_be_tried_again():
    tries = []

    def fail_once(_):
        tries.append(1)
        if len(tries) == 1:
            raise ModelRefused("truncated")
        return FakeEngine()

    cache = ModelCache(100, fail_once, lambda _: 10)
    with pytest.raises(ModelRefused, match="truncated"):
        wait_until(lambda: cache.get(spec("a")), 5)
    assert cache.used_bytes == 0 and load(cache, "a")


def test_a_smaller_budget_has_idle_models_go_and_busy_ones_end_their_work(cache):
    a, b = load(cache, "a"), load(cache, "b")
    b.busy = True
    cache.resize(30)
    assert a.closed and not b.closed and cache.names == ["b"]
    assert cache.get(spec("b")) is None and cache.lacks_room(spec("b"))  # it takes nothing new
    b.busy = False
    cache.shrink()
    assert b.closed and cache.used_bytes == 0
    cache.check_integrity()


def test_a_model_that_has_no_room_for_now_waits_and_is_not_refused(cache):
    a = load(cache, "a")
    cache.resize(50)
    assert cache.get(spec("a")) is a and not cache.lacks_room(spec("a"))
    cache.resize(30)
    assert a.closed and cache.get(spec("b")) is None and cache.lacks_room(spec("b"))
    with pytest.raises(ModelRefused, match="101"):
        cache.get(spec("big"))
    cache.resize(1000)
    assert cache.budget_bytes == 100  # never more than it began with
    load(cache, "b")
    assert not cache.lacks_room(spec("b"))


def test_models_that_still_fit_stay_when_the_budget_shrinks(cache):
    a, b = load(cache, "a"), load(cache, "b")
    a.busy = b.busy = True
    cache.resize(60)
    assert cache.get(spec("a")) is None and cache.get(spec("b")) is b
    a.busy = False
    cache.shrink()
    assert a.closed and not b.closed and cache.get(spec("b")) is b


def test_models_of_one_source_share_what_is_loaded_under_all_their_names(cache):
    engine = load(cache, "a")
    assert cache.get(ModelSpec("alias", "causal_lm", "/models/a")) is engine
    assert cache.names == ["a", "alias"] and cache.loads == 1 and cache.name_of(engine) == "a"
