"""Ids as clients see them: a prefix that says of what, and the row's UUID."""

from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

from shared.domain.errors import NotFound


@dataclass(frozen=True)
class IdForm:
    """`param`: the field in which a client's request names one."""

    prefix: str
    what: str
    param: str

    def show(self, identifier: UUID) -> str:
        return f"{self.prefix}{identifier.hex}"

    def parse(self, shown: str) -> UUID:
        """Return the row's id; raises NotFound for what is none: a client learns nothing from its shape."""
        if shown.startswith(self.prefix):
            with suppress(ValueError):
                return UUID(hex=shown.removeprefix(self.prefix))
        raise self.not_found()

    def not_found(self) -> NotFound:
        return NotFound(f"No {self.what} found with this id.", param=self.param)
