"""The devices of this host, without importing torch: a parent that touched CUDA could not fork or forget it."""

import logging
import os
import shutil
import subprocess
from dataclasses import dataclass

from shared.settings import Settings

log = logging.getLogger(__name__)

CPU_MEMORY_SHARE = 0.5
GPU_MEMORY_SHARE = 0.8


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
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:
        return []
    rows = [[field.strip() for field in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    return [Gpu(n, uuid, Device(f"cuda:{n}", int(int(mib) * 2**20 * GPU_MEMORY_SHARE))) for n, uuid, mib in rows]
