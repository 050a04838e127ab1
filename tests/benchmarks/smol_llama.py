"""Writes a Llama of SmolLM-135M's shape with random weights: `python -m tests.benchmarks.smol_llama DIRECTORY`."""

import sys
from pathlib import Path

from tests.support.models import make_tiny_llama

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}

if __name__ == "__main__":
    make_tiny_llama(Path(sys.argv[1]), **SHAPE)
