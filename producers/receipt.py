"""A receipt: the promise that everything recorded together in one group is on disk.

All events of a group share one receipt, so a caller's cost is a reference. A waiting thread waits on one event; a waiting
coroutine costs a future, and a group wakes each event loop once, whatever the number of coroutines that wait in it.
"""

from __future__ import annotations

import asyncio
import threading

from producers.errors import JournalError, NotDurableInTime

__all__ = ["Receipt"]

_Waiters = list[asyncio.Future[None]]


class Receipt:
    """Says when a group is durable, or why it is not. Safe to use from any thread and any event loop."""

    __slots__ = ("_error", "_finished", "_lock", "_loops")

    def __init__(self) -> None:
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._error: JournalError | None = None
        self._loops: dict[asyncio.AbstractEventLoop, _Waiters] = {}

    @property
    def is_durable(self) -> bool:
        """Whether it is on disk by now, without waiting."""
        return self._finished.is_set() and self._error is None

    @property
    def has_failed(self) -> bool:
        """Whether the group was refused: it is not durable and never will be."""
        return self._finished.is_set() and self._error is not None

    def durable(self, timeout_s: float = 30.0) -> None:
        """Block until it is on disk. Raises the journal's error where the group failed, or `NotDurableInTime`."""
        if not self._finished.wait(timeout_s):
            raise self._late(timeout_s)
        self._raise_if_failed()

    async def wait(self, timeout_s: float = 30.0) -> None:
        """The same for a coroutine. Cancelling one waiter leaves the others and the group as they are."""
        if not self._finished.is_set():
            loop = asyncio.get_running_loop()
            with self._lock:
                future: asyncio.Future[None] | None = None
                if not self._finished.is_set():
                    future = loop.create_future()
                    self._loops.setdefault(loop, []).append(future)
            if future is not None:
                try:
                    async with asyncio.timeout(timeout_s):
                        await future
                except TimeoutError:
                    raise self._late(timeout_s) from None
        self._raise_if_failed()

    def settle(self, error: JournalError | None) -> None:
        """The writer's part: called once, after the commit or its failure."""
        with self._lock:
            assert not self._finished.is_set(), "a group is settled once"
            self._error = error
            self._finished.set()
        for loop, waiters in self._loops.items():
            try:
                loop.call_soon_threadsafe(_wake, waiters)
            except RuntimeError:
                # The loop was closed while its coroutines waited: nobody is left there to tell.
                continue

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            # A new one for each caller: a shared exception would collect the tracebacks of all.
            raise type(self._error)(*self._error.args) from self._error.__cause__

    @staticmethod
    def _late(timeout_s: float) -> NotDurableInTime:
        return NotDurableInTime(
            f"timeout_s={timeout_s:g}: the journal's disk has not confirmed the events yet; whether they are kept is unknown. "
            f"Look at the disk under the journal, or allow it more time"
        )


def _wake(waiters: _Waiters) -> None:
    for future in waiters:
        if not future.done():
            future.set_result(None)
