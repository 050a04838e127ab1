"""How weights are divided among a job's processes; apart, so that children need not import the checks of the API."""

from typing import Literal

Sharding = Literal["none", "fsdp", "tensor"]
"""`none`: each process has all weights; `fsdp`: a share of each; `tensor`: a share of every matrix, to compute with."""
