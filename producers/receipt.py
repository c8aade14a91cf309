"""A receipt: the promise that everything recorded together in one group is on disk.

All events of a group share one receipt, so a caller's cost is a reference. A waiting thread waits on one event; a waiting
coroutine costs a future, and a group wakes each event loop once, whatever the number of coroutines that wait in it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from producers.errors import JournalError, NotDurableInTime

__all__ = ["SETTLED", "Receipt"]


class _Waiters:
    """The coroutines of one event loop that wait for one group: one call wakes them all, and one timer watches over them."""

    __slots__ = ("_due", "_entries", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._entries: list[tuple[float, float, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def add(self, timeout_s: float) -> asyncio.Future[None]:
        """In the loop: what is done when the group is, or fails when the time is over."""
        due = self._loop.time() + timeout_s
        future = self._loop.create_future()
        self._entries.append((due, timeout_s, future))
        if self._timer is None or due < self._due:
            self._watch(due)
        return future

    def _watch(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        late = [entry for entry in self._entries if entry[0] <= now]
        self._entries = [entry for entry in self._entries if entry[0] > now]
        for _, timeout_s, future in late:
            if not future.done():
                future.set_exception(_late(timeout_s))
        if self._entries:
            self._watch(min(due for due, _, _ in self._entries))

    def wake(self) -> None:
        """In the loop: the group is settled."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for _, _, future in self._entries:
            if not future.done():
                future.set_result(None)
        self._entries.clear()


class Receipt:
    """Says when a group is durable, or why it is not. Safe to use from any thread and any event loop."""

    __slots__ = ("_blocked", "_error", "_finished", "_hurry", "_lock", "_loops")

    def __init__(self, hurry: Callable[[], None] | None = None) -> None:
        """`hurry`: has the group committed now, if it waits for its event loop."""
        self._hurry = hurry
        # Read without the lock: it is set once, after the error.
        self._finished = False
        # Made where a thread blocks; most that wait are coroutines.
        self._blocked: threading.Event | None = None
        self._lock = threading.Lock()
        self._error: JournalError | None = None
        self._loops: dict[asyncio.AbstractEventLoop, _Waiters] = {}

    @property
    def is_durable(self) -> bool:
        """Whether it is on disk by now, without waiting."""
        return self._finished and self._error is None

    @property
    def has_failed(self) -> bool:
        """Whether the group was refused: it is not durable and never will be."""
        return self._finished and self._error is not None

    def durable(self, timeout_s: float = 30.0) -> None:
        """Block until it is on disk. Raises the journal's error where the group failed, or `NotDurableInTime`."""
        if not self._finished:
            hurry = self._hurry
            if hurry is not None:
                # The loop that would have it committed may be this thread's.
                hurry()
            if not self._block(timeout_s):
                raise _late(timeout_s)
        self._raise_if_failed()

    def _block(self, timeout_s: float) -> bool:
        with self._lock:
            if self._finished:
                return True
            if self._blocked is None:
                self._blocked = threading.Event()
            blocked = self._blocked
        return blocked.wait(timeout_s)

    async def wait(self, timeout_s: float = 30.0) -> None:
        """The same for a coroutine. Cancelling one waiter leaves the others and the group as they are."""
        if not self._finished:
            loop = asyncio.get_running_loop()
            with self._lock:
                future: asyncio.Future[None] | None = None
                if not self._finished:
                    waiters = self._loops.get(loop)
                    if waiters is None:
                        waiters = self._loops[loop] = _Waiters(loop)
                    future = waiters.add(timeout_s)
            if future is not None:
                await future
        self._raise_if_failed()

    def settle(self, error: JournalError | None) -> None:
        """The writer's part: called once, after the commit or its failure."""
        with self._lock:
            assert not self._finished, "a group is settled once"
            self._error = error
            self._finished = True
            if self._blocked is not None:
                self._blocked.set()
        self._hurry = None
        for loop, waiters in self._loops.items():
            try:
                loop.call_soon_threadsafe(waiters.wake)
            except RuntimeError:
                # The loop was closed while its coroutines waited: nobody is left there to tell.
                continue

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            # A new one for each caller: a shared exception would collect the tracebacks of all.
            raise type(self._error)(*self._error.args) from self._error.__cause__


def _settled() -> Receipt:
    receipt = Receipt()
    receipt.settle(None)
    return receipt


# Of what waits for nothing.
SETTLED = _settled()


def _late(timeout_s: float) -> NotDurableInTime:
    return NotDurableInTime(
        f"timeout_s={timeout_s:g}: the journal's disk has not confirmed the events yet; whether they are kept is unknown. "
        f"Look at the disk under the journal, or allow it more time"
    )
