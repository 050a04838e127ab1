"""From what jobs took to what they will take: device seconds of what is left, in chunks for a forecast. Pure."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from shared.domain.job import JobKind
from shared.domain.scheduling.forecast import TOKENS_PER_SECOND, Lane, Work
from shared.domain.scheduling.windows import Window, WindowSpec
from shared.domain.slice import SliceKind

LEAST_SHARE = 0.05
"""Of a job that must be done before its own speed says more than that of others."""
GUESSED_SECONDS_PER_TOKEN = 1e-3
"""For kinds of jobs of which none has ended yet."""
GUESSED_TOKENS_PER_BYTE = 0.25
OWN_MARGIN, USUAL_MARGIN, GUESSED_MARGIN = 1.25, 1.5, 3.0
"""What nine of ten jobs take at most ÷ what is foretold: by a job's own speed, by too few others, by a guess."""
BASIS_CHUNKS = 500
"""Of all works that an estimate runs forward: it is somebody's call, and does with less detail than a forecast."""
MOST_CHUNKS = 24
"""Parts of a job that a forecast moves about by themselves."""
CHUNKS_IN_ALL = 4000
"""About as many parts as a forecast has, however many jobs there are: it takes a quarter of a millisecond for each."""


@dataclass(frozen=True)
class Speed:
    """What the last jobs of a kind on a model took; `model` None: on any.

    seconds_per_token: Device seconds for a token of `shared.domain.slice.estimated_tokens`, or of training.
    input_tokens_per_byte: Of a batch's file; None where nothing is known of it. margin: What nine of ten of these jobs
        took at most for a token ÷ `seconds_per_token`.
    """

    kind: str
    model: str | None
    seconds_per_token: float
    input_tokens_per_byte: float | None = None
    margin: float = USUAL_MARGIN


class Speeds:
    """What jobs take, as far as any has ended."""

    def __init__(self, known: Iterable[Speed]) -> None:
        self._known = {(speed.kind, speed.model): speed for speed in known}

    def is_measured(self, kind: str, model: str | None) -> bool:
        """Say whether something of this kind on this model has ended."""
        return model is not None and (kind, model) in self._known

    def of(self, kind: str, model: str | None) -> Speed:
        """Return the speed of a model; that of others of its kind, if nothing of it has ended yet."""
        usual = Speed(kind, None, GUESSED_SECONDS_PER_TOKEN, margin=GUESSED_MARGIN)
        if self.is_measured(kind, model):
            return self._known[kind, model]
        return self._known.get((kind, None), usual)

    def __iter__(self) -> Iterator[Speed]:
        return iter(self._known.values())


def chunks(seconds: float, slices: int, kind: SliceKind, jobs: int = 1, devices: int = 1) -> tuple[float, ...]:
    """Divide the device seconds that are left of one of so many jobs into parts that may run side by side.

    Training has one part, on all its devices at once.
    """
    seconds /= devices
    most = max(1, min(MOST_CHUNKS, CHUNKS_IN_ALL // max(1, jobs)))
    count = 1 if kind is SliceKind.TRAIN else max(1, min(slices, most))
    return (seconds / count,) * count if seconds > 0 else ()


def slice_kind(kind: str) -> SliceKind:
    return SliceKind.GENERATE if kind == JobKind.BATCH else SliceKind.TRAIN


def windows_of(*specs: Mapping[str, Any] | None) -> tuple[Window, ...]:
    """Return the windows that are there."""
    return tuple(WindowSpec.model_validate(spec).window for spec in specs if spec)


def hidden_name(tenant_id: str) -> str:
    """Return what stands for a tenant where others may look: the same for the same one, and nothing else."""
    return hashlib.sha256(f"tenant:{tenant_id}".encode()).hexdigest()[:16]


def _coarse(seconds: Sequence[float], most: int) -> list[float]:
    """Return about as much in at most so many equal parts."""
    count = min(len(seconds), most)
    return [sum(seconds) / count] * count if count else []


def basis_of(
    works: Sequence[Work],
    specs: Mapping[UUID, list[Any]],
    lanes: Iterable[Lane],
    weights: Mapping[str, float],
    speeds: Speeds,
) -> dict[str, Any]:
    """Return, as JSON, what an estimate runs forward beside the job that it is asked of: all works, without names.

    specs: By job, its windows as they were asked for. `from_basis` reads it.
    """
    return {
        "lanes": [
            {"id": each.worker_id.hex, "models": sorted(each.models), "host": each.host, "reaches": each.reaches}
            for each in lanes
        ],
        # Apart, as a gateway of the last release reads four of a speed.
        "speeds": [list(astuple(speed))[:4] for speed in speeds],
        "margins": [speed.margin for speed in speeds],
        "weights": {hidden_name(tenant): weight for tenant, weight in weights.items()},
        "works": [
            {
                "id": work.job_id.hex,
                "tenant": hidden_name(work.tenant_id),
                "model": work.model,
                "chunks": _coarse(work.chunks, max(1, BASIS_CHUNKS // len(works))),
                "kind": work.kind,
                "class": work.slice_class,
                "priority": work.priority,
                "accepted": work.accepted,
                "order": work.accepted,  # as the last release calls it
                "devices": work.devices_needed,
                "windows": specs.get(work.job_id, []),
                "deadline": work.deadline.isoformat() if work.deadline else None,
                "parents": sorted(parent.hex for parent in work.parents),
                "on": [worker.hex for worker in work.on],
                "margin": work.margin,
                "tokens_per_second": work.tokens_per_second,
            }
            for work in works
        ],
    }


def speeds_of(basis: Mapping[str, Any]) -> Speeds:
    """Return the speeds of `basis_of`."""
    margins = basis.get("margins") or [USUAL_MARGIN] * len(basis["speeds"])
    known = zip(basis["speeds"], margins, strict=True)
    return Speeds(replace(Speed(*speed[:4]), margin=margin) for speed, margin in known)


def from_basis(basis: Mapping[str, Any]) -> tuple[list[Work], list[Lane], dict[str, float]]:
    """Return the works, lanes and weights of `basis_of`; tenants by their hidden names."""
    works = [
        Work(
            job_id=UUID(each["id"]),
            tenant_id=each["tenant"],
            model=each["model"],
            chunks=tuple(each["chunks"]),
            kind=SliceKind(each["kind"]),
            slice_class=each["class"],
            priority=each["priority"],
            accepted=each.get("accepted", 0.0),
            devices_needed=each["devices"],
            windows=windows_of(*each["windows"]),
            deadline=datetime.fromisoformat(each["deadline"]) if each["deadline"] else None,
            parents=frozenset(UUID(parent) for parent in each["parents"]),
            on=tuple(UUID(worker) for worker in each["on"]),
            margin=each.get("margin", 1.0),
            tokens_per_second=each.get("tokens_per_second", TOKENS_PER_SECOND),
        )
        for each in basis["works"]
    ]
    lanes = [
        Lane(UUID(lane["id"]), frozenset(lane["models"]), lane.get("host", ""), lane.get("reaches", False))
        for lane in basis["lanes"]
    ]
    return works, lanes, dict(basis["weights"])
