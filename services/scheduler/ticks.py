"""What several duties of one loop share: none of them waits for another's fault."""

from collections.abc import Callable


def run_each(duties: list[Callable[[], object]]) -> None:
    """Run every duty; raise the first error once the others have had their turn."""
    failed: Exception | None = None
    for duty in duties:
        try:
            duty()
        except Exception as error:  # noqa: BLE001  # raised below
            failed = failed or error
    if failed is not None:
        raise failed
