"""How long to wait before another try. Decides, never sleeps."""

from random import Random

BASE_SECONDS = 1.0
MAX_SECONDS = 60.0


def backoff_seconds(failures: int, seed: int) -> float:
    """Return an exponential pause with full jitter, the same for the same seed: 1, 2, 4 … 60 s at most."""
    ceiling: float = min(MAX_SECONDS, BASE_SECONDS * 2 ** max(0, failures - 1))
    return ceiling * (0.5 + Random(seed * 1_000_003 + failures).random() / 2)  # noqa: S311  # jitter, not a secret
