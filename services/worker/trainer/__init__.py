"""The trainer child, under the same supervisor and protocol as the engine child."""
