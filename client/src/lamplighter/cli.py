"""The command line. Exit codes: 0 done; 1 the job failed or was refused; 2 bad usage; 3 no server; 4 not authorised."""

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import tzlocal
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lamplighter.client import Client
from lamplighter.doctor import findings
from lamplighter.errors import ApiError, LamplighterError, NotAuthorized, ServerUnreachable
from lamplighter.night import clock, draw_plan, show_night, show_report
from lamplighter.policy import TERMINAL, file_key
from lamplighter.schedule_file import read_schedule, with_uploads
from lamplighter.training_spec import SpecificationWrong, read_specification, show_plan, show_tasks

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_NOT_AUTHORISED = 1, 2, 3, 4
DEFAULT_DATA = Path("lamplighter-data")
READY_SECONDS = 120.0

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
keys_app = typer.Typer(no_args_is_help=True, help="API keys (admin).")
models_app = typer.Typer(invoke_without_command=True, help="Models that may be served by name.")
schedules_app = typer.Typer(invoke_without_command=True, help="Jobs that begin again and again.")
app.add_typer(keys_app, name="keys")
app.add_typer(schedules_app, name="schedule")
app.add_typer(models_app, name="models")
console = Console()
errors = Console(stderr=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DataOption = Annotated[Path, typer.Option("--data", help="Directory of the stack's data.")]


def client() -> Client:
    """Return a client for the server that the environment names, or for the stack in ./lamplighter-data."""
    url, key = os.environ.get("LAMPLIGHTER_URL"), os.environ.get("LAMPLIGHTER_API_KEY")
    state, key_file = DEFAULT_DATA / "stack.json", DEFAULT_DATA / "admin.key"
    if url is None and state.exists():
        url = json.loads(state.read_text())["url"]
        key = key or key_file.read_text().strip()
    if url is None:
        raise ServerUnreachable("Set LAMPLIGHTER_URL, or run 'lamplighter up' here first.")
    if key is None:
        raise NotAuthorized(401, {"message": "Set LAMPLIGHTER_API_KEY."})
    return Client(url, key)


def show(data: Any, as_json: bool, columns: dict[str, str]) -> None:
    """Print objects as JSON, or as a table with `columns` (title → dotted path)."""
    if as_json:
        print(json.dumps(data, indent=2))
        return
    table = Table(box=None)
    for title in columns:
        table.add_column(title, overflow="fold")  # an id that is cut off is none
    for row in data:
        table.add_row(*(_cell(row, path) for path in columns.values()))
    console.print(table)


def _cell(row: dict[str, Any], path: str) -> str:
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


@app.command()
def up(
    data: DataOption = DEFAULT_DATA,
    port: Annotated[int, typer.Option(help="Port of the API; 0 takes a free one.")] = 8000,
    flower_port: Annotated[int, typer.Option(help="Port of Flower; 0 takes a free one.")] = 0,
    workers: Annotated[str, typer.Option(help="Worker processes, or 'auto': one for each device.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is ready.")] = False,
) -> None:
    """Run the whole stack on this machine: Postgres, Redis, gateway, scheduler and workers."""
    if device not in ("auto", "cpu", "cuda") or not (workers == "auto" or (workers.isdigit() and int(workers) > 0)):
        errors.print("--device is auto, cpu or cuda; --workers is auto or a number above 0.")
        raise typer.Exit(EXIT_USAGE)
    stack = _local_stack()
    state = stack.running_state(data)
    if state is not None and stack.is_supervised(state):
        errors.print(f"A stack runs in {data} already, at {state['url']}.")
        raise typer.Exit(EXIT_FAILED)
    # What a killed supervisor left running goes first: two servers must never share a directory.
    stack.shut_down(data)
    if detach:
        _detach(data)
        return
    options = stack.StackOptions(
        data=data,
        port=port,
        flower_port=flower_port,
        workers=workers,
        device=device,
        database_url=os.environ.get("LAMPLIGHTER_DATABASE_URL"),
        redis_url=os.environ.get("LAMPLIGHTER_REDIS_URL"),
    )
    stack.run_in_foreground(options, _announce)


def _announce(running: Any) -> None:
    print(f"ready {running.url}", flush=True)
    print(
        f"flower {running.flower_url} (user lamplighter, password in {running.directory}/flower.password)", flush=True
    )


def _local_stack() -> Any:
    return _server_part("stack")


def _server_part(name: str) -> Any:
    """Return a module of the project's own for this machine; it is there when this client runs inside the project."""
    try:
        return importlib.import_module(f"services.local.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("services"):
            raise  # the project is there, and one of its libraries is not
        errors.print("'up', 'down' and 'simulate' work in an installation of the server, which this is not.")
        raise typer.Exit(EXIT_USAGE) from None


def _detach(data: Path) -> None:
    """Start the same command in the background; print its `ready` line, or what went wrong."""
    command = [sys.executable, "-m", "lamplighter.cli", *(part for part in sys.argv[1:] if part != "--detach")]
    data.mkdir(parents=True, exist_ok=True)
    output = data / "up.log"
    with output.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        ready = next((line for line in output.read_text().splitlines() if line.startswith("ready ")), None)
        if ready is not None:
            print(ready)
            return
        time.sleep(0.1)
    errors.print(f"The stack did not come up:\n{output.read_text()[-2000:]}")
    raise typer.Exit(EXIT_FAILED)


@app.command()
def down(data: DataOption = DEFAULT_DATA) -> None:
    """End every process of the stack in a data directory."""
    _local_stack().shut_down(data)


@app.command()
def submit(
    files: Annotated[
        list[Path],
        typer.Argument(exists=True, dir_okay=False, help="Requests, one JSON object a line; one batch of all."),
    ],
    endpoint: Annotated[str, typer.Option(help="Such as /v1/chat/completions.")],
    priority: Annotated[int, typer.Option(min=0, max=9)] = 5,
    deadline: Annotated[str | None, typer.Option(help="RFC 3339, or 'none'.")] = None,
    window: Annotated[str | None, typer.Option(help="Hours in which it may run, such as 22:00-06:00.")] = None,
    tz: Annotated[
        str | None, typer.Option(help="Of the window, such as Europe/Berlin; by default this machine's.")
    ] = None,
    after: Annotated[list[str] | None, typer.Option(help="A job to follow; may be repeated.")] = None,
    resume_from: Annotated[str | None, typer.Option(help="An ended batch whose answers are taken over.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="However often FILES are submitted under this key, they are one batch.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end.")] = False,
    output: Annotated[Path | None, typer.Option("-o", help="Where to write the results; implies --wait.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Submit a batch."""
    fields: dict[str, Any] = {"priority": priority} | ({"deadline": deadline} if deadline else {})
    fields |= ({"window": _window(window, tz)} if window else {}) | ({"after": after} if after else {})
    fields |= {"resume_from": resume_from} if resume_from else {}
    if output is not None:
        _require_writable(output)
    with client() as api:
        numbers = range(len(files)) if len(files) > 1 else [None]
        keys = [file_key(idempotency_key, number) for number in numbers]
        ids = [api.upload(file, idempotency_key=key)["id"] for file, key in zip(files, keys, strict=True)]
        batch = api.create_batch(ids if len(ids) > 1 else ids[0], endpoint, idempotency_key=idempotency_key, **fields)
        if not (wait or output):
            print(json.dumps(batch) if as_json else batch["id"])
            return
        job = _follow(api, batch["id"], quiet=as_json)
        if output is not None:
            _download(api, job, output)
        print(json.dumps(job) if as_json else _summary(job))
    raise typer.Exit(0 if job["status"] == "succeeded" else EXIT_FAILED)


@app.command()
def train(
    specification: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="YAML or JSON; files of its tasks are uploaded.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check it, and say what it would take.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end.")] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="However often it is submitted under this key, it is one job.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train one model on several tasks."""
    spec = read_specification(specification) | ({"dry_run": True} if dry_run else {})
    with client() as api:
        job = api.training.create(idempotency_key=idempotency_key, **spec)
        if not (wait or dry_run):
            print(json.dumps(job) if as_json else job["id"])
            return
        _follow(api, job["id"], quiet=as_json or dry_run)
        job = api.training.retrieve(job["id"])
    if as_json:
        print(json.dumps(job))
    elif job["status"] != "succeeded":
        print(_summary(job))
        for fault in (job["errors"] or {"data": []})["data"]:
            print(f"  line {fault['line']}: {fault['message']}" if fault["line"] else f"  {fault['message']}")
    elif dry_run:
        show_plan(console, job)
    else:
        show_tasks(console, job)
    raise typer.Exit(0 if job["status"] == "succeeded" else EXIT_FAILED)


def _window(hours: str, tz: str | None) -> dict[str, str]:
    """Return the run window of hours such as `22:00-06:00`; without a time zone, this machine's."""
    start, dash, end = (part.strip() for part in hours.partition("-"))
    if not (start and dash and end):
        raise typer.BadParameter(f"{hours!r} is no window; one looks like 22:00-06:00.", param_hint="--window")
    return {"start": start, "end": end, "tz": tz or tzlocal.get_localzone_name()}


def _require_writable(output: Path) -> None:
    """End the command when results could not be written: found out now, and not after a night of work."""
    is_new = not output.exists()
    try:
        output.open("ab").close()
        if is_new:
            output.unlink()
    except OSError as error:
        errors.print(f"{output} cannot be written: {error.strerror}.")
        raise typer.Exit(EXIT_USAGE) from None


def _download(api: Client, job: dict[str, Any], output: Path) -> None:
    if job["output_file_id"]:
        api.download(job["output_file_id"], output)
    if job["error_file_id"]:
        api.download(job["error_file_id"], output.with_name(f"{output.name}.errors"))


def _summary(job: dict[str, Any]) -> str:
    progress = job["progress"]
    text = f"{job['id']} {job['status']}: {progress['done']} of {progress['total']} {progress['unit']}"
    if progress.get("failed"):
        text += f", {progress['failed']} failed"
    return text + (f"\n{job['error']['message']}" if job.get("error") else "")


@app.command()
def jobs(
    kind: Annotated[str | None, typer.Option()] = None,
    status: Annotated[str | None, typer.Option()] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    query = {key: value for key, value in {"kind": kind, "status": status, "limit": limit}.items() if value is not None}
    with client() as api:
        page = api.request("GET", "/v1/jobs", params=query)
    columns = {"id": "id", "kind": "kind", "status": "status", "model": "model", "done": "progress.done"}
    columns |= {"total": "progress.total", "failed": "progress.failed", "waits for": "waiting.reason"}
    show(page["data"], as_json, columns)


@app.command()
def plan(
    image: Annotated[Path | None, typer.Option(help="Also draw it, into a file that ends in .svg or .png.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say when open jobs are expected to begin and end, and what each worker does until then."""
    if image is not None and image.suffix not in (".svg", ".png"):
        raise typer.BadParameter("must end in .svg or .png", param_hint="--image")
    with client() as api:
        night = api.request("GET", "/v1/plan")
    if image is not None:
        draw_plan(night, image)
    if as_json:
        print(json.dumps(night, indent=2))
    else:
        show_night(console, night)


@app.command()
def simulate(
    gpus: Annotated[int, typer.Option(min=1, max=10_000)] = 16,
    tenants: Annotated[int, typer.Option(min=1, max=1000)] = 8,
    days: Annotated[int, typer.Option(min=1, max=60)] = 7,
    load: Annotated[float, typer.Option(min=0.01, max=10, help="Of the fleet's time that jobs ask for.")] = 0.9,
    deadlines: Annotated[float, typer.Option(min=0, max=1, help="Share of the jobs that have one.")] = 0.3,
    gangs: Annotated[float, typer.Option(min=0, max=1, help="Share of trainings that need 2 to 8 GPUs.")] = 0.0,
    failures: Annotated[float, typer.Option(min=0, max=100, help="Of each GPU, a day.")] = 0.0,
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Run the scheduling policy over a made-up fleet and what arrives at it; the same seed gives the same answer."""
    asked = {"gpus": gpus, "tenants": tenants, "load": load, "deadlines": deadlines, "gangs": gangs}
    report = _server_part("simulation").run(seed, days=days, failures=failures, **asked)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
        return
    show_report(console, report)


@app.command()
def usage(
    by: Annotated[list[str] | None, typer.Option(help="tenant, key, model or job; may be repeated.")] = None,
    bucket: Annotated[str, typer.Option(help="hour or day.")] = "day",
    as_json: JsonOption = False,
) -> None:
    """Show requests, tokens and device seconds by hour or day."""
    groups = by or []
    with client() as api:
        page = api.request("GET", "/v1/usage", params={"bucket": bucket, "group_by": groups})
    rows = [{"from": clock(one["start"]), **row} for one in page["data"] for row in one["results"]]
    columns = {"from": "from"} | {group: group for group in groups}
    sums = ("requests", "input_tokens", "output_tokens", "device_seconds")
    show(page["data"] if as_json else rows, as_json, columns | {name.replace("_", " "): name for name in sums})


@app.command()
def results(
    job_id: str,
    failed: Annotated[
        bool, typer.Option("--failed", help="Lines that failed, in place of those that succeeded.")
    ] = False,
) -> None:
    """Print what a batch has finished until now, a JSON line each."""
    with client() as api:
        for line in api.finished_lines(job_id, failed=failed):
            print(json.dumps(line, ensure_ascii=False))


@app.command()
def watch(job_id: str, as_json: JsonOption = False) -> None:
    """Follow a job to its end, with a live progress bar."""
    with client() as api:
        api.job(job_id)  # a server that was never there is said at once; one that goes away later is waited for
        job = _follow(api, job_id, quiet=as_json)
    print(json.dumps(job) if as_json else _summary(job))
    raise typer.Exit(0 if job["status"] == "succeeded" else EXIT_FAILED)


def _follow(api: Client, job_id: str, *, quiet: bool) -> dict[str, Any]:
    """Return the job once it has ended, showing its bar meanwhile: done, rate and time left."""
    columns = (
        TextColumn("{task.fields[status]:<11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, disable=quiet) as bar:
        task = bar.add_task("", total=None, status="", rate="")
        speed = Speed()

        def update(job: dict[str, Any]) -> None:
            progress = job["progress"]
            rate = speed.text(progress["done"], progress["total"])
            ended = job["status"] in TERMINAL
            bar.update(
                task,
                completed=progress["done"],
                total=progress["total"] or None,
                status=job["status"],
                rate="" if ended else rate,
            )

        return api.wait(job_id, update)


class Speed:
    """Lines a second over the last few seconds, and the time left at that rate."""

    WINDOW_SECONDS = 15.0

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def text(self, done: int, total: int) -> str:
        """Return such as `812/s, 0:41 left`; empty until there is something to say."""
        now = time.monotonic()
        self._seen = [(at, count) for at, count in self._seen if now - at <= self.WINDOW_SECONDS] + [(now, done)]
        first_at, first = self._seen[0]
        elapsed = now - first_at
        if elapsed <= 0 or done <= first:
            return ""
        rate = (done - first) / elapsed
        seconds = int((total - done) / rate)
        return f"{rate:.3g}/s, {seconds // 60}:{seconds % 60:02} left"


@app.command()
def cancel(job_id: str, as_json: JsonOption = False) -> None:
    """Cancel a job; what is done stays."""
    _change(job_id, "cancel", as_json)


@app.command()
def pause(job_id: str, as_json: JsonOption = False) -> None:
    """Hold a job; running work flushes and waits."""
    _change(job_id, "pause", as_json)


@app.command()
def resume(job_id: str, as_json: JsonOption = False) -> None:
    """Let a paused job go on."""
    _change(job_id, "resume", as_json)


@app.command()
def retry(job_id: str, as_json: JsonOption = False) -> None:
    """Run an ended batch's failed lines again, as a new batch that has the answers of all others."""
    with client() as api:
        job = api.change_job(job_id, "retry_failed")
    print(json.dumps(job) if as_json else job["id"])


def _change(job_id: str, action: str, as_json: bool) -> None:
    with client() as api:
        job = api.change_job(job_id, action)
    print(json.dumps(job) if as_json else _summary(job))


@schedules_app.callback()
def list_schedules(context: typer.Context, as_json: JsonOption = False) -> None:
    """List schedules, each with its next slot."""
    if context.invoked_subcommand is not None:
        return
    with client() as api:
        data = api.request("GET", "/v1/schedules", params={"limit": 100})["data"]
    rows = [each | {"next": clock(each["next_at"])} for each in data]
    columns = {"id": "id", "name": "name", "kind": "kind", "cron": "cron", "zone": "tz", "next": "next"}
    show(data if as_json else rows, as_json, columns)


@schedules_app.command("add")
def add_schedule(
    specification: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="YAML or JSON; files that it names are uploaded.")
    ],
    idempotency_key: Annotated[
        str | None, typer.Option(help="However often it is added under this key, it is one schedule.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Have a job begin again and again."""
    body = read_schedule(specification)
    headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
    numbers = itertools.count()
    with client() as api:

        def upload(path: Path, purpose: str) -> str:
            key = file_key(idempotency_key, next(numbers))
            return str(api.upload(path, purpose=purpose, idempotency_key=key)["id"])

        made = api.request("POST", "/v1/schedules", json=with_uploads(body, upload), headers=headers)
    print(json.dumps(made) if as_json else f"{made['id']} next {clock(made['next_at'])}")


@schedules_app.command("show")
def show_schedule(schedule_id: str, as_json: JsonOption = False) -> None:
    """Show the last slots of a schedule and what became of them."""
    with client() as api:
        data = api.request("GET", f"/v1/schedules/{schedule_id}/runs")["data"]
    rows = [each | {"at": clock(each["slot"])} for each in data]
    columns = {"slot": "at", "status": "status", "job": "job", "its status": "job_status", "missed": "missed"}
    show(data if as_json else rows, as_json, columns | {"why": "error.message"})


@schedules_app.command("run")
def run_schedule(schedule_id: str, as_json: JsonOption = False) -> None:
    """Have a schedule's job made now, beside its slots."""
    with client() as api:
        run = api.request("POST", f"/v1/schedules/{schedule_id}/run")
    print(json.dumps(run) if as_json else run["id"])


@schedules_app.command("pause")
def pause_schedule(schedule_id: str) -> None:
    """Let slots pass; they are not made up for."""
    _activate(schedule_id, active=False)


@schedules_app.command("resume")
def resume_schedule(schedule_id: str) -> None:
    """Wait for the next slot again."""
    _activate(schedule_id, active=True)


def _activate(schedule_id: str, *, active: bool) -> None:
    with client() as api:
        changed = api.request("POST", f"/v1/schedules/{schedule_id}", json={"is_active": active})
    print(f"next {clock(changed['next_at'])}" if active else "paused")


@schedules_app.command("remove")
def remove_schedule(schedule_id: str) -> None:
    """Forget a schedule; its jobs stay."""
    with client() as api:
        api.request("DELETE", f"/v1/schedules/{schedule_id}")


@models_app.callback()
def list_models(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the models that may be served."""
    if context.invoked_subcommand is not None:
        return
    with client() as api:
        data = api.request("GET", "/v1/models")["data"]
    show(data, as_json, {"id": "id", "owner": "owned_by"})


@models_app.command("add")
def add_model(
    name: str,
    source: Annotated[str, typer.Argument(help="A directory on the server, a hub id, or the URL of another server.")],
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    base: Annotated[str | None, typer.Option(help="For a LoRA adapter: the name of the model that it changes.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose it is; without this it serves everybody.")] = None,
    remote_model: Annotated[str | None, typer.Option(help="The model's name on the server at the URL.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="The workers' variable with that server's key: LAMPLIGHTER_REMOTE_KEY_NAME.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Calls that one worker may have there at once.")] = None,
    check: Annotated[bool, typer.Option(help="Ask that server whether it has the model.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Register a model under a name (admin)."""
    path = Path(source)
    body: dict[str, Any] = {"name": name, "source": str(path.resolve()) if path.is_dir() else source}
    options = {"remote_model": remote_model, "api_key_env": api_key_env, "concurrency": concurrency}
    options |= {"base": base, "tenant": tenant}
    body |= {option: value for option, value in options.items() if value is not None}
    body |= ({} if dtype == "auto" else {"dtype": dtype}) | ({} if check else {"check": False})
    with client() as api:
        model = api.request("POST", "/v1/models", json=body)
    print(json.dumps(model) if as_json else f"{model['id']} ({model['kind']}, {model['dtype']})")
    if "warning" in model:
        errors.print(f"Registered, but: {model['warning']}", markup=False)


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Option()] = "",
    tenant: Annotated[str | None, typer.Option()] = None,
    scope: Annotated[list[str] | None, typer.Option(help="read, write, submit or admin; may be repeated.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key; it is shown this once."""
    body: dict[str, Any] = {"name": name, "scopes": scope or ["write"]} | ({"tenant": tenant} if tenant else {})
    with client() as api:
        key = api.request("POST", "/v1/keys", json=body)
    print(json.dumps(key) if as_json else key["key"])


@keys_app.command("list")
def list_keys(as_json: JsonOption = False) -> None:
    """List keys, without their secrets."""
    with client() as api:
        data = api.request("GET", "/v1/keys")["data"]
    columns = {"id": "id", "tenant": "tenant", "name": "name", "scopes": "scopes", "revoked at": "revoked_at"}
    show(data, as_json, columns)


@keys_app.command("revoke")
def revoke_key(key_id: str) -> None:
    """Make a key useless from now on."""
    with client() as api:
        api.request("DELETE", f"/v1/keys/{key_id}")


@app.command()
def erase(
    tenant: str,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and print the report.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a tenant with everything that is its own (admin)."""
    if not yes:
        typer.confirm(f"Delete the tenant {tenant!r} with its jobs, results, files, models and keys?", abort=True)
    with client() as api:
        erasure = api.request("DELETE", f"/v1/tenants/{tenant}")
        if wait and not as_json:
            errors.print(
                "Its keys are useless now. Its data goes once its jobs have ended and no call can be under way."
            )
        while wait and erasure["status"] != "erased":
            time.sleep(1)
            erasure = api.request("GET", f"/v1/erasures/{erasure['id']}")
    if as_json:
        print(json.dumps(erasure))
        return
    print(f"{erasure['id']} {erasure['status']}")
    rows = [{"what": what, "deleted": count} for what, count in sorted(erasure["deleted"].items())]
    show(rows, as_json, {"what": "what", "deleted": "deleted"})


@app.command()
def retention(as_json: JsonOption = False) -> None:
    """Show what was forgotten on each day, and what should have been and is still there (admin)."""
    with client() as api:
        days = api.request("GET", "/v1/retention")["data"]
    if as_json:
        print(json.dumps(days))
        return
    rows = [
        {"day": day["id"], "what": what, "deleted": day["deleted"].get(what, 0), "overdue": day["overdue"].get(what)}
        for day in days
        for what in sorted(day["deleted"].keys() | {what for what, count in day["overdue"].items() if count})
    ]
    show(rows, as_json, {name: name for name in ("day", "what", "deleted", "overdue")})


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check the server and say in plain words what is wrong."""
    with client() as api:
        found = findings(api)
    for finding in found:
        finding["verdict"] = "ok" if finding["ok"] else "WRONG"
    show(found, as_json, {"check": "check", "": "verdict", "detail": "detail"})
    raise typer.Exit(0 if all(finding["ok"] for finding in found) else EXIT_FAILED)


def main() -> None:
    """Run the command line and turn errors into exit codes."""
    try:
        app()
    except NotAuthorized as error:
        errors.print(f"Not authorised: {error}", markup=False)
        sys.exit(EXIT_NOT_AUTHORISED)
    except ServerUnreachable as error:
        errors.print(str(error), markup=False)
        sys.exit(EXIT_UNREACHABLE)
    except SpecificationWrong as error:
        errors.print(str(error), markup=False)
        sys.exit(EXIT_USAGE)
    except ApiError as error:
        errors.print(f"Refused: {error}", markup=False)
        sys.exit(EXIT_FAILED)
    except LamplighterError as error:
        errors.print(str(error), markup=False)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
