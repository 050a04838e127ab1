"""Brings a step's numbers to the device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def to_device(
    numbers: "Sequence[float] | np.ndarray[Any, Any]", device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return numbers as a tensor on a device, without waiting for a GPU to be done with what it was told before.

    torch copies only from pinned memory without that, and keeps it until the copy is made.
    """
    tensor = torch.as_tensor(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
