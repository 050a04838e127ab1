"""Prepares the data of training jobs that wait for it, and queues or refuses them; joins the files of batches."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from services.preprocessor.estimates import Estimate, estimate, estimate_tasks
from services.preprocessor.joining import join
from services.preprocessor.preparation import Options, Prepared, prepare
from services.preprocessor.shards import Shards
from services.preprocessor.task_outcome import body_of, tasks_outcome
from services.preprocessor.task_rows import PreparedSource, Reading, Source, prepare_source
from services.preprocessor.tokenization import TokenizerFiles
from shared.db import files, jobs, model_registry, multi_task, training
from shared.db.session import alone, tenant_transaction
from shared.db.training import MOST_PREPARATIONS, UnpreparedJob
from shared.domain.errors import ModelRefused, NotFound, SpecificationRefused
from shared.domain.fine_tuning import Hyperparameters, parallelism_of
from shared.domain.job import JobKind, parse_file_id, public_file_id
from shared.domain.multi_task import TrainingCreate
from shared.domain.prepared_tasks import vector_shape
from shared.domain.training_file import TrainingFileRefused
from shared.logging import ids_of
from shared.settings import Settings
from shared.store import NEVER_BETTER, Store, prepared_path

log = logging.getLogger(__name__)

_GIVEN_UP = "The data could not be prepared: each time it was tried, the preprocessor failed."
_GONE = "The file's content is gone."


class Preparations:
    """Safe to run twice and anywhere: a session's lock lets one preprocessor work on a job, and ends with it."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings, self._store = engine, settings, Store(settings.store_url)

    def prepare(self, tenant_id: str, job_id: UUID) -> bool:
        """Prepare a job if it still waits for it and nobody else is at it; return whether it was queued.

        Raises OperationalError and OSError for what may pass: the job goes on waiting.
        """
        with alone(self._engine, training.lock_name(job_id)) as session:
            if session is None:
                return False
            with tenant_transaction(self._engine, tenant_id) as connection:
                job = training.begin_preparation(connection, job_id)
            if job is None:
                return False
            try:
                return self._prepare(job)
            except (OSError, OperationalError):
                with tenant_transaction(self._engine, tenant_id) as connection:
                    training.call_off_preparation(connection, job)
                raise

    def _prepare(self, job: UnpreparedJob) -> bool:
        if job.preparations >= MOST_PREPARATIONS:
            return self._refuse(job, {"code": "server_error", "message": _GIVEN_UP, "param": None})
        if job.kind == JobKind.BATCH:
            return self._join(job)
        prepare = self._prepare_tasks if job.kind == JobKind.TRAINING else self._prepare_examples
        try:
            return prepare(job)
        except TrainingFileRefused as error:
            return self._refuse(job, error.job_error(), [line.as_dict() for line in error.errors])
        except SpecificationRefused as error:
            return self._refuse(job, {"code": "invalid_value", "message": error.message, "param": error.param})
        except ModelRefused as error:
            return self._refuse(job, {"code": "model_refused", "message": error.message, "param": "model"})
        except NotFound as error:
            return self._refuse(job, {"code": "model_not_found", "message": error.message, "param": "model"})
        except FileNotFoundError:
            return self._refuse(job, {"code": "file_not_found", "message": _GONE, "param": "training_file"})

    def _join(self, job: UnpreparedJob) -> bool:
        """Give a batch the input that is made of its files; the scheduler plans it then, or says what is wrong."""
        found = [(public_file_id(UUID(each)), job.paths.get(each)) for each in job.spec["input_files"]]
        gone = {"code": "file_not_found", "message": _GONE, "param": "input_file_ids"}
        if any(path is None for _, path in found):
            return self._refuse(job, gone)
        try:
            columns = join(self._store, job.tenant_id, [(public_id, path or "") for public_id, path in found])
        except FileNotFoundError:
            return self._refuse(job, gone)
        except NEVER_BETTER as error:
            message = f"The store does not let a file be read: {error.strerror or type(error).__name__}."
            return self._refuse(job, {"code": "input_unreadable", "message": message, "param": "input_file_ids"})
        with tenant_transaction(self._engine, job.tenant_id) as connection:
            files.add(connection, **columns)
            is_wanted = jobs.set_input(connection, job.job_id, columns["file_id"], columns["lines"])
            if not is_wanted:  # it was cancelled meanwhile; the content goes with the row's
                files.delete(connection, columns["file_id"])
        return is_wanted

    def _prepare_examples(self, job: UnpreparedJob) -> bool:
        """Prepare a fine-tuning job. Raises what `_prepare` tells the job of."""
        base = self._base(job)
        asked = Hyperparameters.model_validate(job.spec["hyperparameters"])
        together = parallelism_of(job.spec)
        made = self._make(job, Path(base.source), asked)
        plan = estimate(made.training.manifest, asked, Path(base.source), base.dtype, together)
        with tenant_transaction(self._engine, job.tenant_id) as connection:
            outcome = _outcome(asked, plan, made, self._relative)
            return training.prepared(
                connection,
                job,
                base=base.name,
                steps=plan.steps,
                tokens=plan.tokens,
                outcome=outcome,
                devices=together.devices,
            )

    def _prepare_tasks(self, job: UnpreparedJob) -> bool:
        """Prepare a multi-task job, or only say what it would take. Raises what `_prepare` tells the job of."""
        body = body_of(job)
        is_text = vector_shape(job.model) is None
        base = self._base(job) if is_text else None
        directory = Path(base.source) if base is not None else None
        reading = _reading(body, directory)
        made = self._make_rows(job, body, reading)
        rows = [source.training_manifest for source in made]
        dtype = base.dtype if base is not None else "float32"
        plan = estimate_tasks(body, rows, directory, dtype, body.n_epochs)
        with tenant_transaction(self._engine, job.tenant_id) as connection:
            speed = training.tokens_per_second(connection, job.kind, job.model)
            outcome = tasks_outcome(body, plan, made, self._relative, reading.max_length, speed)
            if body.dry_run:
                training.planned(connection, job, outcome)
                return False
            is_queued = training.prepared(
                connection,
                job,
                base=base.name if base is not None else job.model,
                steps=plan.steps,
                tokens=plan.tokens,
                outcome=outcome,
                devices=body.parallelism.devices,
            )
            if is_queued and body.compare_single_task:  # one that was cancelled meanwhile is compared with nothing
                training.note_outcome(
                    connection, job.job_id, {"single_jobs": multi_task.add_single_jobs(connection, job)}
                )
            return is_queued

    def _make_rows(self, job: UnpreparedJob, body: TrainingCreate, reading: Reading) -> list[PreparedSource]:
        out = self._directory() / prepared_path(job.tenant_id)
        made = []
        for group in body.sources():
            tasks = tuple(body.tasks[number] for number in group)
            with ExitStack() as stack:
                names = (tasks[0].training_file, tasks[0].validation_file)
                opened = [stack.enter_context(self._open(job, name)) if name else None for name in names]
                assert opened[0] is not None
                made.append(prepare_source(Source(group, tasks, opened[0], opened[1]), reading, out))
        return made

    def _open(self, job: UnpreparedJob, public_id: str) -> BinaryIO:
        path = job.paths.get(str(parse_file_id(public_id)))
        if path is None:
            raise FileNotFoundError
        return (self._directory() / path).open("rb", buffering=1 << 20)

    def _base(self, job: UnpreparedJob) -> model_registry.ModelView:
        """Return the model whose weights are trained on: of an adapter, its base. Raises NotFound."""
        with tenant_transaction(self._engine, job.tenant_id) as connection:
            model = model_registry.find(connection, job.tenant_id, job.model)
            return model if model.base is None else model_registry.find(connection, job.tenant_id, model.base)

    def _make(self, job: UnpreparedJob, model: Path, asked: Hyperparameters) -> Prepared:
        out = self._directory() / prepared_path(job.tenant_id)
        with ExitStack() as stack:
            files = [
                stack.enter_context((self._directory() / path).open("rb")) if path is not None else None
                for path in (job.training_path, job.validation_path)
            ]
            if files[0] is None or (job.spec.get("validation_file_id") and files[1] is None):
                raise FileNotFoundError
            return prepare(files[0], files[1], model, out, Options(asked.max_length, truncate=asked.truncate))

    def _directory(self) -> Path:
        """Return the store as a directory: trainers map prepared data into memory."""
        directory = self._settings.store_directory
        if directory is None:
            raise ModelRefused("Training needs a store that is a directory; this one's is elsewhere.")
        return directory

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self._directory()))

    def _refuse(self, job: UnpreparedJob, error: dict[str, Any], lines: list[dict[str, Any]] | None = None) -> bool:
        with tenant_transaction(self._engine, job.tenant_id) as connection:
            training.reject(connection, job, error, lines or [])
        log.info("training job refused", extra=ids_of(job) | {"code": error["code"]})
        return False


def _reading(body: TrainingCreate, base: Path | None) -> Reading:
    """Return how rows are read for a base in directory `base`, None for vectors. Raises ModelRefused."""
    asked, shape = body.hyperparameters, vector_shape(body.model)
    if shape is not None or base is None:
        return Reading(shape[0] if shape else 0, None, 1, truncate=False)
    files = TokenizerFiles.read(base)
    length = min(asked.max_length or files.row_tokens, files.row_tokens)
    return Reading(0, files, length, asked.truncate)


def _outcome(asked: Hyperparameters, plan: Estimate, made: Prepared, relative: Callable[[Path], str]) -> dict[str, Any]:
    """Return what a job's row keeps of its preparation: hyperparameters as they are used, data, what it will take."""
    chosen = {
        "n_epochs": plan.chosen.n_epochs,
        "batch_size": plan.chosen.batch_size,
        "learning_rate_multiplier": plan.chosen.learning_rate_multiplier,
    }

    def data(shards: Shards | None) -> dict[str, Any] | None:
        if shards is None:
            return None
        manifest = shards.manifest
        counts = {"examples": manifest.examples, "tokens": manifest.tokens, "trained_tokens": manifest.trained_tokens}
        return {"path": relative(shards.path), **counts}

    return {
        "hyperparameters": asked.model_dump() | chosen,
        "training": data(made.training),
        "validation": data(made.validation),
        "estimate": {
            "steps": plan.steps,
            "tokens": plan.tokens,
            "memory_bytes": plan.memory.total_bytes,
            "fixed_bytes": plan.memory.fixed_bytes,
        },
    }
