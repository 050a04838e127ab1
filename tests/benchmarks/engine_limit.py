"""The GEMM limit: how fast a workload's matrix products alone would run, at this machine's own rate for them."""

import time
from dataclasses import dataclass

from tests.benchmarks.engine_workloads import Job, make_config

ROWS = 512
"""Rows of the products by which the rate is measured: those of a full step, more than which brings no more."""
TRIALS, PRODUCTS = 5, 20


@dataclass(frozen=True)
class Products:
    """A model's matrices: numbers in all layers', in the head's, and the shape of the largest of a layer's, joined
    with its twin where a layer has two that read the same input.
    """

    layers: int
    head: int
    largest: tuple[int, int]


def products_of(name: str, *, is_quick: bool) -> Products:
    """Count a shape's matrices, on a model without memory."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = make_config(name, is_quick=is_quick)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    shapes = []
    for module in model.modules():
        if isinstance(module, Conv1D):
            shapes.append((module.weight.shape[1], module.weight.shape[0]))
        elif isinstance(module, torch.nn.Linear) and module is not head:
            shapes.append((module.out_features, module.in_features))
    out, width = max(shapes, key=lambda shape: shape[0] * shape[1])
    twins = 1 if config.model_type == "gpt2" else 2
    return Products(sum(a * b for a, b in shapes), head.weight.numel(), (twins * out, width))


def product_rate(shape: tuple[int, int], dtype: str, threads: int) -> float:
    """Return operations a second of packed products with a matrix [out, in], the best of a few trials."""
    import torch

    from services.worker.engine.linear import Linear

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    linear, x = Linear(torch.randn(shape).to(kind)), torch.randn(ROWS, shape[1]).to(kind)

    def trial() -> float:
        started = time.perf_counter()
        for _ in range(PRODUCTS):
            linear(x)
        return PRODUCTS * 2 * ROWS * shape[0] * shape[1] / (time.perf_counter() - started)

    with torch.inference_mode():
        trial()
        return max(trial() for _ in range(TRIALS))


def gemm_limit(products: Products, jobs: list[Job], operations_a_second: float) -> float:
    """Return generated tokens a second, were there nothing but the products of the tokens that must be computed."""
    drawn = sum(job.max_tokens for job in jobs)
    rows = sum(len(job.prompt) + job.max_tokens - 1 for job in jobs)
    return drawn / (2 * (rows * products.layers + drawn * products.head) / operations_a_second)
