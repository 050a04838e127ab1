"""The devices of this host, without importing torch: a parent that touched CUDA could not fork or forget it."""

import logging
import os
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass

from shared.settings import Settings

log = logging.getLogger(__name__)

CPU_MEMORY_SHARE = 0.5
GPU_MEMORY_SHARE = 0.8
SMI_SECONDS = 30.0
MOST_GPUS = 16
"""Of one host."""


@dataclass(frozen=True)
class Device:
    """One device that one worker process owns: `cuda:0`, or `cpu:1` for the second CPU worker."""

    name: str
    memory_bytes: int
    """What the model cache may fill by default."""

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")

    def environment(self, cpu_workers: int, torch_threads: int | None) -> dict[str, str]:
        """Return what pins a process to this device."""
        if self.is_cuda:
            # By nvidia-smi's numbers: left to itself, CUDA counts the fastest first.
            return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": self.name.removeprefix("cuda:")}
        threads = torch_threads or max(1, (os.cpu_count() or 1) // cpu_workers)
        return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it. Its number may be another after a restart of the machine, its UUID never is."""

    index: str
    uuid: str
    device: Device


def enumerate_devices(settings: Settings) -> list[Device]:
    """Return the devices to start workers on: GPUs, all or the chosen ones, or as many CPU workers as asked for."""
    gpus = [] if settings.device == "cpu" else _chosen(_gpus(), settings.gpus)
    if settings.device == "cuda" and not gpus:
        raise RuntimeError("LAMPLIGHTER_DEVICE is cuda, but nvidia-smi lists no GPU.")
    if gpus:
        return gpus if settings.workers == "auto" else gpus[: int(settings.workers)]
    count = 1 if settings.workers == "auto" else int(settings.workers)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [Device(f"cpu:{index}", int(memory * CPU_MEMORY_SHARE / count)) for index in range(count)]


def _chosen(gpus: list[Gpu], names: list[str]) -> list[Device]:
    """Return those GPUs that were chosen, in that order. One that is not there is told of, and hinders no other."""
    known = {gpu.uuid: gpu.device for gpu in gpus} | {gpu.index: gpu.device for gpu in gpus}
    if missing := [name for name in names if name not in known]:
        there = [f"{gpu.index} ({gpu.uuid})" for gpu in gpus]
        log.error("chosen GPUs are not there", extra={"missing": missing, "there": there})
        if len(missing) == len(names):
            raise RuntimeError(
                f"LAMPLIGHTER_GPUS names {', '.join(missing)}; nvidia-smi lists {', '.join(there) or 'none'}."
            )
    return list(dict.fromkeys(known[name] for name in names if name in known)) if names else [g.device for g in gpus]


def _gpus() -> list[Gpu]:
    """Return the GPUs that nvidia-smi can tell of. Of one that is in trouble it says no number, or fails for all."""
    fields = ["index", "uuid", "memory.total"]
    found = [_gpu(*row) for row in _ask_nvidia_smi(fields) or _each_alone(fields)]
    return [gpu for gpu in found if gpu is not None]


def _gpu(number: str, uuid: str, mib: str) -> Gpu | None:
    if not (number.isdigit() and mib.isdigit()):
        log.error("a GPU is in trouble", extra={"gpu": number, "uuid": uuid, "memory": mib})
        return None
    return Gpu(number, uuid, Device(f"cuda:{number}", int(int(mib) * 2**20 * GPU_MEMORY_SHARE)))


def _each_alone(fields: list[str]) -> list[list[str]]:
    """Return what nvidia-smi says of each GPU by itself: one that fell off its bus has it fail for all together."""
    if shutil.which("nvidia-smi") is None:
        return []
    found = [row for number in range(MOST_GPUS) for row in _ask_nvidia_smi(fields, number)]
    log.error("nvidia-smi fails for some GPU, or for all", extra={"well": [row[0] for row in found]})
    return found


@dataclass(frozen=True)
class GpuReading:
    """What nvidia-smi says of a GPU now. `use`: share of the last moments in which anything ran on it."""

    use: float
    memory_used_bytes: int
    memory_bytes: int


class GpuMeter:
    """Reads a GPU now and then, in a thread of its own, as one that is in trouble answers late or never."""

    def __init__(self, device: str) -> None:
        self._number = int(device.removeprefix("cuda:")) if device.startswith("cuda:") else None
        self._newest: GpuReading | None = None
        self._good_until = 0.0

    @property
    def reading(self) -> GpuReading | None:
        """The newest; None on a CPU, and while nobody can say: what was once said is not said for ever."""
        return self._newest if time.monotonic() < self._good_until else None

    def run(self, stop: threading.Event, seconds: float) -> None:
        """Read every so often until `stop` is set."""
        while self._number is not None and not stop.wait(seconds):
            try:
                self._newest = _reading(self._number)
                self._good_until = time.monotonic() + 2 * seconds + SMI_SECONDS
            except (OSError, subprocess.SubprocessError) as error:
                log.warning("a GPU cannot be read", extra={"gpu": self._number, "error": str(error)})


def _reading(number: int) -> GpuReading | None:
    rows = _ask_nvidia_smi(["utilization.gpu", "memory.used", "memory.total"], number)
    if len(rows) != 1 or not all(field.isdigit() for field in rows[0]):
        return None
    use, used, total = map(int, rows[0])
    return GpuReading(use / 100, used * 2**20, total * 2**20)


def _ask_nvidia_smi(fields: list[str], number: int | None = None) -> list[list[str]]:
    """Return a row for each GPU, or for one; nothing where it is not installed or fails.

    Raises TimeoutExpired when it does not answer: what there is, nobody knows then.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    query += [] if number is None else ["-i", str(number)]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    rows = [[field.strip() for field in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    return [row for row in rows if len(row) == len(fields)] if answer.returncode == 0 else []
