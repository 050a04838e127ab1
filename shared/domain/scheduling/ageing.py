"""Who goes first among a tenant's jobs: the higher priority, until another has waited long enough. Pure."""

STEP_SECONDS = 86_400.0
"""What a step of priority is worth: a night's jobs go by their priorities, and none waits for ever behind those of
later days. Postgres has the same in its function `queue_rank`, by which an index is ordered."""


def queue_rank(priority: int, accepted: float) -> float:
    """Return a job's place in its tenant's queue, smallest first; `accepted`: when, in seconds.

    It falls behind nobody by waiting, so it need not be computed again: linear ageing as a number that stands still.
    """
    return accepted - priority * STEP_SECONDS
