"""A file that a service touches while it does its work: containers are asked for its age."""

from pathlib import Path


class Alive:
    """`path` None: nobody asks."""

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path is not None else None

    def beat(self) -> None:
        """Say that the work goes on."""
        if self._path is not None:
            self._path.touch()
