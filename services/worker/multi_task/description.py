"""What a multi-task model's directory says of its heads, so that it can be served and trained on."""

from pathlib import Path
from typing import Literal

import msgspec

from shared.domain.prepared_tasks import Sharing, TaskKind

DESCRIPTION_FILE = "multi_task.json"
HEADS_FILE = "heads.safetensors"
TRUNK_FILE = "trunk.safetensors"
"""The weights of the built-in backbone; others are saved as transformers and peft do it."""
VERSION = 1

Pooling = Literal["mean", "cls", "last", "none"]
RegressionLoss = Literal["mse", "huber"]


class HeadDescription(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One task: targets of regression are standardised by `mean` and `deviation`; around `center` sums are taken."""

    name: str
    kind: TaskKind
    labels: list[str] = []
    mean: float = 0.0
    deviation: float = 1.0
    center: float = 0.0
    loss: RegressionLoss = "mse"

    @property
    def outputs(self) -> int:
        """How wide its linear layer is; 0 for kinds that use the base's own head."""
        if self.kind in ("causal_lm", "seq2seq"):
            return 0
        return 1 if self.kind == "regression" else len(self.labels)


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """A multi-task model: `base` is the name of what it was trained from, `max_length` in tokens.

    `truncate`: longer texts are cut, as they were in training, and not refused.
    """

    version: int = VERSION
    base: str
    sharing: Sharing
    pooling: Pooling
    dtype: str
    max_length: int | None
    truncate: bool = False
    heads: list[HeadDescription]

    @classmethod
    def read(cls, directory: Path) -> "Description":
        """Read it from a model's directory. Raises OSError, msgspec.MsgspecError, ValueError for another version."""
        found = msgspec.json.decode((directory / DESCRIPTION_FILE).read_bytes(), type=cls)
        if found.version != VERSION:
            raise ValueError(f"{DESCRIPTION_FILE}: version {found.version} is not known")
        return found

    def write(self, directory: Path) -> None:
        (directory / DESCRIPTION_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self)) + b"\n")
