"""The prepared rows of multi-task training (`shared.domain.prepared_tasks`), mapped into memory."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from services.worker.trainer.data import Indices, plan_padded
from services.worker.trainer.errors import DataDamaged
from shared.domain.prepared_tasks import FORMAT_VERSION, IGNORED, ITEM_TYPES, RowsManifest, TaskTargets


@dataclass(frozen=True)
class RowBatch:
    """Rows of one source for one pass of the trunk. R rows of T tokens; pads stand at the end.

    Targets, by task number: classification [R]; multilabel [R, labels] of float; regression [R] of float, standardised;
    token classification and causal LM [R, T], IGNORED where nothing is learnt (a causal LM's are the next tokens);
    seq2seq [R, T'].
    """

    source: int
    inputs: torch.Tensor
    """[R, T] token ids, or [R, width] vectors."""
    mask: torch.Tensor
    """[R, T], true for tokens; of vectors [R, 1]."""
    targets: dict[int, torch.Tensor]

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
        if self.manifest.width:
            inputs = torch.from_numpy(self._vectors[rows].astype(np.float32))
            return RowBatch(self.source, inputs, torch.ones((len(rows), 1), dtype=torch.bool), targets)
        tokens = [self._tokens[self._span(int(row))].astype(np.int64) for row in rows]
        lengths = self.lengths[rows]
        mask = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
        inputs = _padded(tokens, self.manifest.pad_token or 0)
        return RowBatch(self.source, inputs, torch.from_numpy(mask), targets)

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


def row_batches(rows: PreparedRows, chosen: Indices, tasks: tuple[int, ...], budget_tokens: int) -> Iterator[RowBatch]:
    """Yield passes over some rows of a source, of at most `budget_tokens` with their pads, a longer row alone."""
    for group in plan_padded(rows.lengths[chosen], budget_tokens):
        yield rows.batch(chosen[group], tasks)


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
