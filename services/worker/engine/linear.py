"""Matrix products with weights that never change: packed once for the machine, and the same for a row in any batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional

FEWEST_ROWS = 8
"""Products of fewer rows take other code paths everywhere, whose last bits differ: so there are never fewer."""
ROW_COUNTS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256, 320, 384, 448, 512)
"""Numbers of rows that are tried for a product; others are filled up to one of them, or divided."""
MOST_MULTIPLICATIONS = 2**35
"""Of one trial: what would take more is tried with fewer rows, and used with no more than these."""
MOST_PADDING = 1.25
"""A product is filled up to so many times its rows at most; beyond it, it is divided."""
READING_ROWS = 64
"""To read a weight takes as long as this many rows more (24 in float32 and 120 in bfloat16 with AMX)."""


@dataclass(frozen=True)
class Trial:
    """How products are tried on a kind of device; see the constants for what the fields are."""

    row_counts: tuple[int, ...] = ROW_COUNTS
    most_multiplications: int = MOST_MULTIPLICATIONS
    reading_rows: int = READING_ROWS


TRIALS = {
    "cpu": Trial(),
    # An H200 multiplies 790 Tera operations a second in bfloat16, and reads 4.2 TB.
    "cuda": Trial((*ROW_COUNTS, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096), 2**39, 184),
}


@dataclass(frozen=True)
class Part:
    """Which columns of a product are those of one of the model's own modules: `size` of them from `start` on."""

    module: str
    start: int
    size: int


class Linear:
    """`x @ weight.T + bias` for x [rows, in]; the weight is [out, in] and is not kept when it was packed.

    `parts`: the modules of which it is made; none when no adapter can change it. `number`: its place among its
    decoder's products, by which adapters know it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, parts: Sequence[Part] = ()) -> None:
        self.parts = tuple(parts)
        self.number = -1
        self.out_features, self.in_features = weight.shape
        self.weight_bytes = weight.numel() * weight.element_size()
        self._bias = bias
        self._is_packed = can_pack(weight)
        # oneDNN's own layout, which torch.compile uses too: 1.2 to 2 times the speed of F.linear (bench-engine).
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 64) if self._is_packed else weight  # noqa: SLF001
        self._row_counts = row_counts_of(self._multiply, weight, is_packed=self._is_packed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return multiply_in_known_numbers(self._multiply, x, self._row_counts)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if not self._is_packed:
            return functional.linear(x, self._weight, self._bias)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")  # noqa: SLF001
        return out


def multiply_in_known_numbers(
    multiply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, row_counts: tuple[int, ...]
) -> torch.Tensor:
    """Multiply x [rows, in] in numbers of rows with which a row's bits are always the same."""
    rows = x.shape[0]
    counts = divide(rows, row_counts)
    if (missing := sum(counts) - rows) > 0:
        x = functional.pad(x, (0, 0, 0, missing))
    out = multiply(x) if len(counts) == 1 else torch.cat([multiply(part) for part in torch.split(x, list(counts))])
    return out[:rows] if missing else out


@lru_cache(maxsize=65_536)
def divide(rows: int, row_counts: tuple[int, ...]) -> tuple[int, ...]:
    """Return the numbers of rows, each of `row_counts`, of the products in which so many rows are computed."""
    found: list[int] = []
    while rows > 0:
        above = next((count for count in row_counts if count >= rows), None)
        below = max((count for count in row_counts if count <= rows), default=None)
        if above is not None and (below is None or above <= MOST_PADDING * rows):
            return (*found, above)
        assert below is not None  # there is always one count
        found.append(below)
        rows -= below
    return tuple(found) or row_counts[:1]


_known: dict[tuple[object, ...], tuple[int, ...]] = {}


def row_counts_of(
    multiply: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor, *, is_packed: bool
) -> tuple[int, ...]:
    """Return numbers of rows with which this machine gives a row the same bits, as a trial of each shape shows it.

    Libraries divide a product by its shape, so the order of a row's sums may change with how many others there are.
    Seen on a processor with AMX, bfloat16, weights [3072, 576]: one order for up to 32 rows, another from 33 to 700.
    """
    key = (weight.shape, weight.dtype, weight.device, is_packed, torch.get_num_threads())
    if key not in _known:
        _known[key] = _try_row_counts(multiply, weight)
    return _known[key]


@torch.inference_mode()
def _try_row_counts(multiply: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor) -> tuple[int, ...]:
    """Sort the numbers of rows by the bits that they bring, and return those that serve batches of all sizes best."""
    trial = TRIALS.get(weight.device.type, TRIALS["cpu"])
    rows = max(FEWEST_ROWS, min(trial.row_counts[-1], trial.most_multiplications // weight.numel()))
    generator = torch.Generator().manual_seed(0)
    # Of very different sizes, so that another order of the same sum shows.
    numbers, sizes = torch.randn(2, rows, weight.shape[1], generator=generator)
    x = (numbers * sizes.exp() ** 2).to(weight)
    families: list[tuple[list[int], torch.Tensor]] = []
    for count in [count for count in trial.row_counts if count <= rows]:
        # Many small products show as much as one large one: with few numbers, two orders may well agree.
        whole = rows // count * count
        out = torch.cat([multiply(x[start : start + count]) for start in range(0, whole, count)])
        for counts, known in families:
            shared = min(whole, len(known))
            if torch.equal(out[:shared], known[:shared]):
                counts.append(count)
                break
        else:
            families.append(([count], out))
    return min((tuple(counts) for counts, _ in families), key=lambda counts: _slowness(counts, trial))


def _slowness(row_counts: tuple[int, ...], trial: Trial) -> float:
    """Return how many times as long as undivided, about, products of all sizes take together with these counts."""
    divided = ((rows, divide(rows, row_counts)) for rows in trial.row_counts)
    reading = trial.reading_rows
    return sum((reading * len(counts) + sum(counts)) / (reading + rows) for rows, counts in divided)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this machine has a packed form for a weight of this kind."""
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or not has_onednn:
        return False
    return weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and _has_bfloat16_products())


def _has_bfloat16_products() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001
