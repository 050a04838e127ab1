"""What a training job will take, said before a GPU is touched: steps, tokens, memory and time.

Steps and tokens are exact. Memory follows from the shapes in the model's files and from what the trainer keeps; time
from a speed that somebody measured.
"""

import math
import re
import struct
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from shared.domain.balancing import is_on_gradients
from shared.domain.errors import ModelRefused, SpecificationRefused
from shared.domain.fine_tuning import USUAL_EPOCHS, Hyperparameters, Parallelism
from shared.domain.multi_task import DEFAULT_LAST_LAYERS, TrainingCreate
from shared.domain.prepared_data import Manifest
from shared.domain.prepared_tasks import RowsManifest, vector_shape

# OpenAI's rules, as its cookbook gives them: three epochs, more for few examples, fewer for very many.
MOST_EPOCHS = 25
LEAST_EXAMPLES_SEEN, MOST_EXAMPLES_SEEN = 100, 25_000
BATCH_SHARE, MOST_IN_BATCH = 0.002, 256
AUTO_MULTIPLIER = 1.0

MICRO_BATCH_TOKENS = 4096
"""What the trainer computes at a time, as long as memory allows."""

_FLOAT32_BYTES = 4
_ADAM_BYTES = 8
"""Two moments of a trained weight, in float32."""
_IN_A_LAYER = re.compile(r"(^|\.)\d+\.")
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Chosen:
    """Hyperparameters with every `auto` decided."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


@dataclass(frozen=True)
class Memory:
    """Bytes on the device. `optimizer` is all that training adds to the weights: adapter, gradients, moments.

    `activations` are what the backward pass needs of one micro-batch, logits among them.
    """

    weights_bytes: int
    optimizer_bytes: int
    activations_bytes: int

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on how much is computed at a time."""
        return self.weights_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.activations_bytes


@dataclass(frozen=True)
class Estimate:
    """`tokens` are those of all epochs, as `trained_tokens` of a job counts them; `seconds` None: no speed is known."""

    chosen: Chosen
    steps: int
    tokens_per_epoch: int
    tokens: int
    memory: Memory
    seconds: float | None


def choose(asked: Hyperparameters, examples: int) -> Chosen:
    """Decide what was left to us for a training file of so many examples."""
    epochs = USUAL_EPOCHS
    if examples * USUAL_EPOCHS < LEAST_EXAMPLES_SEEN:
        epochs = min(MOST_EPOCHS, LEAST_EXAMPLES_SEEN // examples)
    elif examples * USUAL_EPOCHS > MOST_EXAMPLES_SEEN:
        epochs = max(1, MOST_EXAMPLES_SEEN // examples)
    batch_size = min(MOST_IN_BATCH, max(1, round(examples * BATCH_SHARE)))
    multiplier = asked.learning_rate_multiplier
    return Chosen(
        n_epochs=asked.n_epochs if isinstance(asked.n_epochs, int) else epochs,
        batch_size=asked.batch_size if isinstance(asked.batch_size, int) else batch_size,
        learning_rate_multiplier=AUTO_MULTIPLIER if isinstance(multiplier, str) else multiplier,
    )


def estimate(
    manifest: Manifest,
    asked: Hyperparameters,
    model: Path,
    dtype: str,
    together: Parallelism | None = None,
    *,
    gradient_checkpointing: bool = False,
    tokens_per_second: float | None = None,
) -> Estimate:
    """Return what training the model in directory `model` on a prepared file will take. Raises ModelRefused.

    dtype: The number type in which the model is served, and its products are computed.
    together: Among how many devices it is divided; memory is each one's.
    """
    together = together or Parallelism()
    chosen = choose(asked, manifest.examples)
    at_a_time = max(manifest.longest, min(MICRO_BATCH_TOKENS, chosen.batch_size * manifest.longest))
    shapes = _weight_shapes(model)
    width = 2 if dtype in ("bfloat16", "float16") else _FLOAT32_BYTES
    elements = sum(map(math.prod, shapes.values()))
    # Weights that are trained are held in float32, whatever the number type of the products.
    held = _held_elements(shapes, together)
    trained = math.ceil(elements / _shares(together)) if asked.full else _adapter_elements(shapes, asked.lora_rank)
    memory = Memory(
        weights_bytes=held * (_FLOAT32_BYTES if asked.full else width),
        optimizer_bytes=trained * (_FLOAT32_BYTES + _ADAM_BYTES + (0 if asked.full else _FLOAT32_BYTES)),
        activations_bytes=_activation_bytes(_config(model), manifest, at_a_time, width, gradient_checkpointing),
    )
    tokens = manifest.tokens * chosen.n_epochs
    return Estimate(
        chosen=chosen,
        steps=chosen.n_epochs * math.ceil(manifest.examples / chosen.batch_size),
        tokens_per_epoch=manifest.tokens,
        tokens=tokens,
        memory=memory,
        seconds=tokens / tokens_per_second if tokens_per_second else None,
    )


@dataclass(frozen=True)
class TaskEstimate:
    """What a multi-task job will take; `steps` at most, as tasks may stop early."""

    steps: int
    tokens: int
    memory: Memory


def estimate_tasks(
    body: TrainingCreate, rows: list[RowsManifest], model: Path | None, dtype: str, n_epochs: int
) -> TaskEstimate:
    """Return what training a multi-task model on prepared rows will take; memory is each device's. Raises ModelRefused,
    SpecificationRefused.

    model: The base's directory; None for the built-in backbone. dtype: As for `estimate`.
    """
    asked = body.hyperparameters
    all_rows, all_tokens = sum(each.rows for each in rows), sum(each.tokens for each in rows)
    longest = max(each.longest + each.longest_target for each in rows)
    steps = asked.max_steps or n_epochs * math.ceil(all_rows / asked.batch_size)
    _require_steps_for_phases(body, rows, steps)
    at_a_time = max(longest, min(MICRO_BATCH_TOKENS, asked.batch_size * longest))
    if model is None:
        inputs, hidden = vector_shape(body.model) or (0, 0)
        elements = trained = hidden * (inputs + hidden + 2)
        config = {"hidden_size": hidden}
        width, activations = _FLOAT32_BYTES, at_a_time * _FLOAT32_BYTES * (inputs + 6 * hidden)
    else:
        width = 2 if dtype in ("bfloat16", "float16") else _FLOAT32_BYTES
        shapes, config = _weight_shapes(model), _config(model)
        elements = _held_elements(shapes, body.parallelism)
        trained = _trained_elements(body, shapes, config)
        activations = _activation_bytes(config, _as_examples(body, rows), at_a_time, width, False)
    heads = _head_elements(rows, config)
    # A head has its weights, their gradients and two moments; of answers, a matrix of labels by labels is counted.
    activations += heads * (2 * _FLOAT32_BYTES + _ADAM_BYTES) + _count_bytes(rows)
    is_held_wide = body.sharing != "lora"
    copies = len(body.tasks) if is_on_gradients(body.balancing) else 0
    memory = Memory(
        weights_bytes=elements * (_FLOAT32_BYTES if is_held_wide else width),
        optimizer_bytes=trained * (_ADAM_BYTES + _FLOAT32_BYTES * (1 + (not is_held_wide) + copies)),
        activations_bytes=activations,
    )
    return TaskEstimate(steps, math.ceil(steps * asked.batch_size * all_tokens / all_rows), memory)


def _require_steps_for_phases(body: TrainingCreate, rows: list[RowsManifest], steps: int) -> None:
    """Raise SpecificationRefused when a phase of sequential training would have no step."""
    if body.mode != "sequential":
        return
    ends = [
        round(steps * sum(each.rows for each in rows[: n + 1]) / sum(each.rows for each in rows))
        for n in range(len(rows))
    ]
    for number, (start, end) in enumerate(pairwise([0, *ends])):
        if end <= start:
            name = rows[number].tasks[0].name
            message = f"With {steps} steps in all, the phase of task {name!r} would have none."
            raise SpecificationRefused(message, "hyperparameters.max_steps")


def _head_elements(rows: list[RowsManifest], config: dict[str, Any]) -> int:
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0
    outputs = sum(len(task.labels) or (task.kind == "regression") for each in rows for task in each.tasks)
    return outputs * (hidden + 1)


def _count_bytes(rows: list[RowsManifest]) -> int:
    """Return what the answers of an evaluation are counted in: of a pass, of some passes, and of all."""
    labels = [len(task.labels) for each in rows for task in each.tasks if task.kind != "multilabel"]
    return 3 * 8 * sum(count * count for count in labels)


def _trained_elements(body: TrainingCreate, shapes: dict[str, list[int]], config: dict[str, Any]) -> int:
    """Return how many of the trunk's weights a device trains."""
    asked, shares = body.hyperparameters, _shares(body.parallelism)
    if body.sharing == "lora":
        return _adapter_elements(shapes, asked.lora_rank)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if body.sharing == "full":
        return math.ceil(sum(sizes.values()) / shares)
    layers = config.get("num_hidden_layers") or config.get("n_layer") or config.get("num_layers") or 1
    if (asked.n_layers or 0) > layers:
        message = f"The base has {layers} layers, and the last {asked.n_layers} were to be trained."
        raise SpecificationRefused(message, "hyperparameters.n_layers")
    in_layers = sum(size for name, size in sizes.items() if _IN_A_LAYER.search(name))
    return math.ceil(in_layers * min(1.0, (asked.n_layers or DEFAULT_LAST_LAYERS) / layers) / shares)


def _as_examples(body: TrainingCreate, rows: list[RowsManifest]) -> Manifest:
    """Return rows as if they were examples: a language model has logits for every token, a decoder for its targets."""
    tokens = sum(each.tokens + each.target_tokens for each in rows)
    is_language_model = any(task.kind == "causal_lm" for task in body.tasks)
    return Manifest(
        examples=sum(each.rows for each in rows),
        tokens=tokens,
        trained_tokens=tokens if is_language_model else sum(each.target_tokens for each in rows),
        longest=max(each.longest for each in rows),
        vocabulary=max(each.vocabulary for each in rows),
        pad_token=None,
        data_sha256="",
        tokenizer_sha256="",
        template_sha256="",
        max_length=0,
    )


def _shares(together: Parallelism) -> int:
    """Return among how many devices the weights are divided."""
    return together.devices if together.sharding != "none" else 1


def _held_elements(shapes: dict[str, list[int]], together: Parallelism) -> int:
    """Return how many weights a device holds at most: its share, and what FSDP has gathered meanwhile.

    That is what belongs to no layer (embeddings, head), one layer, and the next, which is gathered ahead.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    share = math.ceil(sum(sizes.values()) / _shares(together))
    if together.sharding != "fsdp":
        return share
    layers: Counter[str] = Counter()
    for name, size in sizes.items():
        found = _IN_A_LAYER.search(name)
        layers[found[0] if found else ""] += size
    gathered = layers.pop("", 0) + sum(size for _, size in layers.most_common(2))
    return share + gathered


def _adapter_elements(shapes: dict[str, list[int]], rank: int) -> int:
    """Return the weights of a LoRA adapter on all linear layers but the head: `rank` rows and columns for each."""
    matrices = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and _IN_A_LAYER.search(name)
    ]
    return rank * sum(map(sum, matrices))


def _activation_bytes(
    config: dict[str, Any], manifest: Manifest, tokens: int, width: int, gradient_checkpointing: bool
) -> int:
    """Return what the backward pass of so many tokens needs, in the manner of Korthikanti et al. 2022 (2205.05198).

    Of a layer, for each token: the input of each product, what attention was given and gave, both of the gated MLP's
    halves with their activation, and the float32 that norms compute in. Attention itself keeps no scores. With
    checkpointing, the input of each layer, and all of one layer that is computed again.
    """
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0
    layers = config.get("num_hidden_layers") or config.get("n_layer") or config.get("num_layers") or 0
    heads = config.get("num_attention_heads") or config.get("n_head") or config.get("num_heads") or 1
    inner = config.get("intermediate_size") or config.get("n_inner") or config.get("d_ff") or 4 * hidden
    head = config.get("head_dim") or hidden // heads
    attention = (2 * heads + 2 * (config.get("num_key_value_heads") or heads)) * head
    norms = 2 * hidden * (_FLOAT32_BYTES + width)
    layer = width * (2 * hidden + attention + 4 * inner) + norms
    kept = layers * width * hidden + layer if gradient_checkpointing else layers * layer
    # Logits are made for what is learned only; their float32 form and its gradient are alive at once.
    learned = manifest.trained_tokens / max(1, manifest.tokens)
    logits = learned * (config.get("vocab_size") or manifest.vocabulary) * (width + 2 * _FLOAT32_BYTES)
    return math.ceil(tokens * (kept + logits))


def _config(model: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = orjson.loads((model / "config.json").read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelRefused(f"config.json cannot be read: {error}") from None
    text_config: dict[str, Any] = config.get("text_config", config)
    return text_config


def _weight_shapes(model: Path) -> dict[str, list[int]]:
    """Return the shape of every weight, from the headers of the model's files: an eight-byte length, then JSON."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(model.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = orjson.loads(file.read(min(length, _MOST_HEADER_BYTES)))
        except (OSError, struct.error, orjson.JSONDecodeError) as error:
            raise ModelRefused(f"{path.name} cannot be read: {error}") from None
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    if not shapes:
        raise ModelRefused("There are no safetensors weights.")
    return shapes
