"""Models whose weights are divided among the processes of a job, so that none has to hold all of them.

- `fsdp`: each holds a share of every weight and gathers a layer's when it is computed (torch's `fully_shard`: FSDP2,
  Zhao et al. 2023, arXiv 2304.11277). Examples are shared too; gradients are summed while they are scattered.
- `tensor`: each computes with its share of every matrix, by the plan that transformers has for the model (Shoeybi et
  al. 2019, arXiv 1909.08053). All see the same examples.

What is divided is a `DTensor`. An adapter is not: it is small, lies whole in every process, and its gradient is summed
as without division. Gathering is a collective: all processes must ask for the same, in the same order.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from services.worker.trainer.errors import BaseRefused
from services.worker.trainer.ranks import Ranks, collective

Computed = TypeVar("Computed")


def loading_arguments(ranks: Ranks) -> dict[str, Any]:
    """Return what `from_pretrained` is told so that this process loads its share alone."""
    return {"distributed_config": DistributedConfig(tp_size=ranks.size)} if ranks.is_tensor_parallel else {}


def require_divisible(config: Any, ranks: Ranks) -> None:
    """Raise BaseRefused when a model's heads cannot be divided among the ranks."""
    text = config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None)
        if ranks.is_tensor_parallel and heads is not None and heads % ranks.size:
            raise BaseRefused(f"Its {name} = {heads} cannot be divided by parallelism.tensor = {ranks.size}.")


class Root(torch.nn.Module):
    """A model of which more is computed than its own forward pass: any parts of it, in any order.

    Divided by `shard_layers`, what lies in no layer is gathered for as long as `compute` takes.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Computed]) -> Computed:
        """Return what `compute` returns: tensors, or a dictionary of them."""
        return compute()


def shard_layers(model: torch.nn.Module, device: torch.device, computed_in: torch.dtype | None = None) -> None:
    """Divide every layer's weights, one layer at a time, and then the rest; they move to `device` by it.

    Weights must be those of the file: what is added later, such as an adapter, stays whole. `computed_in`: the number
    type in which weights are gathered and products computed, their own by default. (Autocast would keep its copy of
    every gathered weight for the backward pass, and with them the whole model.)
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=computed_in, reduce_dtype=torch.float32 if computed_in else None)
    for module in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # Else what is gathered for a pass without gradients stays in the places of the shares, which the optimizer has.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Each rank's loss is divided by the targets of all, so gradients add up to what one process computes.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def is_divided(tensor: torch.Tensor) -> bool:
    """Say whether this process has only a share of a tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor, to every process; a collective where it is divided."""
    return collective(tensor.full_tensor) if isinstance(tensor, DTensor) else tensor


def share_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this process's share of a tensor that all have, divided as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scale gradients so that their norm over all processes is `max_norm` at most; return what it was."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    kinds = ([g for g in gradients if is_divided(g)], [g for g in gradients if not is_divided(g)])
    norms = [float(whole(torch.nn.utils.get_total_norm(kind))) for kind in kinds if kind]
    norm = sum(part**2 for part in norms) ** 0.5
    # As torch.nn.utils.clip_grad_norm_ does, which takes no mixture of divided and whole gradients.
    if (scale := max_norm / (norm + 1e-6)) < 1:
        for gradient in gradients:
            gradient.mul_(scale)
    return float(norm)
