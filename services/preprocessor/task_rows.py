"""Prepares the files of a multi-task job: every line checked for every task that reads it, tokenized, kept by content.

A source (rows that several tasks share) is read twice, as is its validation file: once to check it and to learn labels
and scales, once to write it. Nothing but labels and a few sums is held meanwhile.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import msgspec

from services.preprocessor.shards import MANIFEST, DirectoryWriter, little_endian, shards_digest
from services.preprocessor.tokenization import (
    Encoded,
    EncodedRow,
    ExampleEncoder,
    RowEncoder,
    TokenizerFiles,
)
from services.preprocessor.validation import MAX_COUNTED, file_sha256, read_lines
from shared.domain.batch_file import MAX_LINE_BYTES, LineError
from shared.domain.multi_task import TaskCreate
from shared.domain.prepared_tasks import (
    FORMAT_VERSION,
    IGNORED,
    LABELLED,
    MOST_LABELS,
    RowsManifest,
    TaskTargets,
)
from shared.domain.task_file import Fault, ordered, parse_row, target_of, text_of, vector_of, words_of
from shared.domain.training_file import Faults, PromptExample

MIN_ROWS = 2
CHUNK_ROWS = 256
CHUNK_BYTES = 1 << 17


@dataclass(frozen=True)
class Source:
    """Rows that some tasks share. `numbers`: the tasks' in the specification; the files are open for reading."""

    numbers: tuple[int, ...]
    tasks: tuple[TaskCreate, ...]
    training: BinaryIO
    validation: BinaryIO | None

    @property
    def has_words(self) -> bool:
        return self.tasks[0].kind == "token_classification"

    @property
    def has_prompt(self) -> bool:
        return self.tasks[0].kind == "causal_lm" and self.tasks[0].label_field is not None


@dataclass(frozen=True)
class Reading:
    """How rows become numbers: vectors of `width`, or tokens by `files`, `max_length` of them at most."""

    width: int
    files: TokenizerFiles | None
    max_length: int
    truncate: bool


@dataclass(frozen=True)
class PreparedSource:
    training: Path
    training_manifest: RowsManifest
    validation: Path | None
    validation_manifest: RowsManifest | None


def prepare_source(source: Source, reading: Reading, out: Path) -> PreparedSource:
    """Return the rows of a source under `out`, made now or by an earlier job.

    Raises TrainingFileRefused for what is wrong, line by line; ModelRefused; OSError.
    """
    work = _Preparation(source, reading, out)
    training, made = work.prepare(source.training, "training_file", None)
    if source.validation is None:
        return PreparedSource(training, made, None, None)
    validation, manifest = work.prepare(source.validation, "validation_file", made.tasks)
    return PreparedSource(training, made, validation, manifest)


@dataclass
class _Row:
    """A good line: its text (words, numbers) and each task's target."""

    line: int
    content: Any
    targets: list[Any]


@dataclass
class _Seen:
    """What is learnt of a task's targets from a whole file. Mean and squares by Welford's method (1962)."""

    labels: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add_number(self, value: float) -> None:
        self.rows += 1
        change = value - self.mean
        self.mean += change / self.rows
        self.squares += change * (value - self.mean)

    def add_labels(self, labels: Sequence[str]) -> None:
        self.rows += 1
        self.labels.update(labels)

    @property
    def deviation(self) -> float:
        """Of the whole file, as scikit-learn's StandardScaler has it."""
        return float((self.squares / max(1, self.rows)) ** 0.5)


class _Preparation:
    def __init__(self, source: Source, reading: Reading, out: Path) -> None:
        self._source, self._reading, self._out = source, reading, out
        self._tasks = source.tasks

    def prepare(self, file: BinaryIO, name: str, known: list[TaskTargets] | None) -> tuple[Path, RowsManifest]:
        """Check and write one file. `known`: what the training file said of the tasks, for a validation file."""
        digest = self._digest(file, known)
        found = _find(self._out, digest)
        if found is not None:
            return self._out / digest, found
        faults = _faults(self._source, name)
        described = self._scan(file, faults, known)
        return self._write(file, digest, described, faults)

    def _digest(self, file: BinaryIO, known: list[TaskTargets] | None) -> str:
        reading = self._reading
        return shards_digest(
            format=FORMAT_VERSION,
            kind="rows",
            data_sha256=file_sha256(file),
            tokenizer_sha256=reading.files.sha256 if reading.files else None,
            width=reading.width,
            max_length=reading.max_length,
            truncate=reading.truncate,
            text_field=self._tasks[0].text_field,
            tasks=[(task.name, task.kind, task.label_field, task.is_standardized) for task in self._tasks],
            known=[msgspec.to_builtins(msgspec.structs.replace(task, counts=[])) for task in known or []],
        )

    def _scan(self, file: BinaryIO, faults: Faults, known: list[TaskTargets] | None) -> list[TaskTargets]:
        """Check every line; return what the targets are. Raises TrainingFileRefused."""
        seen = [_Seen() for _ in self._tasks]
        allowed = [set(task.labels) for task in known] if known is not None else None
        rows = 0
        for row in self._rows(file, faults):
            rows += 1
            if any(len(one.labels) > MOST_LABELS for one in seen):
                break  # counting the rest would only take memory
            for number, (task, target) in enumerate(zip(self._tasks, row.targets, strict=True)):
                self._note(task, seen[number], target)
                if allowed is not None:
                    self._require_known(task, target, allowed[number], row.line, faults)
        if not faults.count:
            least = MIN_ROWS if known is None else 1
            self._require_enough(rows, least, seen, faults, is_training=known is None)
        faults.refuse()
        return [self._described(number, seen[number], known) for number in range(len(self._tasks))]

    def _rows(self, file: BinaryIO, faults: Faults) -> Iterator[_Row]:
        """Yield the good lines; the others are noted."""
        for number, line in enumerate(read_lines(file), 1):
            if faults.count >= MAX_COUNTED:
                return
            if line is None:
                text = f"This line is larger than {MAX_LINE_BYTES} bytes."
                faults.add(number, LineError("line_too_large", text))
                continue
            try:
                yield self._row(number, line)
            except Fault as fault:
                faults.add(number, self._named(fault))

    def _row(self, number: int, line: bytes) -> _Row:
        entry, name = parse_row(line), self._tasks[0].text_field
        words = 0
        content: Any
        if self._reading.width:
            content = vector_of(entry, name, self._reading.width)
        elif self._source.has_words:
            content = words_of(entry, name)
            words = len(content)
        else:
            content = text_of(entry, name)
        targets: list[Any] = []
        for task in self._tasks:
            if task.label_field is None:
                targets.append(None)
                continue
            try:
                targets.append(target_of(entry, task.kind, task.label_field, words))
            except Fault as fault:
                fault.error.message = f"Task {task.name!r}: {fault.error.message}"
                raise
        return _Row(number, content, targets)

    def _named(self, fault: Fault) -> LineError:
        """Return a fault that names its task, or all that read the field."""
        error = fault.error
        error.param = error.param or None
        if not error.message.startswith("Task "):
            names = ", ".join(repr(task.name) for task in self._tasks)
            error.message = f"Task{'s' if len(self._tasks) > 1 else ''} {names}: {error.message}"
        return error

    @staticmethod
    def _note(task: TaskCreate, seen: _Seen, target: Any) -> None:
        if task.kind == "regression":
            seen.add_number(target)
        elif task.kind == "classification":
            seen.add_labels([target])
        elif task.kind in LABELLED:
            seen.add_labels(target)

    @staticmethod
    def _require_known(task: TaskCreate, target: Any, allowed: set[str], line: int, faults: Faults) -> None:
        if task.kind not in LABELLED:
            return
        unknown = sorted(set([target] if task.kind == "classification" else target) - allowed)
        if unknown:
            text = f"Task {task.name!r}: the label {unknown[0]!r} does not occur in the training file."
            faults.add(line, LineError("unknown_label", text, param=task.label_field))

    def _require_enough(self, rows: int, least: int, seen: list[_Seen], faults: Faults, *, is_training: bool) -> None:
        """Note what the file as a whole lacks."""
        if rows < least:
            names = ", ".join(repr(task.name) for task in self._tasks)
            text = f"Task {names}: there must be at least {least} rows, and there are {rows}."
            faults.add(None, LineError("invalid_n_examples", text))
            return
        if not is_training:
            return
        for task, one in zip(self._tasks, seen, strict=True):
            fault = _lacking(task, one, rows)
            if fault is not None:
                faults.add(None, fault)

    def _described(self, number: int, seen: _Seen, known: list[TaskTargets] | None) -> TaskTargets:
        task = self._tasks[number]
        base = known[number] if known is not None else self._first(task, seen)
        return msgspec.structs.replace(base, counts=[seen.labels[label] for label in base.labels])

    @staticmethod
    def _first(task: TaskCreate, seen: _Seen) -> TaskTargets:
        is_scaled = task.kind == "regression" and task.is_standardized
        mean, deviation = (seen.mean, seen.deviation) if is_scaled else (0.0, 1.0)
        return TaskTargets(
            name=task.name,
            kind=task.kind,
            labels=ordered(set(seen.labels)),
            mean=mean,
            deviation=deviation,
            center=seen.mean,
        )

    def _write(
        self, file: BinaryIO, digest: str, described: list[TaskTargets], faults: Faults
    ) -> tuple[Path, RowsManifest]:
        with _RowWriter(self._out, digest, self._source, self._reading, described) as writer:
            for chunk in _chunks(self._rows(file, faults)):
                writer.add(chunk, faults)
                if faults.is_full:
                    break  # tokenizing the rest would only count more
            faults.refuse()
            return writer.commit()


class _RowWriter:
    """Writes rows and targets (`shared.domain.prepared_tasks`), a chunk at a time."""

    def __init__(self, out: Path, digest: str, source: Source, reading: Reading, described: list[TaskTargets]) -> None:
        self._source, self._reading, self._described, self._digest = source, reading, described, digest
        self._numbers = [{label: index for index, label in enumerate(task.labels)} for task in described]
        names = ["vectors.bin"] if reading.width else ["tokens.bin", "offsets.bin"]
        self._first_label = len(names)
        names += [f"{number}.labels.bin" for number in range(len(described))]
        self._offset_files: dict[int, int] = {}
        for number, task in enumerate(described):
            if task.kind == "seq2seq":
                self._offset_files[number] = len(names)
                names.append(f"{number}.offsets.bin")
        self._directory = DirectoryWriter(out, digest, names)
        self._rows = self._tokens = self._longest = 0
        self._target_tokens = dict.fromkeys(self._offset_files, 0)
        self._longest_target = 0
        self._encoder = self._prompts = None
        if reading.files is not None:
            self._encoder = RowEncoder(reading.files, reading.max_length, truncate=reading.truncate)
            if source.has_prompt:
                self._prompts = ExampleEncoder(reading.files, reading.max_length, truncate=reading.truncate)

    def __enter__(self) -> Self:
        self._files = self._directory.__enter__().files
        if not self._reading.width:
            self._put(1, array("q", [0]))
        for place in self._offset_files.values():
            self._put(place, array("q", [0]))
        return self

    def __exit__(self, *error: object) -> None:
        self._directory.__exit__(*error)  # type: ignore[arg-type]

    def _put(self, place: int, values: "array[Any]") -> None:
        self._files[place].write(little_endian(values))

    def add(self, chunk: list[_Row], faults: Faults) -> None:
        """Add rows; those that cannot be encoded are noted."""
        if self._encoder is None:
            for row in chunk:
                self._put(0, array("f", row.content))
                self._count(1)
                self._add_targets(row, [], b"")
            return
        for row, encoded in zip(chunk, self._encode(chunk), strict=True):
            if isinstance(encoded, LineError):
                faults.add(row.line, encoded)
            elif isinstance(encoded, Encoded):
                self._add_tokens(encoded.tokens)
                self._add_targets(row, [], bytes(encoded.weights))
            else:
                self._add_tokens(encoded.tokens)
                self._add_targets(row, encoded.begins, b"\x00" + b"\x01" * (len(encoded.tokens) - 1))
        self._add_answers(chunk, faults)

    def _encode(self, chunk: list[_Row]) -> Sequence[EncodedRow | Encoded | LineError]:
        assert self._encoder is not None
        if self._prompts is not None:
            examples = [PromptExample(row.content, row.targets[0]) for row in chunk]
            return self._prompts.encode(list(examples))
        contents = [row.content for row in chunk]
        return self._encoder.words(contents) if self._source.has_words else self._encoder.texts(contents)

    def _add_tokens(self, tokens: "array[int]") -> None:
        self._put(0, tokens)
        self._count(len(tokens))
        self._put(1, array("q", [self._tokens]))

    def _count(self, tokens: int) -> None:
        self._rows += 1
        self._tokens += tokens
        self._longest = max(self._longest, tokens)

    def _add_targets(self, row: _Row, begins: list[int | None], learnt: bytes) -> None:
        for number, (task, target) in enumerate(zip(self._described, row.targets, strict=True)):
            place, numbers = self._first_label + number, self._numbers[number]
            match task.kind:
                case "classification":
                    self._put(place, array("i", [numbers[target]]))
                case "multilabel":
                    present = {numbers[label] for label in target}
                    self._put(place, array("B", [index in present for index in range(len(numbers))]))
                case "regression":
                    self._put(place, array("d", [target]))
                case "token_classification":
                    labels = [IGNORED if word is None else numbers[target[word]] for word in begins]
                    self._put(place, array("i", labels))
                case "causal_lm":
                    self._files[place].write(learnt)

    def _add_answers(self, chunk: list[_Row], faults: Faults) -> None:
        """Add the target texts of seq2seq tasks."""
        assert self._encoder is not None
        for number, place in self._offset_files.items():
            encoded = self._encoder.texts([row.targets[number] for row in chunk])
            for row, answer in zip(chunk, encoded, strict=True):
                if isinstance(answer, LineError):
                    answer.message = f"Task {self._described[number].name!r}: the target: {answer.message}"
                    faults.add(row.line, answer)
                    continue
                self._put(self._first_label + number, answer.tokens)
                self._target_tokens[number] += len(answer.tokens)
                self._longest_target = max(self._longest_target, len(answer.tokens))
                self._put(place, array("q", [self._target_tokens[number]]))

    def commit(self) -> tuple[Path, RowsManifest]:
        """Make the rows durable. Raises OSError."""
        encoder = self._encoder
        manifest = RowsManifest(
            rows=self._rows,
            tokens=self._tokens,
            longest=self._longest,
            width=self._reading.width,
            vocabulary=encoder.vocabulary if encoder is not None else 0,
            pad_token=encoder.pad_token if encoder is not None else None,
            digest=self._digest,
            tasks=self._described,
            target_tokens=sum(self._target_tokens.values()),
            longest_target=self._longest_target,
        )
        path, _ = self._directory.publish(manifest, lambda path: _find(path.parent, path.name) is not None)
        return path, manifest


def _find(out: Path, digest: str) -> RowsManifest | None:
    """Return the manifest of rows of this digest if they are there."""
    with suppress(OSError, msgspec.MsgspecError):
        manifest = msgspec.json.decode((out / digest / MANIFEST).read_bytes(), type=RowsManifest)
        offsets = out / digest / ("vectors.bin" if manifest.width else "offsets.bin")
        expected = manifest.rows * manifest.width * 4 if manifest.width else 8 * (manifest.rows + 1)
        if offsets.stat().st_size == expected:
            return manifest
    return None


def _faults(source: Source, name: str) -> Faults:
    number, task = source.numbers[0], source.tasks[0]
    title = f"{name.replace('_', ' ')} of task {task.name!r}"
    return Faults(f"tasks[{number}].{name}", title=title)


def _lacking(task: TaskCreate, seen: _Seen, rows: int) -> LineError | None:
    """Return what a training file of so many rows lacks for a task as a whole."""
    if task.kind in LABELLED:
        least = 1 if task.kind == "multilabel" else 2
        if len(seen.labels) < least:
            only = next(iter(seen.labels), None)
            found = f"only {only!r}" if only is not None else "none"
            text = f"Task {task.name!r}: there must be {least} labels or more to tell apart, and there is {found}."
            return LineError("one_class", text, param=task.label_field)
        if task.kind == "multilabel" and min(seen.labels.values()) == rows:
            text = f"Task {task.name!r}: every row has every label; there is nothing to learn."
            return LineError("one_class", text, param=task.label_field)
        if len(seen.labels) > MOST_LABELS:
            text = f"Task {task.name!r}: there are {len(seen.labels)} labels; at most {MOST_LABELS} are possible."
            return LineError("too_many_labels", text, param=task.label_field)
    if task.kind == "regression" and task.is_standardized and not seen.deviation > 0:
        text = f"Task {task.name!r}: all targets are {seen.mean}; there is nothing to learn."
        return LineError("one_value", text, param=task.label_field)
    return None


def _chunks(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    chunk: list[_Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.content)
        if len(chunk) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
