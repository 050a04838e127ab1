"""Writes a Llama of SmolLM-135M's shape with random weights: `python -m tests.benchmarks.smol_llama DIRECTORY`."""

import sys
from pathlib import Path

from tests.benchmarks.engine_workloads import LLAMA
from tests.support.models import make_tiny_llama

SHAPE = LLAMA | {"initializer_range": 0.02}

if __name__ == "__main__":
    make_tiny_llama(Path(sys.argv[1]), **SHAPE)
