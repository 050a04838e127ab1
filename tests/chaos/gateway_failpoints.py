"""A gateway that kills itself with SIGKILL at a named point of accepting a batch.

`python -m tests.chaos.gateway_failpoints` reads lines `POINT PORT` and forks a gateway for each: a fork has everything
imported already, so 500 kills take minutes. It prints the pid of each fork.
"""

import os
import signal
import sys

POINTS = (
    "request received",
    "key looked up",
    "transaction begun",
    "idempotency key looked up",
    "before the job is inserted",
    "after the job is inserted",
    "after the idempotency row",
    "before COMMIT",
    "after COMMIT",
    "before the answer",
    "in the middle of the answer",
    "after the answer",
)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm_database(engine, point):
    """Kill at a point inside the accepting transaction, seen through SQLAlchemy's events."""
    from sqlalchemy import event

    state = {"accepting": False}
    before = {"before the job is inserted": "INSERT INTO job"}
    after = {
        "key looked up": "find_api_key",
        "transaction begun": "set_config",
        "idempotency key looked up": "FROM idempotency",
        "after the job is inserted": "INSERT INTO job",
        "after the idempotency row": "INSERT INTO idempotency",
    }

    @event.listens_for(engine, "before_cursor_execute")
    def on_before(conn, cursor, statement, parameters, context, executemany):
        if point in before and before[point] in statement:
            _die()

    @event.listens_for(engine, "after_cursor_execute")
    def on_after(conn, cursor, statement, parameters, context, executemany):
        if "INSERT INTO job" in statement:
            state["accepting"] = True
        if point in after and after[point] in statement:
            _die()

    commit = engine.dialect.do_commit

    def do_commit(connection):
        if state["accepting"] and point == "before COMMIT":
            _die()
        commit(connection)
        if state["accepting"] and point == "after COMMIT":
            _die()

    engine.dialect.do_commit = do_commit


class ArmedAnswer:
    """Kill around the answer of `POST /v1/batches`."""

    def __init__(self, app, point):
        self.app, self.point = app, point

    async def __call__(self, scope, receive, send):
        is_submit = scope["type"] == "http" and scope["path"] == "/v1/batches" and scope["method"] == "POST"
        if is_submit and self.point == "request received":
            _die()

        async def armed_send(message):
            if is_submit and message["type"] == "http.response.start" and self.point == "before the answer":
                _die()
            if is_submit and message["type"] == "http.response.body" and self.point == "in the middle of the answer":
                await send({"type": "http.response.body", "body": message["body"][:50], "more_body": True})
                _die()
            await send(message)
            if is_submit and message["type"] == "http.response.body" and self.point == "after the answer":
                _die()

        await self.app(scope, receive, armed_send)


def serve(point, port):
    import uvicorn

    from services.gateway.app import create_app
    from shared.settings import load_settings

    app = create_app(load_settings())
    arm_database(app.state.parts.engine, point)
    uvicorn.run(ArmedAnswer(app, point), host="127.0.0.1", port=port, log_config=None, access_log=False)


def main():
    import services.gateway.app  # noqa: F401  # imported once, before the forks

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        port, _, point = line.strip().partition(" ")
        pid = os.fork()
        if pid == 0:
            serve(point, int(port))
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
