"""LoRA by peft's configuration and file format, with a linear layer that passes over memory less often.

    y = x Wᵀ + s · (x Aᵀ) Bᵀ        W [out, in] frozen;  A [rank, in], B [out, rank] trained;  s = alpha / rank

(Hu et al. 2021, arXiv 2106.09685.) peft's own layer is the oracle of the tests.
"""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from services.worker.protocol import Hyperparameters

ADAPTER = "default"
"""The only adapter's name; it does not stand in its files."""


class _LoraProduct(torch.autograd.Function):
    """A frozen linear layer and its adapter. Backward needs x, x Aᵀ and the weights.

    Sums and factors are parts of the matrix products (`addmm`). Composed of torch's operations, the same takes five
    more passes over matrices of the layer's width.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.to(x.dtype).t()
        out = functional.linear(rows, weight, bias).addmm_(low, b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, weight, a, b = ctx.saved_tensors
        gradient = outputs[0].reshape(-1, weight.shape[0])
        low_gradient = (gradient @ b.to(gradient.dtype)).mul_(ctx.scaling)
        b_gradient = (gradient.t() @ low).mul_(ctx.scaling).to(b.dtype)
        a_gradient = (low_gradient.t() @ rows).to(a.dtype)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (gradient @ weight).addmm_(low_gradient, a.to(gradient.dtype))
            x_gradient = x_gradient.view(*outputs[0].shape[:-1], weight.shape[1])
        return x_gradient, None, None, a_gradient, b_gradient, None


class LoraLinear(PeftLoraLinear):
    """peft's layer with another forward pass; parameters, names, initialisation, saving and merging are peft's."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return [..., out] for x [..., in], in x's number type."""
        base: Any = self.base_layer
        dropout = self.lora_dropout[ADAPTER]
        if self.disable_adapters or self.merged or self.lora_variant or not isinstance(dropout, nn.Identity):
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        product: torch.Tensor = _LoraProduct.apply(x, base.weight, base.bias, a, b, self.scaling[ADAPTER])  # type: ignore[no-untyped-call]
        return product


def attach_lora(
    model: Any, asked: Hyperparameters, base_name: str, task_type: TaskType = TaskType.CAUSAL_LM
) -> PeftModel:
    """Freeze a model and give it an adapter, whose first weights are drawn from torch's generator.

    The adapter is float32 on a bfloat16 base: steps of AdamW are smaller than what bfloat16 can tell apart. Raises
    ValueError when no module has a name that was asked for.
    """
    targets = list(asked.lora_targets)
    alpha: Any = int(asked.lora_alpha) if asked.lora_alpha.is_integer() else asked.lora_alpha
    config = LoraConfig(
        r=asked.lora_rank,
        lora_alpha=alpha,
        lora_dropout=asked.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type=task_type,
        # GPT-2's kind of linear layer holds its weight the other way round.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    config._register_custom_module({nn.Linear: LoraLinear})  # noqa: SLF001  # peft's documented way
    attached: PeftModel = get_peft_model(model, config, adapter_name=ADAPTER)
    # peft has put in the path from which the base was loaded, which says nothing elsewhere.
    config.base_model_name_or_path = base_name
    return attached
