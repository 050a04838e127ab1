"""A small service that hands work to Lamplighter and keeps what comes back: the pattern for a producer.

    LAMPLIGHTER_URL=http://127.0.0.1:8000 LAMPLIGHTER_API_KEY=lk-… uvicorn service:app --port 9000

`POST /reviews` takes texts and answers at once with a job; `GET /reviews/{id}` shows its progress and, in the end, the
answers. A real one would keep job ids in its own database.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException
from lamplighter import AsyncClient, NotFound, RateLimited
from pydantic import BaseModel, Field

MODEL = os.environ.get("LAMPLIGHTER_MODEL", "echo")


class Reviews(BaseModel):
    texts: list[str] = Field(min_length=1)


@asynccontextmanager
async def lifespan(service: FastAPI) -> AsyncIterator[None]:
    async with AsyncClient(os.environ["LAMPLIGHTER_URL"], os.environ["LAMPLIGHTER_API_KEY"]) as client:
        service.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/reviews", status_code=202)
async def submit(reviews: Reviews) -> dict[str, Any]:
    """Hand the texts in as one batch."""
    requests = [
        {"custom_id": f"review-{number}", "body": {"model": MODEL, "messages": [{"role": "user", "content": text}]}}
        for number, text in enumerate(reviews.texts)
    ]
    try:
        batch = await app.state.client.submit(requests, "/v1/chat/completions", metadata={"from": "reviews"})
    except RateLimited as error:
        retry_after = str(int(error.retry_after_seconds or 1))
        raise HTTPException(503, "too busy", headers={"Retry-After": retry_after}) from None
    return {"id": batch["id"]}


@app.get("/reviews/{job_id}")
async def read(job_id: str) -> dict[str, Any]:
    """Show how far a job is; once it has succeeded, its answers in the order of the texts, null for one that failed."""
    client: AsyncClient = app.state.client
    try:
        job = await client.job(job_id)
    except NotFound:
        raise HTTPException(404, "no such review") from None
    answers = None
    if job["status"] == "succeeded":
        # By custom_id and never by position: a text that failed has its line in the error file, not here.
        bodies = {line["custom_id"]: line["response"]["body"] async for line in client.results(job_id)}
        names = [f"review-{number}" for number in range(job["progress"]["total"])]
        answers = [bodies[name]["choices"][0]["message"]["content"] if name in bodies else None for name in names]
    return {"id": job_id, "status": job["status"], "progress": job["progress"], "answers": answers}
