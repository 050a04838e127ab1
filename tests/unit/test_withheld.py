"""What must not be printed: messages' contents by Celery at any level, passwords by a refused configuration."""

import logging

import pytest
from celery.concurrency.solo import TaskPool
from pydantic import ValidationError

from shared.logging import configure_logging
from shared.settings import Settings, SetupSettings


@pytest.fixture
def quiet():
    """Puts logging back as it was."""
    root, names = logging.getLogger(), ("celery.pool", "celery.worker.strategy", "kombu.transport.redis")
    before = root.handlers[:], root.level, {name: logging.getLogger(name).level for name in names}
    yield
    root.handlers[:], _ = before[0], root.setLevel(before[1])
    for name, level in before[2].items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize("level", ["DEBUG", "debug", "ERROR"])
def test_celery_prints_no_arguments(capsys, quiet, level):
    configure_logging("preprocessor", level)
    logging.getLogger("services.preprocessor").debug("this is shown at debug")
    pool = TaskPool()
    pool._does_debug = logging.getLogger("celery.pool").isEnabledFor(logging.DEBUG)
    pool.apply_async(lambda *_: None, args=({"lamplighter_token": "lk-secret"}, "a-prompt"), callback=lambda *_: None)
    logging.getLogger("celery.worker.strategy").error("Couldn't convert ETA %r: %r", "x", {"kwargs": "a-prompt"})
    logging.getLogger("kombu.transport.redis").critical("Could not restore message: %r", {"body": "a-prompt"})
    shown = capsys.readouterr().err
    assert ("this is shown" in shown) == (level.upper() == "DEBUG") and "contents withheld" in shown
    assert "lk-secret" not in shown and "a-prompt" not in shown


def test_a_refused_configuration_repeats_no_secret():
    """pydantic adds the input to what it says, also of a whole model: strong passwords beside the weak one."""
    names = ("admin_key", "redis_password", "flower_password", "migration_password", "gateway_password")
    names += ("preprocessor_password", "worker_password", "scheduler_password")
    secrets = dict.fromkeys(names, "Pa55word-of-thirty-characters")
    with pytest.raises(ValidationError) as weak:
        SetupSettings(superuser_url="postgresql://postgres:hunter2@db/x", **secrets)
    with pytest.raises(ValidationError) as missing:
        Settings(redis_url="redis://:Pa55word@r/0", store_url="/x")
    for caught, says in ((weak, "superuser"), (missing, "database_url")):
        shown = str(caught.value)
        assert says in shown and "input_value" not in shown and "hunter2" not in shown and "Pa55" not in shown
