"""Prepared data sets, which examples a step trains on, and how these are laid out for a forward pass.

A data set (`shared.domain.prepared_data`) is read by mapping it into memory.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from services.worker.trainer.errors import DataDamaged
from shared.domain.prepared_data import FORMAT_VERSION, Manifest

Indices = npt.NDArray[np.int64]


class PreparedData:
    """A prepared data set; only the pages that are read take memory. Raises DataDamaged where it is not whole."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.manifest = msgspec.json.decode((directory / "manifest.json").read_bytes(), type=Manifest)
            self._tokens = np.memmap(directory / "tokens.bin", dtype="<u4", mode="r")
            self._weights = np.memmap(directory / "weights.bin", dtype=np.uint8, mode="r")
            self._offsets = np.memmap(directory / "offsets.bin", dtype="<i8", mode="r")
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise DataDamaged(f"The prepared data cannot be read: {error}") from error
        self.lengths: Indices = np.diff(self._offsets).astype(np.int64)
        self._check()

    def _check(self) -> None:
        sizes = (len(self._tokens), len(self._weights), len(self._offsets))
        expected = (self.manifest.tokens, self.manifest.tokens, self.manifest.examples + 1)
        if self.manifest.version != FORMAT_VERSION:
            raise DataDamaged(f"manifest.json: version {self.manifest.version} is not known")
        if sizes != expected:
            raise DataDamaged(f"tokens, weights and offsets have {sizes} entries, not {expected} as manifest.json says")
        is_whole = self._offsets[0] == 0 and self._offsets[-1] == self.manifest.tokens and self.lengths.min() >= 1
        if not is_whole:
            raise DataDamaged("offsets.bin does not divide tokens.bin into examples")

    def __len__(self) -> int:
        return self.manifest.examples

    @property
    def digest(self) -> str:
        """The SHA-256 of all that the examples were made from."""
        known = self.manifest
        parts = (known.data_sha256, known.tokenizer_sha256, known.template_sha256, known.max_length)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def tokens(self, example: int) -> npt.NDArray[np.uint32]:
        """Return an example's tokens."""
        return self._tokens[self._offsets[example] : self._offsets[example + 1]]

    def targets(self, example: int) -> npt.NDArray[np.bool_]:
        """Say for each of an example's tokens whether its loss counts."""
        counts: npt.NDArray[np.bool_] = self._weights[self._offsets[example] : self._offsets[example + 1]] != 0
        counts[0] = False
        return counts


@dataclass(frozen=True)
class StepSampler:
    """Which examples a step trains on: a pure function of the seed and the step, so one number is all of its state.

    Every epoch is a permutation of its own; its last step has what is left, like transformers' Trainer.
    """

    examples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.examples // self.batch_size)

    def batch(self, step: int) -> Indices:
        """Return the indices of the examples of a step, counted from 0."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = _permutation(self.examples, self.seed, epoch)
        return order[number * self.batch_size : (number + 1) * self.batch_size]


@functools.lru_cache(maxsize=2)
def _permutation(examples: int, seed: int, epoch: int) -> Indices:
    # The bits of Philox are fixed by its paper (Salmon et al. 2011); numpy's own shuffle may change with its version.
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(examples)
    return np.argsort(bits, kind="stable").astype(np.int64)


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one forward pass. Shapes: R rows, T tokens a row, N targets.

    Packed: one row of all examples, each with positions from 0 (`lengths` says where they end), no padding. Padded: a
    row each; no mask is needed, as the padding comes after all that is learnt, and models here look back only.
    """

    input_ids: torch.Tensor
    """[R, T]"""
    position_ids: torch.Tensor
    """[R, T]"""
    lengths: list[int] | None
    """Tokens of each packed example; None when padded."""
    predicts: torch.Tensor
    """[R, T] of bool: the N positions whose next token is learnt."""
    targets: torch.Tensor
    """[N], the tokens that are learnt, in the order of `predicts`."""
    tokens: int
    """Without padding."""
    examples: int

    def to(self, device: torch.device) -> "MicroBatch":
        """Return it with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def plan(lengths: Indices, budget_tokens: int, *, packed: bool) -> list[list[int]]:
    """Divide examples into micro-batches; returns indices into `lengths`."""
    return (plan_packed if packed else plan_padded)(lengths, budget_tokens)


def plan_packed(lengths: Indices, budget_tokens: int) -> list[list[int]]:
    """Divide examples into micro-batches of at most `budget_tokens` tokens, an over-long one alone; as few as may be.

    First-fit decreasing (Johnson 1973): at most 11/9 of the fewest possible.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        length = int(lengths[index])
        place = next((number for number, free in enumerate(room) if free >= length), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget_tokens)
        bins[place].append(index)
        room[place] -= length
    return bins


def plan_padded(lengths: Indices, budget_tokens: int) -> list[list[int]]:
    """Divide examples into micro-batches of like lengths whose rows, padded, have at most `budget_tokens` tokens."""
    groups: list[list[int]] = []
    for index in _longest_first(lengths):
        if not groups or int(lengths[groups[-1][0]]) * (len(groups[-1]) + 1) > budget_tokens:
            groups.append([])
        groups[-1].append(index)
    return groups


def share(lengths: Indices, rank: int, size: int) -> list[int]:
    """Return which examples one of `size` ranks computes, so that all have about as many tokens.

    Longest first, to whom has least (Graham 1969): at most 4/3 of the best division's largest share.
    """
    loads = [0] * size
    mine = []
    for index in _longest_first(lengths):
        least = loads.index(min(loads))
        loads[least] += int(lengths[index])
        if least == rank:
            mine.append(index)
    return mine


def _longest_first(lengths: Indices) -> list[int]:
    order: list[int] = np.argsort(-lengths, kind="stable").tolist()
    return order


def micro_batches(data: PreparedData, examples: Indices, budget_tokens: int, *, packed: bool) -> Iterator[MicroBatch]:
    """Yield the micro-batches of some examples; together they have every target once, however they are divided."""
    for group in plan(data.lengths[examples], budget_tokens, packed=packed):
        chosen = [int(examples[index]) for index in group]
        yield _pack(data, chosen) if packed else _pad(data, chosen)


def idle_batch(*, packed: bool) -> MicroBatch:
    """Return a micro-batch of one token of which nothing is learnt."""
    nothing = torch.zeros((1, 1), dtype=torch.int64)
    lengths = [1] if packed else None
    return MicroBatch(nothing, nothing, lengths, nothing.bool(), nothing.new_zeros(0), tokens=0, examples=0)


def _pack(data: PreparedData, examples: Sequence[int]) -> MicroBatch:
    lengths = [int(data.lengths[example]) for example in examples]
    tokens = np.concatenate([data.tokens(example) for example in examples]).astype(np.int64)
    learnt = np.concatenate([data.targets(example) for example in examples])
    return MicroBatch(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        lengths=lengths,
        predicts=_next(learnt[None]),
        targets=torch.from_numpy(tokens[learnt]),
        tokens=len(tokens),
        examples=len(examples),
    )


def _pad(data: PreparedData, examples: Sequence[int]) -> MicroBatch:
    lengths = [int(data.lengths[example]) for example in examples]
    shape = (len(examples), max(lengths))
    tokens = np.full(shape, data.manifest.pad_token or 0, dtype=np.int64)
    learnt = np.zeros(shape, dtype=np.bool_)
    for row, example in enumerate(examples):
        end = lengths[row]
        tokens[row, :end], learnt[row, :end] = data.tokens(example), data.targets(example)
    return MicroBatch(
        input_ids=torch.from_numpy(tokens),
        position_ids=torch.arange(shape[1]).expand(shape),
        lengths=None,
        predicts=_next(learnt),
        targets=torch.from_numpy(tokens[learnt]),
        tokens=sum(lengths),
        examples=len(examples),
    )


def _next(learnt: npt.NDArray[np.bool_]) -> torch.Tensor:
    """Return [R, T], true where the token after is learnt; an example's first never is, so nothing crosses examples."""
    return torch.from_numpy(np.concatenate([learnt[:, 1:], np.zeros_like(learnt[:, :1])], axis=1))
