"""What is sent through Celery, looked at without a broker."""

import pytest

from shared.queueing.celery_app import create_app


@pytest.mark.parametrize(("shadow", "shown"), [("generate[m]", "generate[m]"), (None, "lamplighter.generate")])
def test_sender_and_worker_say_one_name(shadow, shown):
    amqp = create_app("memory://").amqp
    message = amqp.create_task_message("id", "lamplighter.generate", create_sent_event=True, shadow=shadow)
    assert message.sent_event["name"] == shown
    assert (message.headers["task"], message.headers["shadow"]) == ("lamplighter.generate", shadow)
    assert amqp.create_task_message("id", "a", create_sent_event=False, shadow=shadow).sent_event is None
