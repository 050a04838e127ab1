"""Hand a batch in with Celery alone: nothing of Lamplighter is imported.

    REDIS_URL=redis://:PASSWORD@HOST:PORT/0 TOKEN=lk-… KEY=nightly-2026-11-23 python submit.py

The job is accepted once `GET /v1/jobs?idempotency_key=KEY` finds it. Until then send the same message again, under the
same key: however often it arrives, it is one job.
"""

import os

from celery import Celery

app = Celery("producer", broker=os.environ["REDIS_URL"])
questions = ["Why is the sky dark at night?", "Who lights the lamps?"]
app.send_task(
    "lamplighter.submit",
    kwargs={
        "kind": "batch",
        "spec": {
            "endpoint": "/v1/chat/completions",
            "requests": [{"model": "echo", "messages": [{"role": "user", "content": text}]} for text in questions],
        },
        "idempotency_key": os.environ["KEY"],
    },
    queue="submit",
    # A key with the scope `submit` and no other: `lamplighter keys create --scope submit`.
    headers={"lamplighter_token": os.environ["TOKEN"]},
    ignore_result=True,
)
