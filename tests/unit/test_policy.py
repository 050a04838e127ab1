from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from hypothesis import given
from hypothesis import strategies as st

from shared.domain.scheduling.policy import PATIENCE, Caps, Fairness, _Queues, _Room, hurries, plan_releases


@dataclass(frozen=True)
class Slice:
    slice_id: int
    tenant_id: str = "a"
    slice_class: int = 2
    model: str | None = "m"
    estimated_tokens: int = 100
    kind: str = "generate"
    devices_needed: int = 1
    starts_by: object = None
    failures: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Worker:
    slots: int = 2
    occupied: int = 0
    models: frozenset = frozenset()
    arriving: frozenset = frozenset()
    is_training: bool = False
    awaited: int = 0
    host: str = "here"
    reaches: bool = False
    frees_in: float = 0.0
    worker_id: UUID = field(default_factory=uuid4)


def plan(backlog, workers, fairness=None, window=0, weights=None):
    return plan_releases(backlog, workers, fairness or Fairness(), window=window, weights=weights or {})


tenants = st.sampled_from(["a", "b", "c"])
backlogs = st.lists(st.tuples(tenants, st.integers(1, 3), st.integers(1, 10**6)), max_size=40).map(
    lambda rows: [Slice(i, t, c, "m", tokens) for i, (t, c, tokens) in enumerate(rows)]
)
fleets = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), max_size=5).map(
    lambda rows: [Worker(slots, occupied, worker_id=UUID(int=i)) for i, (slots, occupied) in enumerate(rows)]
)


@given(backlogs, fleets, st.integers(0, 3))
def test_work_is_conserved_and_no_worker_is_overfilled(backlog, fleet, window):
    """No slot stays free while anything waits; the places in Redis are filled too, unless something is urgent."""
    releases = plan(backlog, fleet, window=window)
    slots = sum(max(0, worker.slots - worker.occupied) for worker in fleet)
    room = sum(max(0, worker.slots + window - worker.occupied) for worker in fleet)
    assert min(len(backlog), slots) <= len(releases) <= min(len(backlog), room)
    if all(waiting.slice_class > 1 for waiting in backlog):
        assert len(releases) == min(len(backlog), room)
    assert len({release.slice_id for release in releases}) == len(releases)
    for worker in fleet:
        given_to = sum(release.worker_id == worker.worker_id for release in releases)
        assert given_to <= max(0, worker.slots + window - worker.occupied)


@given(backlogs, fleets)
def test_it_is_deterministic(backlog, fleet):
    assert plan(backlog, fleet) == plan(backlog, fleet)


def test_a_higher_class_goes_first_whatever_a_tenant_was_served():
    fairness = Fairness()
    fairness.served["urgent"] = 10**9
    backlog = [Slice(1, "a", 2), Slice(2, "urgent", 1)]
    assert [r.slice_id for r in plan(backlog, [Worker(slots=1)], fairness)] == [2]


def test_urgent_slices_go_by_when_they_must_begin_across_tenants_and_priorities():
    noon = datetime(2026, 7, 6, 12, tzinfo=UTC)
    deadlines = [noon + timedelta(hours=hours) for hours in (5, 3, 4, 1)]
    backlog = [Slice(i, "ab"[i % 2], 1, starts_by=at) for i, at in enumerate(deadlines)] + [Slice(9, "c", 1)]
    fairness = Fairness()
    fairness.served["b"] = 10**9
    assert [r.slice_id for r in plan(backlog, [Worker(slots=5)], fairness)] == [3, 1, 2, 0, 9]


def test_no_amount_of_urgent_work_starves_the_rest():
    """A tenth of the tokens is theirs."""
    fairness, counts = Fairness(), {1: 0, 2: 0}
    for _ in range(500):
        backlog = [Slice(i, "urgent", 1) for i in range(5)] + [Slice(10 + i, "other", 2) for i in range(5)]
        for release in plan(backlog, [Worker(slots=2)], fairness):
            counts[1 if release.slice_id < 10 else 2] += 1
    assert 8 < counts[1] / counts[2] < 10


def test_a_training_of_any_size_is_its_classes_next():
    """Counted whole, one of 10⁸ tokens waited for nine times as many urgent ones, and all behind it did, too."""
    fairness, waiting = Fairness(), [Slice(1, "b", kind="train", estimated_tokens=10**8), Slice(2, "c")]
    for _ in range(150):
        urgent = [Slice(100 + i, "a", 1, estimated_tokens=10**6) for i in range(5)]
        released = {release.slice_id for release in plan([*urgent, *waiting], [Worker(slots=1)], fairness)}
        waiting = [each for each in waiting if each.slice_id not in released]
    assert waiting == []


def test_others_make_way_for_what_has_not_failed():
    """A slice that fails at every try would stop them at every try."""
    assert hurries(Slice(1, slice_class=1), Caps())
    assert not hurries(Slice(1, slice_class=1, failures=1), Caps()) and not hurries(Slice(1), Caps())


def test_a_class_that_was_not_there_is_owed_nothing():
    fairness = Fairness()
    for _ in range(100):
        plan([Slice(i, "a", 2) for i in range(9)], [Worker(slots=9)], fairness)
    backlog = [Slice(1, "a", 2), *(Slice(10 + i, "b", 1) for i in range(9))]
    assert [r.slice_id for r in plan(backlog, [Worker(slots=9)], fairness)][0] >= 10


def test_an_urgent_slice_gets_a_slot_and_no_place_in_redis():
    """And while it finds none, nothing is put before it."""
    full, busy = Worker(slots=2, occupied=2), Worker(slots=2, occupied=1)
    assert plan([Slice(1, "a", 1), Slice(2, "b", 2)], [full], window=3) == []
    releases = plan([Slice(1, "a", 1), Slice(3, "a", 1), Slice(2, "b", 2)], [full, busy], window=3)
    assert [(r.slice_id, r.worker_id) for r in releases] == [(1, busy.worker_id)]
    training = Slice(4, "a", 1, kind="train")
    assert plan([training], [full], window=3) == [] and len(plan([training], [busy], window=3)) == 1


def test_tenants_share_by_weight():
    fairness, counts = Fairness(), {"light": 0, "heavy": 0}
    for _ in range(300):
        backlog = [Slice(i, "light") for i in range(5)] + [Slice(10 + i, "heavy") for i in range(5)]
        for release in plan(backlog, [Worker(slots=2)], fairness, weights={"heavy": 3.0}):
            counts["light" if release.slice_id < 10 else "heavy"] += 1
    assert 2.8 < counts["heavy"] / counts["light"] < 3.2


def test_a_newcomer_neither_starves_nor_collects_credit():
    fairness = Fairness()
    fairness.served["old"] = 10**6
    fairness.admit(["old", "new"])
    assert fairness.served["new"] == 10**6


def test_a_warm_model_attracts_its_slices_but_never_leaves_others_idle():
    warm = Worker(slots=1, models=frozenset({"m"}), worker_id=UUID(int=9))
    cold = Worker(slots=4, worker_id=UUID(int=1))
    assert plan([Slice(1)], [cold, warm])[0].worker_id == warm.worker_id
    assert len(plan([Slice(1), Slice(2)], [cold, warm])) == 2


def test_one_batch_spreads_over_idle_workers():
    fleet = [Worker(slots=4, worker_id=UUID(int=i)) for i in range(4)]
    releases = plan([Slice(i) for i in range(4)], fleet)
    assert len({release.worker_id for release in releases}) == 4


def test_a_device_trains_one_job_at_a_time_and_lines_go_past_what_waits_for_it():
    busy = Worker(slots=4, is_training=True, worker_id=UUID(int=1))
    backlog = [Slice(1, kind="train"), Slice(2, kind="train"), Slice(3)]
    assert [r.slice_id for r in plan(backlog, [busy])] == [3]
    free = Worker(slots=4, worker_id=UUID(int=2))
    releases = plan(backlog, [busy, free])
    assert [r.slice_id for r in releases] == [1, 3]
    assert releases[0].worker_id == free.worker_id


def fleet_of(count, **fields):
    return [Worker(slots=4, worker_id=UUID(int=number), **fields) for number in range(count)]


def test_a_job_for_several_devices_waits_until_they_are_free_and_nobody_waits_with_it():
    pair = Slice(1, kind="train", devices_needed=2)
    assert plan([pair], fleet_of(1)) == []
    assert [r.slice_id for r in plan([pair, Slice(2)], fleet_of(1))] == [2]
    assert [r.slice_id for r in plan([pair], fleet_of(2))] == [1]
    one_trains = [*fleet_of(1, is_training=True), Worker(slots=4, worker_id=UUID(int=9))]
    assert plan([pair], one_trains) == []


def test_devices_are_promised_once():
    """Two jobs of two devices each, begun at once on three devices, would wait for each other for ever."""
    backlog = [Slice(1, kind="train", devices_needed=2), Slice(2, kind="train", devices_needed=2)]
    assert [r.slice_id for r in plan(backlog, fleet_of(3))] == [1]
    assert len(plan(backlog, fleet_of(4))) == 2
    # The first was released before and has not taken its second device yet.
    begun = [Worker(slots=4, is_training=True, awaited=1, worker_id=UUID(int=7)), *fleet_of(2)]
    assert plan([Slice(2, kind="train", devices_needed=2)], begun) == []
    assert [r.slice_id for r in plan([Slice(3, kind="train")], begun)] == [3]


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6), st.frozensets(st.sampled_from("mno"))), max_size=8),
    st.lists(st.sampled_from(["m", "n", "o", "p", None]), max_size=40),
    st.integers(0, 3),
)
def test_heaps_decide_as_a_look_at_every_worker_would(rows, models, window):
    workers = [Worker(s, o, m, worker_id=UUID(int=i * 7919 % 1009)) for i, (s, o, m) in enumerate(rows)]
    room = _Room(workers, window)
    for model in models:
        chosen = room.best(model)
        assert chosen is room.best_of(workers, model)
        if chosen is None:
            assert not room.is_left
            return
        room.take(chosen)


def capped(backlog, workers, most, held=None, window=0):
    caps = Caps({"a": most}, {"a": held or set()})
    return plan_releases(backlog, workers, Fairness(), window=window, weights={}, caps=caps)


def test_a_capped_tenant_goes_on_where_it_is_and_others_go_everywhere():
    fleet = [Worker(slots=2) for _ in range(3)]
    mine = [Slice(i) for i in range(9)]
    assert len({r.worker_id for r in capped(mine, fleet, 1)}) == 1 and len(capped(mine, fleet, 2)) == 4
    there = {fleet[1].worker_id}
    assert {r.worker_id for r in capped(mine, fleet, 1, there)} == there
    assert capped(mine, fleet, 1, {UUID(int=7)}) == [], "the one that it occupies has no room, or is not here"
    both = [*mine, *(Slice(10 + i, "b") for i in range(9))]
    assert len(capped(both, fleet, 1)) == 6, "no slot stays free"


def test_a_capped_tenants_training_takes_no_more_devices_than_it_may():
    fleet = [Worker(slots=2) for _ in range(4)]
    pair = Slice(1, kind="train", devices_needed=2)
    assert len(capped([pair], fleet, 2)) == 1 and capped([pair], fleet, 1) == []
    assert len(capped([pair, Slice(2, kind="train")], fleet, 2)) == 1, "the second device is promised"


def test_a_tenant_lets_others_go_first_that_need_no_load_for_as_long_as_that_pays():
    cold, warm = [Slice(i, "a", model="cold") for i in range(9)], [Slice(10 + i, "b", model="warm") for i in range(9)]
    fairness = Fairness()
    fairness.served = {"a": 0.0, "b": 1.0}

    def tick(served=None):
        host = [Worker(slots=1, models=frozenset({"warm"}), worker_id=UUID(int=1))]
        fairness.served |= served or {}
        (release,) = plan_releases([*cold, *warm], host, fairness, window=0, weights={}, load_tokens=lambda _: 100.0)
        return release.slice_id

    assert tick() == 10 and tick({"b": 100.0 * PATIENCE - 1}) == 10
    assert tick({"b": 100.0 * PATIENCE + 1}) == 0
    assert fairness.served["a"] == 200.0, "it is charged for the load, too"


def test_a_load_is_charged_once_where_it_is_on_its_way():
    fairness = Fairness()
    backlog = [Slice(i, model="m") for i in range(3)]
    workers = [Worker(slots=3, worker_id=UUID(int=1))]
    costs = {"weights": {}, "window": 0, "load_tokens": lambda _: 50.0}
    assert len(plan_releases(backlog, workers, fairness, **costs)) == 3
    assert fairness.served["a"] == 350.0
    workers = [Worker(slots=3, arriving=frozenset({"m"}), worker_id=UUID(int=1))]
    plan_releases(backlog, workers, fairness, **costs)
    assert fairness.served["a"] == 650.0
    plan_releases([Slice(9, kind="train")], [Worker(worker_id=UUID(int=2))], fairness, **costs)
    assert fairness.served["a"] == 750.0, "a training has its own copy in any case"


@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.sampled_from("xyz"), st.sampled_from([2, 3])), min_size=1, max_size=40
    ),
    st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 5e3, 3e5])), min_size=40, max_size=40),
)
def test_turns_that_are_kept_are_those_that_would_be_asked_for(slices, happens):
    """Whoever is next is the one with the least turn, asked for anew, whatever was released and loaded until then.

    A model's cost changes only with a release of its own, as `_Queues` has it; so it does here.
    """
    backlog = [Slice(number, tenant, slice_class, model) for number, (tenant, model, slice_class) in enumerate(slices)]
    costs, fairness, weights = dict.fromkeys("xyz", 1e4), Fairness(), {"a": 3.0}
    queues = _Queues(backlog, fairness, weights, lambda waiting: costs[waiting.model])

    def turn(tenant, waiting):
        return fairness.served[tenant] + PATIENCE * costs[waiting.model] / weights.get(tenant, 1.0)

    for is_released, cost in happens[: len(slices)]:
        for slice_class, tenants in queues._classes.items():
            least = min(tenants, key=lambda tenant: (turn(tenant, tenants[tenant][0]), tenant))
            assert queues._next_tenant(slice_class) == least
        waiting = queues.pop()
        if is_released:
            queues.charge(waiting, costs[waiting.model])
            costs[waiting.model] = cost
