"""The multi-task model itself: a shared trunk and one head a task. The trainer trains it, the engine serves it."""
