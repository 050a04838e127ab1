"""Decoding on a GPU without telling it every kernel anew: a step is recorded once, as a CUDA graph, and played again.

To start a kernel costs the CPU longer than a small batch's takes on the GPU. A graph reads and writes the same memory
each time, so a step's places and tokens are copied into it first. There is one for each of a few numbers of sequences
and lengths; rows that are over belong to nobody, and what they write goes to a block that is nobody's.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.worker.engine.adapters import Adapter
from services.worker.engine.decoder import FusedDecoder, is_out_of_memory
from services.worker.engine.kernels.gpu import PART_KEYS, SCRATCH_BYTES, Tiles, part_bytes, tiles_key
from services.worker.engine.kernels.kernels import BLOCK_TOKENS, Layout, device_key
from services.worker.engine.kernels.transfer import to_device

log = logging.getLogger(__name__)

SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256)


@dataclass
class _Recording:
    """A graph, with the memory that it reads and the logits that it writes, which all graphs share."""

    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor
    layout: Layout
    tiles: torch.Tensor
    logits: torch.Tensor
    nowhere: int
    """The first slot of the block that is nobody's."""

    def play(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Compute a step; the result is overwritten by the next."""
        count, width = layout.tables.shape
        places: dict[str, torch.Tensor] = self.layout.cache
        self.tokens[:count] = tokens
        places[device_key("positions")][:count] = to_device(layout.positions, tokens.device)
        places[device_key("slots")][:count] = to_device(layout.slots, tokens.device)
        places[device_key("tables")][:count, :width] = to_device(layout.tables, tokens.device)
        numbers = np.arange(count, dtype=np.int32)
        tiles = np.stack([numbers, np.ones_like(numbers), layout.positions, numbers], axis=1)
        self.tiles[:count] = to_device(tiles, tokens.device)
        # The others have no token and see no key.
        self.tiles[count:] = 0
        places[device_key("positions")][count:] = 0
        places[device_key("slots")][count:] = self.nowhere
        self.graph.replay()
        return self.logits[:count]


class GraphedDecoder:
    """`Decoder` that records steps of one token for each sequence; all others it leaves to the plain one.

    decoder: With one block more than its sequences have, the last.
    """

    def __init__(self, decoder: FusedDecoder, context: int, blocks: int) -> None:
        self._decoder = decoder
        self._table_width = -(-context // BLOCK_TOKENS)
        self._nowhere = blocks * BLOCK_TOKENS
        self._part_bytes = max(part_bytes(shape) for shape in decoder.shapes)
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._memory: Any = None
        self._is_short_of_memory = False
        # One for all: what a graph leaves alive of its own memory no other one can use.
        self._logits = torch.empty(SEQUENCES[-1], decoder.vocabulary, dtype=torch.float32, device=decoder.device)

    @property
    def vocabulary(self) -> int:
        return self._decoder.vocabulary

    @property
    def weight_bytes(self) -> int:
        return self._decoder.weight_bytes

    @property
    def device(self) -> torch.device:
        return self._decoder.device

    @property
    def pool_bytes(self) -> int:
        return self._decoder.pool_bytes + self._logits.numel() * self._logits.element_size()

    def free_memory(self) -> None:
        """Forget all graphs, whose memory is theirs alone, and record no more."""
        self._recordings.clear()
        self._memory, self._is_short_of_memory = None, True

    def read_adapter(self, directory: Path) -> Adapter:
        return self._decoder.read_adapter(directory)

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, layout: Layout, rows: list[int]) -> torch.Tensor:
        recording = self._recording(layout, rows)
        if recording is None:
            return self._decoder.forward(tokens, layout, rows)
        return recording.play(tokens, layout)

    def _recording(self, layout: Layout, rows: list[int]) -> _Recording | None:
        """Return the graph for a step; None when it is of another kind, or too large."""
        if layout.adapters is not None or len(rows) != layout.tokens or len(layout.spans) != layout.tokens:
            return None
        count = next((number for number in SEQUENCES if number >= layout.tokens), None)
        parts = 1 << (-(-layout.longest // PART_KEYS) - 1).bit_length()
        if count is None or count * parts * self._part_bytes > SCRATCH_BYTES or self._is_short_of_memory:
            return None
        if (count, parts) not in self._recordings:
            try:
                self._recordings[count, parts] = self._record(count, parts)
            except RuntimeError as error:  # of which torch.OutOfMemoryError is one
                if not is_out_of_memory(error):
                    raise
                self.free_memory()
                log.warning("too little memory to record steps: each is started anew from now on")
                return None
        return self._recordings[count, parts]

    def _record(self, count: int, parts: int) -> _Recording:
        device = self._decoder.device
        layout = Layout(
            spans=[],
            positions=np.zeros(count, np.int32),
            slots=np.full(count, self._nowhere, np.int64),
            tables=np.zeros((count, self._table_width), np.int32),
            longest=parts * PART_KEYS,
        )
        for name in ("positions", "slots", "tables"):
            layout.cache[device_key(name)] = torch.from_numpy(getattr(layout, name)).to(device)
        tiles = torch.zeros(count, 4, dtype=torch.int32, device=device)
        everyone = slice(0, count)
        for shape in self._decoder.shapes:
            layout.cache[tiles_key(shape)] = Tiles(tiles, [(everyone, everyone)], parts)
        tokens = torch.zeros(count, dtype=torch.long, device=device)
        self._decoder.compute(tokens, layout, None)  # kernels are compiled at their first use, which cannot be recorded
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # What another thread does on the GPU meanwhile, which loads a model or an adapter, is none of this graph's.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            self._logits[:count].copy_(self._decoder.compute(tokens, layout, None))
        self._memory = graph.pool()  # one graph's memory serves all, as they are played one after another
        return _Recording(graph, tokens, layout, tiles, self._logits, self._nowhere)
