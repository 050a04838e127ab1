"""What a worker process holds: slices under leases, each with its share of the device, and the writes of a holder."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError

from services.worker.device_time import DeviceTime, Share
from shared.db import slices
from shared.db.session import is_outage
from shared.db.slices import ClaimedSlice
from shared.db.workers import WorkerIdentity
from shared.domain.errors import ChildLost, LeaseGivenUp, LeaseLost
from shared.domain.job import StopReason
from shared.domain.retry import backoff_seconds
from shared.domain.slice import AttemptOutcome, SliceKind
from shared.logging import logged_with
from shared.settings import Settings

log = logging.getLogger(__name__)

OUTAGE_PAUSE_SECONDS = 0.25
MOST_FAILURES = 600
"""Tries in a row that failed without progress before a slice is given up. With pauses of up to a minute that is about
seven hours: whatever is away for a night comes back before."""


@dataclass
class Lease:
    """A slice that this process holds; the heartbeat thread renews it and passes on what it learns."""

    claimed: ClaimedSlice
    share: Share
    """Of the device: for each line in the engine, and as one line while there is none."""
    renewed_at: float = field(default_factory=time.monotonic)
    lost: threading.Event = field(default_factory=threading.Event)
    stop_reason: StopReason | None = None
    devices: int = 1
    """Its own and those that it has taken of other workers."""

    @property
    def device_seconds(self) -> float:
        """What it was charged when that was last asked for, or when it ended."""
        return self.share.seconds * self.devices


class Leases:
    """All leases of this process. They share its device with online calls, so each is charged its part of the time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: dict[int, Lease] = {}
        self.device_time = DeviceTime()

    @contextmanager
    def hold(self, claimed: ClaimedSlice) -> Iterator[Lease]:
        lease = Lease(claimed, self.device_time.enter())
        with self._lock:
            self._leases[claimed.lease_token] = lease
        try:
            yield lease
        finally:
            with self._lock:
                del self._leases[claimed.lease_token]
            self.device_time.leave(lease.share)

    def note_lines(self, lease: Lease, lines: int) -> None:
        """Charge a lease for so many lines in the engine from now on."""
        self.device_time.resize(lease.share, max(1, lines))

    def device_seconds(self, lease: Lease) -> float:
        """Return a held lease's share of the device until now; of all its devices, as if they were shared alike."""
        return self.device_time.charged(lease.share) * lease.devices

    def all(self) -> list[Lease]:
        with self._lock:
            return list(self._leases.values())


class SliceHolder:
    """Claims slices for this process and runs them under their leases, through outages of Postgres."""

    def __init__(self, engine: Engine, identity: WorkerIdentity, settings: Settings) -> None:
        self._engine, self._identity, self._settings = engine, identity, settings
        self.leases = Leases()
        self.draining = threading.Event()
        self.stale_writes = 0
        self.claiming: set[int] = set()
        """Slices whose message has come and whose claim is not decided yet."""

    def run(self, slice_id: int, task_id: str, kind: SliceKind, work: Callable[[Lease], None]) -> None:
        """Do `work` on a slice if it may be claimed; whatever happens, its row says so, or its lease runs out."""
        if self.draining.is_set():
            return
        self.claiming.add(slice_id)
        try:
            claimed = self._claim(slice_id, task_id, kind)
        finally:
            self.claiming.discard(slice_id)
        if claimed is None:
            return
        ids = logged_with(tenant=claimed.tenant_id, job_id=claimed.job_id.hex, slice_id=slice_id)
        with ids, self.leases.hold(claimed) as lease:
            try:
                work(lease)
            except LeaseGivenUp:
                log.warning("lease given up", extra={"token": claimed.lease_token})
            except LeaseLost:
                self.stale_writes += 1
                log.warning("stale write rejected", extra={"token": claimed.lease_token})
            except ChildLost:
                self._settle(claimed, self._lose(lease))
            except Exception as error:
                log.exception("slice failed")
                self._settle(claimed, self._release_failed(lease, error))

    def _claim(self, slice_id: int, task_id: str, kind: SliceKind) -> ClaimedSlice | None:
        """Claim the slice, as soon as Postgres is there: its message is used up, and no other would come soon."""
        while not self.draining.is_set():
            try:
                with self._engine.begin() as connection:
                    return slices.claim(
                        connection,
                        slice_id,
                        kind=kind,
                        worker_id=self._identity.worker_id,
                        worker=self._identity.name,
                        device=self._identity.device,
                        task_id=task_id,
                        lease_seconds=self._settings.lease_seconds,
                    )
            except OperationalError as error:
                log.warning("cannot claim yet", extra={"slice_id": slice_id, "error": str(error).splitlines()[0]})
                self.draining.wait(OUTAGE_PAUSE_SECONDS)
        return None

    def write(self, lease: Lease, act: Callable[[Connection, bool], None]) -> None:
        """Do `act(connection, is_retry)` in a transaction; while Postgres is away, wait as long as the lease lives.

        Raises LeaseGivenUp, and what `act` raises: LeaseLost, where it finds the lease another's.
        """
        is_retry = False
        while True:
            try:
                with self._engine.begin() as connection:
                    act(connection, is_retry)
            except OperationalError as error:
                if not is_outage(error):
                    raise  # it would be refused again and again
                log.warning("cannot record yet", extra={"error": str(error).splitlines()[0]})
                is_retry = True
                if lease.lost.wait(OUTAGE_PAUSE_SECONDS):
                    raise LeaseGivenUp from None
            else:
                return

    def must_stop(self, lease: Lease) -> bool:
        """Whether a slice is to flush and end now. Raises LeaseGivenUp when it is not ours any more."""
        if lease.lost.is_set():
            raise LeaseGivenUp
        return lease.stop_reason is not None or self.draining.is_set()

    def _settle(self, claimed: ClaimedSlice, write: Callable[[Connection], None]) -> None:
        """Write how a slice ended badly. When Postgres is away, the lease runs out and the reaper does it."""
        try:
            with self._engine.begin() as connection:
                write(connection)
        except LeaseLost:
            self.stale_writes += 1
        except OperationalError:
            log.warning("left to the reaper", extra={"slice_id": claimed.slice_id})

    def _lose(self, lease: Lease) -> Callable[[Connection], None]:
        claimed, seconds = lease.claimed, self.leases.device_seconds(lease)

        def write(connection: Connection) -> None:
            slices.lose(connection, claimed.slice_id, claimed.lease_token, "engine child died", device_seconds=seconds)

        return write

    def _release_failed(self, lease: Lease, error: Exception) -> Callable[[Connection], None]:
        """Give the slice back after a fault that may pass: the store or Postgres away, a bug in one spot."""
        claimed, seconds = lease.claimed, self.leases.device_seconds(lease)
        first_line = (str(error).splitlines() or [type(error).__name__])[0]

        def write(connection: Connection) -> None:
            delay = backoff_seconds(claimed.failures + 1, claimed.slice_id)
            slices.release(
                connection,
                claimed.slice_id,
                claimed.lease_token,
                outcome=AttemptOutcome.FAILED,
                delay_seconds=delay,
                error=first_line,
                traceback=repr(error)[:4000],
                device_seconds=seconds,
            )

        return write
