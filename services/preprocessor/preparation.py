"""Prepares the files of a fine-tuning job before a GPU is touched: checked, rendered, tokenized, kept by content."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from services.preprocessor.shards import Shards, ShardWriter, find_shards, shards_digest
from services.preprocessor.tokenization import Encoded, ExampleEncoder, TokenizerFiles
from services.preprocessor.validation import file_sha256, form_of, read_examples, validate
from shared.domain.training_file import MIN_EXAMPLES, Example, Faults, Name, TrainingFileChecker, check_n_examples

CHUNK_EXAMPLES = 256
CHUNK_BYTES = 1 << 17
"""Encoded at a time: a token in the making takes a hundred bytes and more."""

Source = Path | BinaryIO
Progress = Callable[[int, int], None]
"""Called with the bytes that are tokenized and their total; what it raises ends the work, and nothing is left."""


@dataclass(frozen=True)
class Options:
    """`max_length`: tokens of an example at most, by default and never more than the model's context.

    `truncate`: cut longer examples at their end, as OpenAI does it, instead of refusing them by their lines.
    """

    max_length: int | None = None
    truncate: bool = False


@dataclass(frozen=True)
class Prepared:
    training: Shards
    validation: Shards | None


@dataclass
class _Input:
    """One file on its way: `data_sha256` and `digest` name its content and what is made of it."""

    name: Name
    file: BinaryIO
    least: int
    data_sha256: str
    digest: str
    found: Shards | None

    @property
    def size_bytes(self) -> int:
        return self.file.seek(0, 2)


def prepare(
    training: Source,
    validation: Source | None,
    model: Path,
    out: Path,
    options: Options = Options(),
    on_progress: Progress = lambda _done, _total: None,
) -> Prepared:
    """Return the data sets of a training file and its validation file under `out`, made now or by an earlier job.

    Sources are paths, or seekable binary files. The work stays on one core. Raises TrainingFileRefused for what is
    wrong with the files, line by line; ModelRefused for a model whose tokenizer cannot be used; OSError.
    """
    files = TokenizerFiles.read(model)
    work = _Preparation(files, out, options)
    with ExitStack() as stack:
        inputs = [work.input("training_file", stack.enter_context(_opened(training)), MIN_EXAMPLES)]
        if validation is not None:
            inputs.append(work.input("validation_file", stack.enter_context(_opened(validation)), 1))
        work.validate(inputs)
        made = work.tokenize(inputs, on_progress)
    return Prepared(made[0], made[1] if validation is not None else None)


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    if isinstance(source, Path):
        with source.open("rb", buffering=1 << 20) as file:
            yield file
    else:
        yield source


class _Preparation:
    def __init__(self, files: TokenizerFiles, out: Path, options: Options) -> None:
        self._files, self._out, self._truncate = files, out, options.truncate
        self._max_length = min(options.max_length or files.context_tokens, files.context_tokens)

    def input(self, name: Name, file: BinaryIO, least: int) -> _Input:
        """Look a file up by its content."""
        data_sha256 = file_sha256(file)
        digest = shards_digest(
            data_sha256=data_sha256,
            tokenizer_sha256=self._files.sha256,
            template_sha256=self._files.template_sha256,
            max_length=self._max_length,
            truncate=self._truncate,
        )
        return _Input(name, file, least, data_sha256, digest, find_shards(self._out, digest))

    def validate(self, inputs: list[_Input]) -> None:
        """Check every line of what is not there yet, and that all files have the first one's form."""
        form: type[Example] | None = None
        for each in inputs:
            if each.found is None or (form is not None and form is not form_of(each.file)):
                form = validate(each.file, Faults(each.name), each.least, form)
            else:
                check_n_examples(each.name, each.found.manifest.examples, each.least)
                form = form_of(each.file)

    def tokenize(self, inputs: list[_Input], on_progress: Progress) -> list[Shards]:
        missing = [each for each in inputs if each.found is None]
        if missing:
            encoder = ExampleEncoder(self._files, self._max_length, truncate=self._truncate)
            done, total = 0, sum(each.size_bytes for each in missing)
            for each in missing:
                # Training and validation file may be the same.
                each.found = find_shards(self._out, each.digest) or self._write(each, encoder, done, total, on_progress)
                done += each.size_bytes
        return [each.found for each in inputs if each.found is not None]

    def _write(
        self, source: _Input, encoder: ExampleEncoder, done_bytes: int, total_bytes: int, on_progress: Progress
    ) -> Shards:
        faults = Faults(source.name)
        with ShardWriter(self._out, source.digest) as writer:
            for lines, examples, size_bytes in _chunks(read_examples(source.file, TrainingFileChecker(faults))):
                for line, encoded in zip(lines, encoder.encode(examples), strict=True):
                    if isinstance(encoded, Encoded):
                        writer.add(encoded.tokens, encoded.weights)
                    else:
                        faults.add(line, encoded)
                done_bytes += size_bytes
                on_progress(done_bytes, total_bytes)
                if faults.is_full:
                    break  # tokenizing the rest would only count more
            faults.refuse()
            return writer.commit(
                vocabulary=encoder.vocabulary,
                pad_token=encoder.pad_token,
                data_sha256=source.data_sha256,
                tokenizer_sha256=self._files.sha256,
                template_sha256=self._files.template_sha256,
                max_length=self._max_length,
            )


def _chunks(examples: Iterator[tuple[int, Example, int]]) -> Iterator[tuple[list[int], list[Example], int]]:
    """Yield line numbers, examples and bytes of what is encoded at a time."""
    lines: list[int] = []
    chunk: list[Example] = []
    size_bytes = 0
    for line, example, length in examples:
        lines.append(line)
        chunk.append(example)
        size_bytes += length
        if len(chunk) >= CHUNK_EXAMPLES or size_bytes >= CHUNK_BYTES:
            yield lines, chunk, size_bytes
            lines, chunk, size_bytes = [], [], 0
    if chunk:
        yield lines, chunk, size_bytes
