"""Sends calls to one server: online ones first, as many as its flow control allows, and again when that may help.

All of it runs in one event loop, and nothing blocks. A call ends in one response, whatever happened on the way.
"""

import asyncio
import contextlib
import heapq
import itertools
import logging
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from services.worker.engine.remote_client import RemoteServer
from services.worker.engine.remote_messages import Failure, estimated_prompt_tokens, estimated_tokens
from services.worker.engine.remote_policy import FlowControl, Verdict, pause_seconds, told_status
from services.worker.protocol import Delta, Output, Request, RequestFault, Response, SamplingParams

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
FAILURES_OF_A_BATCH_LINE = 8
FAILURES_OF_AN_ONLINE_CALL = 4
TIME_OUT_WEIGHS = 4
"""A call that took all its time twice will not fare better soon."""
NEWCOMER_SECONDS = 3.0
"""What comes while the server is known to be away waits so long for it: slots are for models that can be served."""
MISCONFIGURED_SECONDS = 10.0
SILENT_PROBES = 3
AWAY = "The server of this model does not answer. Try again later."
BROKEN_STREAM = "The answer broke off on its model's server. Try again."


@dataclass(eq=False)
class Call:
    """A request on its way. A stream of which something was delivered is never sent again."""

    request: Request
    added_at: float = field(default_factory=time.monotonic)
    failures: int = 0
    was_failed_at_only: bool = True
    """Whether all its failures were the server's failing at it: then it may be the request that is at fault."""
    is_server_well: bool = False
    was_sent: bool = False
    delivered: list[str] = field(default_factory=list)
    is_over: bool = False
    is_cut: bool = False
    task: "asyncio.Task[None] | None" = None
    timer: asyncio.TimerHandle | None = None

    @property
    def most_failures(self) -> int:
        return FAILURES_OF_AN_ONLINE_CALL if self.request.is_online else FAILURES_OF_A_BATCH_LINE

    @property
    def used(self) -> Response:
        """What is counted of a call that nobody wants any more: an estimate, as its server never said."""
        prompt_tokens = estimated_prompt_tokens(self.request) if self.was_sent else 0
        completion_tokens = estimated_tokens("".join(self.delivered))
        return Response(
            self.request.id, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, is_aborted=True
        )


@dataclass(frozen=True)
class Patience:
    """How long calls wait for a server that is away, and how long calls in flight may bring nothing at all."""

    batch_seconds: float
    online_seconds: float
    silence_seconds: float


class Dispatcher:
    """`emit` takes what comes of the calls, from within the event loop."""

    def __init__(
        self, server: RemoteServer, flow: FlowControl, patience: Patience, emit: Callable[[Output], None]
    ) -> None:
        self._server, self._flow, self._patience, self._emit = server, flow, patience, emit
        self._waiting: list[tuple[bool, int, Call]] = []
        """A heap: online first, then what came first. What has failed comes anew, so that others have their turn."""
        self._resting: set[Call] = set()
        self._in_flight: set[Call] = set()
        self._order = itertools.count()
        self._refusal: tuple[float, str] = (0.0, "")
        """Until when every call is refused, and why: an operator's mistake."""
        self._probing: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        self.ticks = 0

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    async def run(self) -> None:
        """Keep time until `stop`, then cut every connection."""
        while not self._stopped.is_set():
            self._tick(time.monotonic())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), TICK_SECONDS)
        tasks = [call.task for call in self._in_flight if call.task is not None]
        tasks += [self._probing] if self._probing is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.close()

    def stop(self) -> None:
        self._stopped.set()

    def add(self, call: Call) -> None:
        """Take a call in; it is answered through `emit`."""
        until, why = self._refusal
        if time.monotonic() < until:
            self._finish(call, Response(call.request.id, fault=RequestFault(why)))
            return
        self._queue(call)
        self._pump()

    def drop(self, call: Call) -> None:
        """Forget a call and close its connection."""
        call.is_over = True
        self._resting.discard(call)
        if call.timer is not None:
            call.timer.cancel()
        if call.task is not None:
            call.task.cancel()

    def _queue(self, call: Call) -> None:
        self._resting.discard(call)
        heapq.heappush(self._waiting, (not call.request.is_online, next(self._order), call))

    def _pump(self) -> None:
        """Send what may be sent now."""
        while self._waiting and not self._stopped.is_set():
            call = self._waiting[0][-1]
            if not call.is_over:
                online = sum(other.request.is_online for other in self._in_flight)
                is_online, now = call.request.is_online, time.monotonic()
                if not self._flow.allows(len(self._in_flight), online, now, is_online=is_online):
                    return
                self._send(call)
            heapq.heappop(self._waiting)

    def _send(self, call: Call) -> None:
        if not self._in_flight:
            self._server.heard_at = time.monotonic()
        self._in_flight.add(call)
        call.was_sent = True
        call.task = asyncio.create_task(self._attempt(call, self._flow.epoch))

    async def _attempt(self, call: Call, epoch: int) -> None:
        """Ask the server once; what came of it is decided in `_failed` and `_finish`."""
        try:
            if call.failures == call.most_failures - 1 and call.was_failed_at_only:
                call.is_server_well = await self._answers_others(call.request)
            response = await self._server.ask(call.request, lambda deltas: self._deliver(call, deltas))
        except Failure as failure:
            self._failed(call, failure, epoch)
        except asyncio.CancelledError:
            if call.is_cut and not call.is_over:
                self._failed(call, Failure(Verdict.UNREACHABLE, AWAY), epoch)
        except Exception as error:
            log.exception("a call to a remote server failed", extra={"tenant": call.request.namespace})
            self._failed(call, Failure(Verdict.FAILED, type(error).__name__), epoch)
        else:
            self._flow.answered(len(self._in_flight))
            self._finish(call, response)
        finally:
            call.task, call.is_cut = None, False
            self._in_flight.discard(call)
            self._pump()

    async def _answers_others(self, request: Request) -> bool:
        """Return whether the server answers the smallest request of this kind: then it is the one at hand that it
        fails at. Nobody is charged for it.
        """
        is_chat = request.task == "chat"
        trial = Request(
            0,
            request.task,
            messages=[{"role": "user", "content": "Hello"}] if is_chat else None,
            prompts=[] if is_chat else ["Hello"],
            params=SamplingParams(max_tokens=1),
        )
        try:
            await self._server.ask(trial, lambda _: None)
        except Failure:
            return False
        return True

    def _deliver(self, call: Call, deltas: list[Delta]) -> None:
        if not call.is_over:
            call.delivered += [delta.text for delta in deltas]
            self._emit(Output([], deltas))

    def _finish(self, call: Call, response: Response) -> None:
        if not call.is_over:
            call.is_over = True
            self._resting.discard(call)
            self._emit(Output([response]))

    def _give_up(self, call: Call, message: str) -> None:
        """End a call without an answer: whoever sent it may send it again."""
        self._finish(call, Response(call.request.id, fault=RequestFault(message)))

    def _failed(self, call: Call, failure: Failure, epoch: int) -> None:
        """Learn from a failed attempt, and end the call or let it try again."""
        if failure.verdict is Verdict.REFUSED:
            self._flow.answered(len(self._in_flight))
            fault = RequestFault(failure.message, told_status(failure.status), failure.param, failure.code)
            self._finish(call, Response(call.request.id, fault=fault))
            return
        self._learn(failure, epoch)
        call.failures += TIME_OUT_WEIGHS if failure.verdict is Verdict.TIMED_OUT else 1
        call.was_failed_at_only &= failure.verdict is Verdict.FAILED
        if call.delivered:
            self._give_up(call, BROKEN_STREAM)
        elif failure.verdict is Verdict.MISCONFIGURED:
            self._refuse_all(call, failure)
        elif call.failures < call.most_failures:
            self._rest(call, 0.0 if failure.verdict is Verdict.UNREACHABLE else self._pause(call.failures))
        elif call.was_failed_at_only and call.is_server_well:
            message = f"The model's server fails at this request, and at no other: {failure.message}"
            self._finish(call, Response(call.request.id, fault=RequestFault(message, 500, code="remote_failed")))
        else:
            self._give_up(call, AWAY)

    def _learn(self, failure: Failure, epoch: int) -> None:
        # The first call that is turned away only halves the limit: where others are served, nobody need stand still.
        now, pause = time.monotonic(), self._pause(self._flow.strikes)
        if failure.verdict is Verdict.UNREACHABLE:
            if self._flow.unreachable(epoch, now):
                self._probe(self._recover())
        elif failure.verdict is Verdict.OVERLOADED:
            self._flow.overloaded(epoch, now, pause, failure.retry_after_seconds)
        elif failure.verdict is Verdict.TIMED_OUT:
            self._flow.timed_out(epoch)
        elif failure.verdict is Verdict.FAILED:
            self._flow.failed(epoch, now, pause)

    def _probe(self, probing: Coroutine[Any, Any, None]) -> None:
        """Begin to ask whether the server is there, in place of whatever was being asked."""
        if self._probing is not None:
            self._probing.cancel()
        self._probing = asyncio.create_task(probing)

    def _pause(self, failures: int) -> float:
        return pause_seconds(failures, random.random())  # noqa: S311  # jitter, not a secret

    def _rest(self, call: Call, seconds: float) -> None:
        """Have a call wait for its next try."""
        if seconds <= 0:
            self._queue(call)
            return

        def rise() -> None:
            if not call.is_over:
                self._queue(call)
                self._pump()

        self._resting.add(call)
        call.timer = asyncio.get_running_loop().call_later(seconds, rise)

    def _refuse_all(self, call: Call, failure: Failure) -> None:
        """No call fares better until an operator has looked: say so once, and ask the server once in a while."""
        now = time.monotonic()
        if now >= self._refusal[0]:
            extra = {"host": self._server.address.host, "status": failure.status}
            log.error("a remote server refuses this worker: look at its key and its address", extra=extra)
        status = "" if failure.status is None else f" (status {failure.status})"
        why = f"The server of this model refuses this worker{status}: an operator must look at its key and address."
        self._refusal = (now + MISCONFIGURED_SECONDS, why)
        for each in [call, *self._unsent()]:
            self._give_up(each, why)

    def _unsent(self) -> list[Call]:
        return [entry[-1] for entry in self._waiting if not entry[-1].is_over] + list(self._resting)

    async def _recover(self) -> None:
        """Ask with growing pauses whether the server is back; nothing else is sent until it is."""
        failed = 0
        extra = {"host": self._server.address.host}
        while True:
            await asyncio.sleep(self._pause(self._flow.strikes - 1 + failed))
            if await self._server.is_there():
                break
            if failed == 0:
                log.warning("a remote server does not answer", extra=extra)
            failed += 1
        if failed:
            log.info("a remote server answers again", extra=extra)
            await self._server.renew()
        self._flow.recovered(was_away=failed > 0)
        self._pump()

    def _tick(self, now: float) -> None:
        """Give up what has waited too long, send what may be sent again, and look whether the server still speaks."""
        self.ticks += 1
        if self._flow.trouble_since is not None and self._flow.is_closed(now):
            for call in self._unsent():
                if self._is_hopeless(call, now):
                    self._give_up(call, AWAY)
        self._pump()
        is_silent = bool(self._in_flight) and now - self._server.heard_at > self._patience.silence_seconds
        if is_silent and (self._probing is None or self._probing.done()):
            self._probe(self._break_silence())

    def _is_hopeless(self, call: Call, now: float) -> bool:
        assert self._flow.trouble_since is not None
        if call.request.is_online:
            patience = self._patience.online_seconds
        elif self._in_flight:  # what was sent before the trouble began may still be answered, and end it
            return False
        else:
            patience = self._patience.batch_seconds
        return now >= max(call.added_at + NEWCOMER_SECONDS, self._flow.trouble_since + patience)

    async def _break_silence(self) -> None:
        """A server that has said nothing for long may be at work. One that does not even take a probe hangs: cut off
        every call there, and treat it as one that is down.
        """
        for _ in range(SILENT_PROBES):
            if await self._server.is_there():
                return
        log.warning("a remote server hangs", extra={"host": self._server.address.host})
        self._flow.unreachable(self._flow.epoch, time.monotonic())
        for call in self._in_flight:
            if call.task is not None:
                call.is_cut = True
                call.task.cancel()
        await self._recover()
