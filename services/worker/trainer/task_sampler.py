"""Which rows a step of multi-task training trains on: a pure function of the seed, the step and the mix.

Rows come from sources; tasks that share their rows have one. A `Segment` says in which shares sources are drawn from a
step on: a new one begins with each phase of sequential training, and when a task stops early. The list of segments is
all that a checkpoint keeps of the sampler.

Within a segment, draws are numbered. Of each block of BLOCK numbers a source gets its share to within one draw, in an
order drawn from the seed; so after n draws a source was drawn n times its share, give or take a few, and how often is
known without looking at earlier draws. A source's rows come in the order of a permutation for each of its epochs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from services.worker.trainer.data import Indices, StepSampler
from shared.domain.prepared_tasks import Strategy

BLOCK = 256
BLOCKS_AT_A_TIME = 4096
GOLDEN = (math.sqrt(5) - 1) / 2
_ORDER_KEY, _BLOCK_KEY = 1, 2
"""Tell the streams of random numbers of one seed apart."""


class Segment(msgspec.Struct, frozen=True):
    """From step `start` on, sources are drawn with these shares, which add up to 1."""

    start: int
    shares: tuple[float, ...]


@dataclass(frozen=True)
class TaskMix:
    """How sources are mixed: the policy from which segments follow.

    rows: Of each source. tasks: Of each source, the numbers of its tasks. weights: Of each task.
    temperature, cap: Shares are proportional to min(rows, cap) ** (1 / temperature) (Arivazhagan et al. 2019,
    arXiv 1907.05019; the cap is Raffel et al.'s, arXiv 1910.10683); `proportional` is temperature 1.
    rehearsal: In sequential training, the share of rows from tasks of earlier phases.
    """

    rows: tuple[int, ...]
    tasks: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    strategy: Strategy = "uniform"
    temperature: float = 1.0
    cap: int | None = None
    is_sequential: bool = False
    rehearsal: float = 0.0

    def shares(self, active: frozenset[int], phase: int) -> tuple[float, ...]:
        """Return each source's share while the tasks in `active` are trained; all 0 when there is none.

        phase: In sequential training, whose turn it is. A source whose tasks have all stopped is drawn no more; one
        that stops in its own phase leaves its turn to the next that has not.
        """
        is_open = [bool(active & set(tasks)) for tasks in self.tasks]
        if self.is_sequential:
            return self._turn(is_open, phase)
        raw = [self._weight(source, active) if is_open[source] else 0.0 for source in range(len(self.rows))]
        total = sum(raw)
        return tuple(share / total if total else 0.0 for share in raw)

    def _turn(self, is_open: list[bool], phase: int) -> tuple[float, ...]:
        order = [*range(phase, len(self.rows)), *reversed(range(phase))]
        turn = next((source for source in order if is_open[source]), None)
        if turn is None:
            return tuple(0.0 for _ in self.rows)
        earlier = [source for source in range(min(phase, turn)) if is_open[source]]
        rehearsed = self.rehearsal if earlier else 0.0
        shares = [rehearsed / len(earlier) if source in earlier else 0.0 for source in range(len(self.rows))]
        shares[turn] += 1.0 - rehearsed
        return tuple(shares)

    def _weight(self, source: int, active: frozenset[int]) -> float:
        if self.strategy in ("uniform", "round_robin"):
            return 1.0
        if self.strategy == "weights":
            chosen = [self.weights[task] for task in self.tasks[source] if task in active]
            return sum(chosen) / len(chosen)
        size = min(self.rows[source], self.cap or self.rows[source])
        return float(size ** (1.0 / (self.temperature if self.strategy == "temperature" else 1.0)))


class TaskSampler:
    """Draws the rows of a step: of `batch_size` rows, mixed, or all of one source when `is_mixed` is false."""

    def __init__(self, mix: TaskMix, batch_size: int, seed: int, *, is_mixed: bool = True) -> None:
        self._mix, self._batch_size, self._seed, self._is_mixed = mix, batch_size, seed, is_mixed
        self._rows_of_draw = 1 if is_mixed else batch_size
        self._orders: dict[int, tuple[int, Indices]] = {}
        self._counted: dict[Segment, tuple[int, Indices]] = {}
        """How many blocks of a segment were counted, and what: a memory, as all of it follows from the step."""
        # One source is an ordinary data set, whose last step of an epoch has what is left of it.
        self._only = StepSampler(mix.rows[0], batch_size, seed) if len(mix.rows) == 1 else None

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which as many rows are drawn as all sources have together."""
        return -(-sum(self._mix.rows) // self._batch_size)

    def phase_starts(self, total_steps: int) -> list[int]:
        """Return the step at which each source's phase begins: phases are as long as their sources' rows say."""
        ends = np.cumsum(self._mix.rows) / sum(self._mix.rows)
        return [0, *(round(total_steps * float(end)) for end in ends[:-1])]

    def batch(self, step: int, segments: Sequence[Segment]) -> dict[int, Indices]:
        """Return the rows of a step, counted from 0, by source; `segments` must begin at step 0."""
        if self._only is not None:
            return {0: self._only.batch(step)}
        cursors = np.zeros(len(self._mix.rows), dtype=np.int64)
        current = segments[0]
        for following in segments[1:]:
            if following.start > step:
                break
            cursors += self._drawn(current, self._draws(following.start - current.start))
            current = following
        first, count = self._draws(step - current.start), self._draws(1)
        cursors += self._drawn(current, first)
        counts = np.bincount(self._sources(current, first, count), minlength=len(cursors))
        return {
            source: self._rows(source, int(cursors[source]) * self._rows_of_draw, int(n) * self._rows_of_draw)
            for source, n in enumerate(counts)
            if n
        }

    def _draws(self, steps: int) -> int:
        return steps * self._batch_size if self._is_mixed else steps

    def _drawn(self, segment: Segment, draws: int) -> Indices:
        """Return how often each source is among the first draws of a segment."""
        if self._mix.strategy == "round_robin" and not self._mix.is_sequential:
            turns = np.flatnonzero(segment.shares)
            in_turn = np.zeros(len(segment.shares), dtype=np.int64)
            in_turn[turns] = (draws - np.arange(len(turns)) + len(turns) - 1) // len(turns)
            return in_turn
        blocks, rest = divmod(draws, BLOCK)
        counts = self._in_blocks(segment, blocks)
        return counts + np.bincount(self._block(segment, blocks)[:rest], minlength=len(counts))

    def _in_blocks(self, segment: Segment, blocks: int) -> Indices:
        """Return how often each source is in the first blocks of a segment; only blocks not counted yet are."""
        known, counts = self._counted.get(segment, (0, np.zeros(len(segment.shares), dtype=np.int64)))
        if known > blocks:
            known, counts = 0, np.zeros(len(segment.shares), dtype=np.int64)
        for start in range(known, blocks, BLOCKS_AT_A_TIME):
            numbers = np.arange(start, min(start + BLOCKS_AT_A_TIME, blocks))
            below = _points_below(_edges(segment)[None, :], (numbers * GOLDEN % 1.0)[:, None])
            counts = counts + np.diff(below, axis=1).sum(axis=0)
        self._counted[segment] = (blocks, counts)
        return counts

    def _sources(self, segment: Segment, first: int, count: int) -> Indices:
        """Return the sources of `count` draws from number `first` of a segment."""
        numbers = np.arange(first, first + count)
        if self._mix.strategy == "round_robin" and not self._mix.is_sequential:
            turns = np.flatnonzero(segment.shares)
            return turns[numbers % len(turns)]
        blocks = range(first // BLOCK, (first + count - 1) // BLOCK + 1)
        drawn = np.concatenate([self._block(segment, block) for block in blocks])
        return drawn[numbers - blocks[0] * BLOCK]

    def _block(self, segment: Segment, block: int) -> Indices:
        """Return the sources of a block of draws: equally spaced points in the shares, in a random order."""
        counts = np.diff(_points_below(_edges(segment), block * GOLDEN % 1.0))
        order = _permutation(BLOCK, self._seed, _BLOCK_KEY, segment.start, block)
        return np.repeat(np.arange(len(counts)), counts)[order]

    def _rows(self, source: int, cursor: int, count: int) -> Indices:
        """Return `count` rows of a source from its `cursor`th draw on."""
        rows, parts = self._mix.rows[source], []
        while count:
            epoch, place = divmod(cursor, rows)
            known, order = self._orders.get(source, (-1, np.empty(0, dtype=np.int64)))
            if known != epoch:
                order = _permutation(rows, self._seed, _ORDER_KEY, source, epoch)
                self._orders[source] = (epoch, order)
            part = order[place : place + count]
            parts.append(part)
            cursor, count = cursor + len(part), count - len(part)
        return np.concatenate(parts)


def _edges(segment: Segment) -> npt.NDArray[np.float64]:
    """Return where each source's part of [0, 1] ends, after a 0."""
    edges = np.concatenate([[0.0], np.cumsum(segment.shares)])
    edges[-1] = 1.0
    clipped: npt.NDArray[np.float64] = np.minimum(edges, 1.0)
    return clipped


def _points_below(edges: npt.NDArray[Any], offset: float | npt.NDArray[Any]) -> Indices:
    """Return how many of the points (i + offset) / BLOCK, i from 0 to BLOCK - 1, lie below each edge."""
    return np.clip(np.ceil(BLOCK * edges - offset), 0, BLOCK).astype(np.int64)


def _permutation(length: int, *key: int) -> Indices:
    # The bits of Philox are fixed by its paper (Salmon et al. 2011); SeedSequence's by numpy's promise.
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(bits, kind="stable").astype(np.int64)
