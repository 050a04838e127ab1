"""What a producer asks for with `POST /v1/training/jobs`: one model, several tasks."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from shared.domain.balancing import (
    GRADIENT_METHODS,
    LOSS_METHODS,
    TORCHJD_METHODS,
    TORCHJD_PREFIX,
    is_on_gradients,
)
from shared.domain.fine_tuning import MAX_SEED, USUAL_EPOCHS, Parallelism
from shared.domain.prepared_tasks import Mode, Sharing, Strategy, TaskKind, vector_shape
from shared.domain.submission import Metadata, Scheduled

MAX_TASKS = 64
DEFAULT_LAST_LAYERS = 2
LEARNING_RATE = {"lora": 2e-4, "full": 2e-5, "last_layers": 2e-5}
VECTOR_LEARNING_RATE = 1e-3
FieldName = Annotated[str, Field(min_length=1, max_length=100)]
VECTOR_KINDS: tuple[TaskKind, ...] = ("classification", "multilabel", "regression")
"""What can be learnt from a vector, which has no tokens."""


class TaskCreate(BaseModel):
    """One task. `text_field` names a string; for token classification a list of words; for a `vector` base numbers.

    `label_field`: a string or number (classification), a list of them (multilabel), a number (regression), a label for
    each word (token classification), the target text (seq2seq); for a causal LM the text that is learnt after
    `text_field` as its prompt, by default all of `text_field`. `weight`: of its loss; with the sampling strategy
    `weights`, how often it is drawn instead. `loss`: a regression's.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    kind: TaskKind
    training_file: str
    validation_file: str | None = None
    text_field: FieldName = "text"
    label_field: FieldName | None = None
    weight: float = Field(1.0, gt=0, le=1e6)
    standardize: bool | None = None
    loss: Literal["mse", "huber"] | None = None

    @model_validator(mode="after")
    def _has_what_its_kind_takes(self) -> Self:
        if self.label_field is None and self.kind != "causal_lm":
            raise ValueError(f"label_field: a task of kind {self.kind} needs one")
        if self.label_field == self.text_field:
            raise ValueError("label_field: is the same as text_field")
        for name in ("standardize", "loss"):
            if getattr(self, name) is not None and self.kind != "regression":
                raise ValueError(f"{name}: is for tasks of kind regression")
        return self

    @property
    def is_standardized(self) -> bool:
        return self.standardize is not False


class Sampling(BaseModel):
    """How the rows of a step are drawn. `cap`: rows of a source that count, for `proportional` and `temperature`.

    `rehearsal`: in sequential mode, the share of rows from tasks of earlier phases. `batches`: a step's rows from all
    sources, or from one.
    """

    model_config = ConfigDict(extra="forbid")

    strategy: Strategy = "uniform"
    temperature: float | None = Field(None, ge=1, le=100)
    cap: int | None = Field(None, ge=1)
    rehearsal: float | None = Field(None, ge=0, lt=1)
    batches: Literal["mixed", "homogeneous"] = "mixed"

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if (self.temperature is not None) != (self.strategy == "temperature"):
            raise ValueError("temperature: goes with the strategy 'temperature', and with no other")
        if self.cap is not None and self.strategy not in ("proportional", "temperature"):
            raise ValueError("cap: is for the strategies 'proportional' and 'temperature'")
        return self


class TaskHyperparameters(BaseModel):
    """Names are those of fine-tuning; `learning_rate` None: 2e-4 for LoRA, 1e-3 for vectors, else 2e-5."""

    model_config = ConfigDict(extra="forbid")

    n_epochs: int | None = Field(None, ge=1, le=1000)
    max_steps: int | None = Field(None, ge=1, le=10_000_000)
    batch_size: int = Field(16, ge=1, le=4096)
    learning_rate: float | None = Field(None, gt=0, le=10)
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int | None = Field(None, ge=2)
    truncate: bool = False
    eval_steps: int | None = Field(None, ge=1)
    lora_rank: int = Field(16, ge=1, le=256)
    lora_alpha: float | None = Field(None, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    n_layers: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if self.n_epochs is not None and self.max_steps is not None:
            raise ValueError("max_steps: stands beside n_epochs; give one of them")
        return self


class TrainingCreate(Scheduled):
    """`POST /v1/training/jobs`. A misspelt field would train something else: it is refused.

    `dry_run`: only check and prepare the data, and say what the training would take.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=200)
    sharing: Sharing = "full"
    mode: Mode = "parallel"
    tasks: Annotated[list[TaskCreate], Field(min_length=1, max_length=MAX_TASKS)]
    sampling: Sampling = Sampling()
    balancing: str = "sum"
    hyperparameters: TaskHyperparameters = TaskHyperparameters()
    parallelism: Parallelism = Parallelism()
    early_stop_patience: int | None = Field(None, ge=1, le=1000)
    compare_single_task: bool = False
    dry_run: bool = False
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    suffix: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    metadata: Metadata | None = None

    @field_validator("model")
    @classmethod
    def _is_a_base(cls, value: str) -> str:
        vector_shape(value)
        return value

    @field_validator("tasks")
    @classmethod
    def _have_names_of_their_own(cls, tasks: list[TaskCreate]) -> list[TaskCreate]:
        seen: set[str] = set()
        for number, task in enumerate(tasks):
            if task.name in seen:
                raise ValueError(f"tasks[{number}].name: {task.name!r} is another task's name already")
            seen.add(task.name)
        return tasks

    @field_validator("balancing")
    @classmethod
    def _is_known(cls, value: str) -> str:
        named = value.removeprefix(TORCHJD_PREFIX)
        if value in (*LOSS_METHODS, *GRADIENT_METHODS) or (named != value and named in TORCHJD_METHODS):
            return value
        known = ", ".join((*LOSS_METHODS, *GRADIENT_METHODS))
        raise ValueError(f"must be one of {known}, or {TORCHJD_PREFIX} with one of {', '.join(TORCHJD_METHODS)}")

    @field_validator("parallelism")
    @classmethod
    def _works_with_what_is_trained(cls, value: Parallelism, known: ValidationInfo) -> Parallelism:
        model, sharing, balancing = (known.data.get(name, "") for name in ("model", "sharing", "balancing"))
        if value.sharding == "none":
            return value
        name = value.sharding
        if vector_shape(model) is not None:
            raise ValueError(f"{name}: the base {model!r} is too small to be divided; divide rows by 'data'")
        if name == "tensor" and sharing == "lora":
            # As in fine-tuning: peft gives its matrices the whole layer's shape, transformers' plan the share's.
            raise ValueError("tensor: is for the sharing 'full' or 'last_layers'; with LoRA, use 'data' and 'fsdp'")
        if sharing != "lora" and is_on_gradients(balancing):
            raise ValueError(
                f"{name}: {balancing!r} needs whole gradients, and those of divided weights are not; "
                "with the sharing 'lora', 'fsdp' leaves the adapter's whole"
            )
        return value

    @field_validator("compare_single_task")
    @classmethod
    def _has_something_to_compare(cls, value: bool, known: ValidationInfo) -> bool:
        tasks = known.data.get("tasks") or []
        if value and len(tasks) < 2:
            raise ValueError("compares several tasks with each alone; there is one")
        without = next((task.name for task in tasks if task.validation_file is None), None)
        if value and without is not None:
            raise ValueError(f"needs a validation_file of every task; {without!r} has none")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for fault in self._faults():
            raise ValueError(fault)
        return self

    def _faults(self) -> Iterator[str]:
        asked, sampling = self.hyperparameters, self.sampling
        if asked.n_layers is not None and self.sharing != "last_layers":
            yield "hyperparameters.n_layers: is for the sharing 'last_layers'"
        if sampling.rehearsal is not None and self.mode != "sequential":
            yield "sampling.rehearsal: is for the mode 'sequential'"
        if self.mode == "sequential" and sampling.strategy != "uniform":
            yield "sampling.strategy: phases are trained one after another; the mode 'sequential' takes no strategy"
        if sampling.strategy == "weights":
            for group in self.sources():
                names = ", ".join(repr(self.tasks[number].name) for number in group)
                if len({self.tasks[number].weight for number in group}) > 1:
                    yield f"tasks[{group[1]}].weight: {names} share rows, which are drawn for all of them alike"
        if self.early_stop_patience is not None:
            without = [task.name for task in self.tasks if task.validation_file is None]
            if without:
                yield f"early_stop_patience: needs a validation_file of every task; {without[0]!r} has none"
        yield from self._language_faults()
        yield from self._base_faults()
        yield from self._file_faults()

    def _language_faults(self) -> Iterator[str]:
        """A base has one language model: two tasks on it would answer alike."""
        language = [number for number, task in enumerate(self.tasks) if task.kind in ("causal_lm", "seq2seq")]
        if len(language) > 1:
            yield f"tasks[{language[1]}].kind: a base has one language model, which {self.tasks[language[0]].name!r} is"

    def _base_faults(self) -> Iterator[str]:
        if vector_shape(self.model) is None:
            return
        for number, task in enumerate(self.tasks):
            if task.kind not in VECTOR_KINDS:
                yield f"tasks[{number}].kind: {task.kind} needs a base that reads text; {self.model!r} reads vectors"
        if self.sharing != "full":
            yield f"sharing: the base {self.model!r} is trained in full; 'full' it must be"
        if self.hyperparameters.max_length is not None or self.hyperparameters.truncate:
            yield f"hyperparameters.max_length: the base {self.model!r} reads vectors, which have no length"

    def _file_faults(self) -> Iterator[str]:
        """Tasks that share their training rows must share those of validation, or there would be two kinds of both."""
        for group in self.sources():
            files = {self.tasks[number].validation_file for number in group}
            if len(files) > 1:
                names = ", ".join(repr(self.tasks[number].name) for number in group)
                yield f"tasks[{group[1]}].validation_file: {names} share rows, so they need the same validation file"

    def _has_prompt(self, number: int) -> bool:
        task = self.tasks[number]
        return task.kind == "causal_lm" and task.label_field is not None

    @property
    def n_epochs(self) -> int:
        return self.hyperparameters.n_epochs or USUAL_EPOCHS

    @property
    def learning_rate(self) -> float:
        usual = LEARNING_RATE[self.sharing] if vector_shape(self.model) is None else VECTOR_LEARNING_RATE
        return self.hyperparameters.learning_rate or usual

    def sources(self) -> list[tuple[int, ...]]:
        """Return the tasks, by number, that share rows: those of one file and field. In sequential mode none do."""
        groups: dict[Any, list[int]] = {}
        for number, task in enumerate(self.tasks):
            is_own = self.mode == "sequential" or self._has_prompt(number)
            key = number if is_own else (task.training_file, task.text_field, task.kind == "token_classification")
            groups.setdefault(key, []).append(number)
        return [tuple(group) for group in groups.values()]
