"""Makes what was written outlive a power loss."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have the disk keep a file's content, or a directory's names, before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
