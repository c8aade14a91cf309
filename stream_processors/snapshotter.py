"""When snapshots of a hosted partition are taken, and the record that announces each.

Promise: the host is held up for as long as it takes to make an iterator and a link for each run; all else happens on another
thread, and a failure there is told, tried again a minute later, and stops nothing. A snapshot is of acknowledged records only,
because the local store is. Once it is durable a tick announces it in the ledger; one that a crash kept from being announced is
as good, by its seal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future

from stream_processors.ledger_host import LedgerHost
from stream_processors.local_store import Captured
from stream_processors.settings import SnapshotSettings
from stream_processors.snapshots import Snapshot, SnapshotStore

__all__ = ["Snapshotter"]

logger = logging.getLogger(__name__)

_AGAIN_MS = 60_000


class Snapshotter:
    """Of one host. `poll` it now and then; `close` it before the host's store is closed."""

    def __init__(
        self,
        host: LedgerHost,
        store: SnapshotStore,
        settings: SnapshotSettings,
        threads: Executor,
        clock_ms: Callable[[], int],
    ) -> None:
        self._host = host
        self._store = store
        self._settings = settings
        self._threads = threads
        self._clock_ms = clock_ms
        self._captured: Captured | None = None
        self._is_closing = False
        # The last one there is, whoever took it.
        self._last: Snapshot | None = None
        self._logged_bytes = host.logged_bytes
        self._not_before_ms = 0
        self._work: Future[Snapshot | None] | None = threads.submit(self._find_last)

    @property
    def last_log_time_ms(self) -> int | None:
        """Up to when the last snapshot has everything; None: there is none that this one knows of."""
        return None if self._last is None else self._last.manifest.log_time_ms

    @property
    def is_busy(self) -> bool:
        """Whether the other thread has something to do for this one."""
        return self._work is not None

    async def poll(self, *, may_start: bool) -> None:
        """Take the next step, if one is due. Raises HostStopped where the host does when the announcement is written."""
        if self._work is None:
            if may_start and self._is_due():
                self._start()
        elif self._work.done():
            await self._finish(self._work)

    def close(self) -> None:
        """Take no more of them. What is under way is given up, and lets go of the store before this returns."""
        self._is_closing = True
        if self._work is not None and not self._work.cancel() and self._captured is not None:
            self._captured.released.wait()
        if self._captured is not None:
            self._captured.release()

    def _find_last(self) -> Snapshot | None:
        return next(iter(self._store.find()), None)

    def _is_due(self) -> bool:
        host, last = self._host, self._last
        now_ms = host.state.log_time_ms
        if not host.owned or host.store.empty or now_ms < self._not_before_ms:
            return False
        if last is None or host.logged_bytes - self._logged_bytes >= self._settings.log_bytes:
            return True
        return not 0 <= now_ms - last.manifest.log_time_ms < self._settings.interval_s * 1000

    def _start(self) -> None:
        try:
            self._captured = captured = self._host.store.capture()
        except OSError as error:
            self._fail(error)
            return
        self._logged_bytes = self._host.logged_bytes
        self._work = self._threads.submit(self._store.write, captured, self._clock_ms(), lambda: self._is_closing)

    async def _finish(self, work: Future[Snapshot | None]) -> None:
        self._work = None
        captured, self._captured = self._captured, None
        try:
            snapshot = work.result()
        except CancelledError:
            return
        except Exception as error:  # noqa: BLE001  the disk's, the bucket's: the ledger goes on
            self._fail(error)
            return
        self._last = snapshot
        if captured is not None and snapshot is not None:
            logger.info("%s: %s is taken, %d bytes", self._host.where, snapshot, snapshot.size_bytes)
            await self._host.announce(snapshot.taken)

    def _fail(self, error: Exception) -> None:
        self._not_before_ms = self._host.state.log_time_ms + _AGAIN_MS
        logger.error("%s: no snapshot was taken (%s); again in %g s", self._host.where, error, _AGAIN_MS / 1000)
