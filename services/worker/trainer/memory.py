"""How much memory a trainer may take, and how running out of it looks."""

import contextlib
import resource

import torch


def limit_memory(device: torch.device, budget_bytes: int | None) -> None:
    """Have allocations beyond a budget fail, on a GPU by torch's allocator, else by the kernel; None: no limit.

    Without it a process that takes too much of a host is ended by the kernel, and others with it.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total) if budget_bytes else 1.0, device)
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = resource.RLIM_INFINITY if budget_bytes is None else budget_bytes
    soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted) if wanted >= 0 else hard
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out; torch has a class for it on a GPU and a sentence on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("can't allocate memory", "could not create a memory", "std::bad_alloc")
    )


def free_cached(device: torch.device) -> None:
    """Give what torch's allocator holds unused back to the GPU."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
