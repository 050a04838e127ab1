"""A slice is the lease unit: lines `[lo, hi)` of a job's input that one worker owns at a time."""

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from itertools import pairwise

SPLIT_WAYS = 8
"""A poison slice of 512 lines is down to one line after three splits (halves would take nine)."""

# A slice's `losses` are points of suspicion. The death of the engine that was computing it says much; that of a worker
# process, a launcher or a host says little, but a line that brings those down must be found in the end too.
ENGINE_DEATH = 3
PROCESS_DEATH = 1
SPLIT_AT = 2 * ENGINE_DEATH
DEAD_AT = 10 * ENGINE_DEATH


class SliceKind(StrEnum):
    """What a worker does with a slice: answer lines, or train for a whole job."""

    GENERATE = "generate"
    TRAIN = "train"


class SliceClass(IntEnum):
    """What goes first; online calls (0) never wait in a queue."""

    URGENT = 1
    BATCH = 2


class SliceState(StrEnum):
    """`held` waits for its job (paused); `queued` may be dispatched; the last three are terminal."""

    HELD = "held"
    QUEUED = "queued"
    DISPATCHED = "dispatched"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"
    CANCELLED = "cancelled"


OPEN_STATES = (SliceState.HELD, SliceState.QUEUED, SliceState.DISPATCHED, SliceState.RUNNING)


class AttemptOutcome(StrEnum):
    DONE = "done"
    LOST = "lost"
    PREEMPTED = "preempted"
    FAILED = "failed"
    CANCELLED = "cancelled"


class LossAction(StrEnum):
    REQUEUE = "requeue"
    SPLIT = "split"
    DEAD_LETTER = "dead_letter"


@dataclass(frozen=True)
class LossDecision:
    """What happens to a slice whose worker was lost."""

    action: LossAction
    losses: int
    parts: tuple[tuple[int, int], ...] = ()


def decide_after_loss(lo: int, hi: int, losses: int, *, progressed: bool, suspicion: int) -> LossDecision:
    """Decide what becomes of slice `[lo, hi)` when what ran it died or hung.

    `suspicion` is ENGINE_DEATH or PROCESS_DEATH. Only losses in a row *without any recorded line in between* count: a
    machine that is killed every second must not look like a poison line, and a poison line is always among those that
    are never recorded. After two engine deaths the slice is split, and its parts start one engine death short of being
    split again; a single line is dead-lettered only after ten.
    """
    losses = 0 if progressed else losses + suspicion
    if losses < SPLIT_AT:
        return LossDecision(LossAction.REQUEUE, losses)
    if hi - lo > 1:
        return LossDecision(LossAction.SPLIT, SPLIT_AT - ENGINE_DEATH, split(lo, hi, SPLIT_WAYS))
    if losses < DEAD_AT:
        return LossDecision(LossAction.REQUEUE, losses)
    return LossDecision(LossAction.DEAD_LETTER, losses)


def must_run_alone(losses: int) -> bool:
    """A suspect runs alone in its engine child, so that no innocent slice is blamed for what it does."""
    return losses >= ENGINE_DEATH


def is_dead_letter(lo: int, hi: int, losses: int) -> bool:
    """Whether the next worker that claims this slice records its one line as failed instead of running it."""
    return hi - lo == 1 and losses >= DEAD_AT


def split(lo: int, hi: int, ways: int) -> tuple[tuple[int, int], ...]:
    """Cut `[lo, hi)` into at most `ways` parts of nearly equal length, in order and without gaps."""
    ways = min(ways, hi - lo)
    cuts = [lo + (hi - lo) * i // ways for i in range(ways + 1)]
    return tuple(pairwise(cuts))


BYTES_PER_TOKEN = 4
"""For a first estimate only: English text has about four bytes a token."""


def estimated_tokens(input_bytes: int, lines: int) -> int:
    """Return about how many tokens a line of a batch has: by this, tenants are served and jobs foretold."""
    return max(1, input_bytes // BYTES_PER_TOKEN // lines)


LINES_AT_ONCE = 64
"""Lines of a slice that keep its slot's part of an engine busy: four slots fill a batch of 256."""


def plan_slices(lines: int, slots: int, largest: int, smallest: int = 16) -> tuple[tuple[int, int], ...]:
    """Cut a batch of `lines` so that every slot of the fleet gets some of it, in slices of `smallest..largest` lines.

    `slots` is the number of slices that all live workers together run at once. Two slices for each slot keep the
    fleet busy to the end; but an engine is as fast as its batch is large, so a slot has its part of one first.
    """
    share = -(-lines // max(1, slots))
    wanted = max(-(-share // 2), min(share, LINES_AT_ONCE))
    size = max(min(smallest, largest), min(largest, wanted))
    return split(0, lines, -(-lines // size))
