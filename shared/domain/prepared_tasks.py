"""What a preprocessor and a trainer both know of the rows of multi-task training.

Tasks that name the same file and field share their rows; each such set, of a training or validation file, is a
directory under the digest of all that it was made from:

```
DIGEST/tokens.bin            uint32, little-endian: the tokens of all rows, one after another
DIGEST/offsets.bin           int64: where each row begins, and the end of the last
DIGEST/vectors.bin           float32 [rows, width], in place of both for the built-in backbone
DIGEST/NUMBER.labels.bin     the targets of the task with this number, see below
DIGEST/NUMBER.offsets.bin    int64, for seq2seq: where each row's target tokens begin, and the end of the last
DIGEST/manifest.json         `RowsManifest`
```
Targets: classification int32, the label's number; multilabel uint8 [rows, labels]; regression float64, as given;
token classification int32, one for each token, IGNORED where there is none to learn; causal LM uint8, one for each
token, 1 where it is learnt; seq2seq uint32, the target's tokens.
"""

from typing import Literal

import msgspec

TaskKind = Literal["classification", "multilabel", "regression", "token_classification", "causal_lm", "seq2seq"]
Sharing = Literal["full", "lora", "last_layers"]
Mode = Literal["parallel", "sequential"]
Strategy = Literal["uniform", "proportional", "temperature", "weights", "round_robin"]

FORMAT_VERSION = 1
IGNORED = -100
"""The target of a token that has none, as torch's losses know it."""
MOST_INPUT = 1e30
"""Of a vector's number, which becomes a float32."""
MOST_LABELS = 4096
"""Of one task: what is counted of its answers is a matrix of labels by labels."""
LABELLED: tuple[TaskKind, ...] = ("classification", "multilabel", "token_classification")
"""Kinds whose targets are chosen from a set of labels."""
ITEM_TYPES: dict[TaskKind, str] = {
    "classification": "<i4",
    "multilabel": "|u1",
    "regression": "<f8",
    "token_classification": "<i4",
    "causal_lm": "|u1",
    "seq2seq": "<u4",
}
"""numpy's names of the number types in which targets are stored."""
VECTOR_PREFIX = "vector:"


class TaskTargets(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of one task from its training file; its validation file has the same.

    `labels`: in the order of their numbers. `mean` and `deviation` standardise regression targets: the model learns
    (target - mean) / deviation. `center`: their mean in the training file, standardised or not: sums from which metrics
    follow are taken around it. `counts`: in this file, rows (for tokens: words) of each label.
    """

    name: str
    kind: TaskKind
    labels: list[str] = []
    mean: float = 0.0
    deviation: float = 1.0
    center: float = 0.0
    counts: list[int] = []


class RowsManifest(msgspec.Struct, frozen=True, kw_only=True):
    """`longest` and `tokens` are in tokens, a vector counting as one; `width` is that of vectors, else 0.

    `target_tokens`, `longest_target`: Of a seq2seq task, if there is one.
    """

    version: int = FORMAT_VERSION
    rows: int
    tokens: int
    longest: int
    width: int
    vocabulary: int
    pad_token: int | None
    digest: str
    tasks: list[TaskTargets]
    target_tokens: int = 0
    longest_target: int = 0


def vector_shape(model: str) -> tuple[int, int] | None:
    """Return (inputs, hidden units) of the built-in backbone that a base name asks for; None for other names.

    Raises ValueError when the numbers are missing or out of range.
    """
    if not model.startswith(VECTOR_PREFIX):
        return None
    parts = model.removeprefix(VECTOR_PREFIX).split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) <= 6 for part in parts):
        raise ValueError(f"{model[:60]!r} is not vector:IN:HIDDEN with two whole numbers")
    inputs, hidden = map(int, parts)
    if not (1 <= inputs <= 65_536 and 1 <= hidden <= 16_384):
        raise ValueError(f"{model[:60]!r}: 1 to 65536 inputs and 1 to 16384 hidden units are possible")
    return inputs, hidden
