"""Any other causal model of transformers: its own modules, with our attention and our matrix products in them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from services.worker.engine.adapters import Adapter, read_adapter
from services.worker.engine.decoder import numbered
from services.worker.engine.kernels.kernels import HeadShape, Kernels, LayerPool, Layout
from services.worker.engine.kernels.transfer import to_device
from services.worker.engine.linear import FEWEST_ROWS, Linear, Part
from services.worker.engine.stable import SameInAnyCompany
from shared.domain.errors import ModelRefused

KernelPicker = Callable[[Sequence[HeadShape], torch.Tensor], Kernels]

ATTENTION = "lamplighter"
EXPERTS_DIMENSIONS = 3
"""Of a parameter that holds the weights of several experts."""


@dataclass
class _Pass:
    """One pass through the modules: attention finds here which step it belongs to; without a pool it only looks."""

    kernels: Kernels | None
    layout: Layout | None
    pools: dict[int, LayerPool]
    shapes: dict[int, HeadShape]
    rows: dict[Linear, set[int]] = field(default_factory=dict)
    """How many rows each product was given, in a pass that only looks."""


_current: ContextVar[_Pass] = ContextVar("step")


@contextmanager
def _as_current(step: _Pass) -> Iterator[None]:
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # who sees whom is what the layout says
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,  # should one of them matter, the comparison when the model is loaded shows it
) -> tuple[torch.Tensor, None]:
    """What transformers calls: query [1, H, T, D], key and value [1, K, T, D]; returns [1, T, H, D]."""
    if key.shape != value.shape or not getattr(module, "is_causal", True):
        raise ModelRefused("Its attention has a form that this engine does not know.")
    step = _current.get()
    heads, tokens, size = query.shape[1:]
    scale = scaling if scaling is not None else size**-0.5
    shape = HeadShape(
        heads, key.shape[1], size, scale=scale, window=int(sliding_window or 0), softcap=float(softcap or 0)
    )
    if step.layout is None or step.kernels is None:
        step.shapes[module.layer_idx] = shape
        return torch.zeros_like(query).transpose(1, 2), None
    # Rows beyond the layout's are there for the products' sake only.
    real = step.layout.tokens
    joined = torch.cat([query, key, value], dim=1)[0].transpose(0, 1)[:real].reshape(real, -1)
    pool = step.pools[module.layer_idx]
    queries = step.kernels.prepare_heads(joined, shape, None, None, pool, step.layout)
    out = query.new_zeros(1, tokens, heads, size)
    out[0, :real] = step.kernels.attend(queries, shape, pool, step.layout).view(real, heads, size)
    return out, None


AttentionInterface.register(ATTENTION, _attention)


class _PackedLinear(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear, name: str) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        self.product = Linear(linear.weight.detach(), bias, [Part(name, 0, linear.out_features)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = self.product(rows)
        step, number = _current.get(), self.product.number
        if step.layout is None or step.kernels is None:
            step.rows.setdefault(self.product, set()).add(len(rows))
        elif (adapters := step.layout.adapters) is not None and number in adapters.products:
            step.kernels.add_adapters(out, rows.contiguous(), number, adapters)
        return out.view(*x.shape[:-1], self.product.out_features)


class TransformersDecoder:
    """`Decoder` over a transformers model; raises ModelRefused when its attention cannot be replaced by ours."""

    def __init__(self, model: Any, pick_kernels: KernelPicker, blocks: int) -> None:
        self._weight_bytes: int = sum(p.numel() * p.element_size() for p in model.parameters())
        packed = _pack_products(model)
        model.set_attn_implementation(ATTENTION)
        config = model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self._model = model
        # One expert after another, each with its own rows: grouped products sum in an order that all rows decide.
        if any(parameter.dim() == EXPERTS_DIMENSIONS for parameter in model.parameters()):
            model.set_experts_implementation("eager")
        looked = self._look(int(config.num_hidden_layers))
        self._shapes = looked.shapes
        self._kernels = pick_kernels(list(self._shapes.values()), model.get_input_embeddings().weight)
        self._pools = {
            number: self._kernels.new_pool(blocks, shape, model.dtype, model.device)
            for number, shape in self._shapes.items()
        }
        # Only what sees every row of a step can be adapted: neither the head nor one expert of several.
        self._products = numbered(
            [
                module.product
                for name, module in packed.items()
                if looked.rows.get(module.product) == {FEWEST_ROWS}
                and module is not model.get_output_embeddings()
                and ".experts." not in name
            ]
        )

    def _look(self, layers: int) -> _Pass:
        """Return every layer's attention, and what each product is given, as a pass over a few tokens shows it."""
        step = _Pass(None, None, {}, {})
        ids = torch.zeros(1, FEWEST_ROWS, dtype=torch.long, device=self._model.device)
        try:
            with _as_current(step), torch.inference_mode():
                self._model(input_ids=ids)
        except Exception as error:
            raise ModelRefused(f"Its modules cannot be given another attention: {error}") from error
        if set(step.shapes) != set(range(layers)):
            raise ModelRefused("Some of its layers remember a sequence by other means than attention.")
        return step

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    @property
    def pool_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pool in self._pools.values() for t in (pool.keys, pool.values))

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, layout: Layout, rows: list[int]) -> torch.Tensor:
        # To a multiple, and not only up to the fewest: torch computes what is left over of an array after its last
        # whole vectors by other instructions, whose last bits differ, and that would be in the last token's row.
        padding = -len(tokens) % FEWEST_ROWS
        ids = functional.pad(tokens, (0, padding))[None]
        positions = to_device([layout.positions.tolist() + [0] * padding], self.device)
        with _as_current(_Pass(self._kernels, layout, self._pools, self._shapes)), SameInAnyCompany():
            out = self._model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                # In the middle of a long prompt no token is drawn; the head is then given one row for nothing.
                logits_to_keep=to_device(rows or [0], self.device),
            )
        logits: torch.Tensor = out.logits[0][: len(rows)]
        return logits.float()

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    def read_adapter(self, directory: Path) -> Adapter:
        return read_adapter(directory, self._products, self._kernels, self._model.get_input_embeddings().weight)

    def free_memory(self) -> None:
        """Do nothing: there is nothing but weights and the pool."""


def _pack_products(model: Any) -> dict[str, _PackedLinear]:
    """Put our products in the place of the model's; return them by name."""
    packed = {}
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                full_name = f"{path}.{name}" if path else name
                packed[full_name] = _PackedLinear(child, full_name)
                setattr(module, name, packed[full_name])
    return packed
