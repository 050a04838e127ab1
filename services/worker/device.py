"""The devices of this host, without importing torch: a parent that touched CUDA could not fork or forget it."""

import os
import shutil
import subprocess
from dataclasses import dataclass

from shared.settings import Settings

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


def _chosen(gpus: list[Device], indices: list[int]) -> list[Device]:
    """Return those GPUs that were chosen, in that order. Raises RuntimeError for one that is not there."""
    known = {gpu.name: gpu for gpu in gpus}
    wanted = [f"cuda:{index}" for index in dict.fromkeys(indices)]
    if missing := [name for name in wanted if name not in known]:
        raise RuntimeError(
            f"LAMPLIGHTER_GPUS names {', '.join(missing)}; nvidia-smi lists {', '.join(known) or 'none'}."
        )
    return [known[name] for name in wanted] if wanted else gpus


def _gpus() -> list[Device]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=index,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:
        return []
    rows = [line.split(",") for line in answer.stdout.splitlines() if line.strip()]
    return [Device(f"cuda:{int(index)}", int(int(mib) * 2**20 * GPU_MEMORY_SHARE)) for index, mib in rows]
