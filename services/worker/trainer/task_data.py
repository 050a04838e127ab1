"""The prepared rows of multi-task training (`shared.domain.prepared_tasks`), mapped into memory."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from services.worker.trainer.data import Indices, plan_padded, share
from services.worker.trainer.errors import DataDamaged
from shared.domain.prepared_tasks import FORMAT_VERSION, IGNORED, ITEM_TYPES, RowsManifest, TaskTargets


@dataclass(frozen=True)
class RowBatch:
    """Rows for one pass of the trunk, those of a source together. R rows of T tokens; pads stand at the end.

    Targets, by task number, of the rows in its span: classification [r]; multilabel [r, labels] of float; regression
    [r] of float, standardised; token classification and causal LM [r, T], IGNORED where nothing is learnt (a causal
    LM's are the next tokens); seq2seq [r, T'].
    """

    inputs: torch.Tensor
    """[R, T] token ids, or [R, width] vectors."""
    mask: torch.Tensor
    """[R, T], true for tokens; of vectors [R, 1]."""
    targets: dict[int, torch.Tensor]
    spans: dict[int, slice]
    """By task number, which rows are its source's."""
    is_idle: bool = False
    """Whether it is computed only as others wait for this rank to do so."""

    def asking(self, tasks: Iterable[int]) -> "RowBatch":
        """Return it with these language tasks among its own; of those that it has no rows of, nothing is learnt."""
        lacking = [task for task in tasks if task not in self.targets]
        nothing = torch.full((1, self.mask.shape[1]), IGNORED)
        targets = self.targets | dict.fromkeys(lacking, nothing)
        return dataclasses.replace(self, targets=targets, spans=self.spans | dict.fromkeys(lacking, slice(0, 1)))

    def to(self, device: torch.device) -> "RowBatch":
        """Return it with its tensors on `device`."""
        moved = {task: target.to(device) for task, target in self.targets.items()}
        return dataclasses.replace(self, inputs=self.inputs.to(device), mask=self.mask.to(device), targets=moved)


class PreparedRows:
    """The rows of one source with the targets of its tasks. Raises DataDamaged where they are not whole.

    source: Its number. tasks: The numbers, in the specification, of the tasks of its manifest.
    """

    def __init__(self, directory: Path, source: int, tasks: tuple[int, ...]) -> None:
        self.source, self.tasks = source, tasks
        try:
            self.manifest = msgspec.json.decode((directory / "manifest.json").read_bytes(), type=RowsManifest)
            if self.manifest.version != FORMAT_VERSION or len(self.manifest.tasks) != len(tasks):
                raise DataDamaged("manifest.json is of another version, or of other tasks")
            self._read(directory)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise DataDamaged(f"The prepared rows cannot be read: {error}") from error

    def _read(self, directory: Path) -> None:
        known = self.manifest
        if known.width:
            self._vectors = _map(directory / "vectors.bin", "<f4").reshape(known.rows, known.width)
            self.lengths: Indices = np.ones(known.rows, dtype=np.int64)
        else:
            self._tokens, self._offsets = _map(directory / "tokens.bin", "<u4"), _offsets(directory / "offsets.bin")
            self.lengths = np.diff(self._offsets)
            if len(self.lengths) != known.rows or self._offsets[-1] != len(self._tokens) or self.lengths.min() < 1:
                raise DataDamaged("offsets.bin does not divide tokens.bin into rows")
        self._labels, self._label_offsets = {}, {}
        for number, (task, described) in enumerate(zip(self.tasks, known.tasks, strict=True)):
            labels = _map(directory / f"{number}.labels.bin", ITEM_TYPES[described.kind])
            if described.kind == "multilabel":
                labels = labels.reshape(known.rows, len(described.labels))
            if described.kind == "seq2seq":
                self._label_offsets[task] = _offsets(directory / f"{number}.offsets.bin")
            self._labels[task] = labels
            self._require_length(task, described)

    def _require_length(self, task: int, described: TaskTargets) -> None:
        is_by_token = described.kind in ("token_classification", "causal_lm")
        expected = self.manifest.tokens if is_by_token else self.manifest.rows
        if described.kind == "seq2seq":
            offsets = self._label_offsets[task]
            if len(offsets) != expected + 1 or offsets[-1] != len(self._labels[task]):
                raise DataDamaged(f"the targets of {described.name!r} are not as long as their offsets say")
        elif len(self._labels[task]) != expected:
            raise DataDamaged(f"there are {len(self._labels[task])} targets of {described.name!r}, not {expected}")

    @cached_property
    def costs(self) -> Indices:
        """By how many tokens a row fills a pass: its own, and the targets of a decoder."""
        answers = [np.diff(offsets) for offsets in self._label_offsets.values()]
        return self.lengths + np.max(answers, axis=0) if answers else self.lengths

    def __len__(self) -> int:
        return self.manifest.rows

    def described(self, task: int) -> TaskTargets:
        return self.manifest.tasks[self.tasks.index(task)]

    def n_targets(self, task: int, rows: Indices) -> int:
        """Return how many targets of a task some rows have: rows, or tokens where each has a target."""
        kind = self.described(task).kind
        if kind in ("classification", "multilabel", "regression"):
            return len(rows)
        if kind == "seq2seq":
            offsets = self._label_offsets[task]
            return int((offsets[rows + 1] - offsets[rows]).sum())
        return sum(int(self._count(task, int(row))) for row in rows)

    def _count(self, task: int, row: int) -> int:
        labels = self._labels[task][self._span(row)]
        if self.described(task).kind == "causal_lm":
            return int(np.count_nonzero(labels[1:]))
        return int(np.count_nonzero(labels != IGNORED))

    def _span(self, row: int) -> slice:
        return slice(int(self._offsets[row]), int(self._offsets[row + 1]))

    def batch(self, rows: Indices, tasks: tuple[int, ...]) -> RowBatch:
        """Return some rows with the targets of some tasks, padded to the longest row."""
        targets = {task: self._targets(task, rows) for task in tasks}
        spans = dict.fromkeys(tasks, slice(0, len(rows)))
        if self.manifest.width:
            inputs = torch.from_numpy(self._vectors[rows].astype(np.float32))
            return RowBatch(inputs, torch.ones((len(rows), 1), dtype=torch.bool), targets, spans)
        tokens = [self._tokens[self._span(int(row))].astype(np.int64) for row in rows]
        lengths = self.lengths[rows]
        mask = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
        inputs = _padded(tokens, self.manifest.pad_token or 0)
        return RowBatch(inputs, torch.from_numpy(mask), targets, spans)

    def _targets(self, task: int, rows: Indices) -> torch.Tensor:
        described, labels = self.described(task), self._labels[task]
        match described.kind:
            case "classification":
                return torch.from_numpy(labels[rows].astype(np.int64))
            case "multilabel":
                return torch.from_numpy(labels[rows].astype(np.float64))
            case "regression":
                return torch.from_numpy((labels[rows] - described.mean) / described.deviation)
            case "token_classification":
                return _padded([labels[self._span(int(row))].astype(np.int64) for row in rows], IGNORED)
            case "seq2seq":
                offsets = self._label_offsets[task]
                return _padded([labels[offsets[row] : offsets[row + 1]].astype(np.int64) for row in rows], IGNORED)
        return _padded([self._next_tokens(task, int(row)) for row in rows], IGNORED)

    def _next_tokens(self, task: int, row: int) -> npt.NDArray[np.int64]:
        """Return for each token of a row the one after it where that is learnt."""
        span = self._span(row)
        following = np.full(span.stop - span.start, IGNORED, dtype=np.int64)
        learnt = self._labels[task][span][1:] != 0
        following[:-1][learnt] = self._tokens[span][1:][learnt]
        return following


Sources = Mapping[int, PreparedRows]
Draw = Mapping[int, Indices]
"""Rows, by source."""


def costs_of(data: Sources, draw: Draw) -> Indices:
    """Return by how many tokens drawn rows fill a pass, source by source."""
    return np.concatenate([data[source].costs[rows] for source, rows in draw.items()])


def share_of_rows(data: Sources, draw: Draw, rank: int, size: int) -> dict[int, Indices]:
    """Return what one of `size` ranks computes of drawn rows, so that all have about as many tokens."""
    mine = np.zeros(sum(map(len, draw.values())), dtype=np.bool_)
    mine[share(costs_of(data, draw), rank, size)] = True
    return {source: rows[kept] for (source, rows), kept in zip(draw.items(), _divided(mine, draw), strict=True)}


def row_batches(
    data: Sources, draw: Draw, tasks: Mapping[int, tuple[int, ...]], budget_tokens: int
) -> Iterator[RowBatch]:
    """Yield passes over drawn rows, of at most `budget_tokens` with their pads, a longer row alone.

    A pass has rows of like lengths from all sources: small ones of each source alone would cost more for as many rows.
    """
    for group in plan_padded(costs_of(data, draw), budget_tokens):
        chosen = np.zeros(sum(map(len, draw.values())), dtype=np.bool_)
        chosen[group] = True
        parts = zip(draw.items(), _divided(chosen, draw), strict=True)
        yield _joined([data[source].batch(rows[own], tasks[source]) for (source, rows), own in parts if own.any()])


def _divided(flags: npt.NDArray[np.bool_], draw: Draw) -> list[npt.NDArray[np.bool_]]:
    """Return flags of drawn rows by source."""
    return np.split(flags, np.cumsum([len(rows) for rows in draw.values()])[:-1])


def _joined(parts: list[RowBatch]) -> RowBatch:
    """Return the rows of several sources as one batch, padded to the widest."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.mask.shape[1] for part in parts)
    inputs, masks, targets, spans = [], [], dict[int, torch.Tensor](), dict[int, slice]()
    start = 0
    for part in parts:
        own = part.mask.shape[1]
        # A pad's token is covered by the mask, whatever it is; vectors are all of one width.
        is_tokens = part.inputs.dtype == torch.int64
        inputs.append(functional.pad(part.inputs, (0, width - own)) if is_tokens else part.inputs)
        masks.append(functional.pad(part.mask, (0, width - own)))
        for task, target in part.targets.items():
            # Targets of tokens are as wide as their rows; so may a seq2seq's be by chance, whom more IGNORED harm not.
            is_by_token = is_tokens and target.ndim == 2 and target.dtype == torch.int64 and target.shape[1] == own
            targets[task] = functional.pad(target, (0, width - own), value=IGNORED) if is_by_token else target
            spans[task] = slice(start, start + len(part.mask))
        start += len(part.mask)
    return RowBatch(torch.cat(inputs), torch.cat(masks), targets, spans)


def _map(path: Path, item: str) -> npt.NDArray[Any]:
    # A file of nothing cannot be mapped; it stands where no row has a target, as in seq2seq with empty answers.
    return np.memmap(path, dtype=item, mode="r") if path.stat().st_size else np.empty(0, dtype=item)


def _offsets(path: Path) -> Indices:
    offsets: Indices = np.asarray(_map(path, "<i8"), dtype=np.int64)
    if len(offsets) == 0 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise DataDamaged(f"{path.name} does not divide anything into rows")
    return offsets


def _padded(parts: list[npt.NDArray[np.int64]], pad: int) -> torch.Tensor:
    width = max(map(len, parts))
    out = np.full((len(parts), width), pad, dtype=np.int64)
    for row, part in enumerate(parts):
        out[row, : len(part)] = part
    return torch.from_numpy(out)
