"""An event loop whose time is virtual and whose order is a seed's, and processes that can be killed and stopped in it.

Promise: the same seed and the same code run the same callbacks in the same order. Any callback that is ready may run next, so
tasks interleave in every way that asyncio's rules allow and in some that its queue never shows. A killed process runs nothing
more, not even its `finally`; a stopped one runs nothing until it goes on, while the world does.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

from stream_processors.errors import WorkerError

__all__ = ["PROCESS", "Killed", "Process", "SimLoop", "Violation"]


class Violation(Exception):
    """Something that must hold did not."""


class Killed(BaseException):
    """Raised inside of a process that dies in the middle of a callback, so that the rest of the callback does not happen."""


class Process:
    """What dies and stops as one. Its tasks are told by their context, which children inherit."""

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.alive = True
        self.paused = False
        self.skew_ms = 0
        # Callbacks until it is killed; none: it lives on.
        self.fuse: int | None = None
        # Writes to disk until it is killed in the middle of one.
        self.disk_fuse: int | None = None
        self.on_end: list[Callable[[], None]] = []
        self.on_resume: list[Callable[[], None]] = []
        self.held: list[asyncio.Handle] = []

    def start(self, main: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        context = self.loop.outside.copy()
        context.run(PROCESS.set, self)
        return self.loop.create_task(main, context=context)

    def kill(self) -> None:
        """kill -9."""
        if not self.alive:
            return
        self.alive = False
        self.held.clear()
        for call in self.on_end:
            call()

    def die(self) -> None:
        """Kill the process that is running just now, here."""
        self.kill()
        raise Killed(self.name)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        if not self.paused:
            return
        self.paused = False
        held, self.held = self.held, []
        self.loop.add(held)
        waiting, self.on_resume = self.on_resume, []
        for call in waiting:
            call()

    def write_to_disk(self) -> bool:
        """Whether the next write reaches the disk; a fuse that burns down kills before or after it."""
        if not self.alive:
            return False
        if self.disk_fuse is not None:
            self.disk_fuse -= 1
            if self.disk_fuse < 0:
                self.die()
        return True


PROCESS: ContextVar[Process | None] = ContextVar("PROCESS", default=None)


class SimLoop(asyncio.BaseEventLoop):
    """No selector, no clock. `steps_max` bounds a run: what needs more spins."""

    def __init__(self, choices: random.Random, *, steps_max: int) -> None:
        super().__init__()
        self._draw = choices.getrandbits
        self._now_s = 0.0
        self._steps_max = steps_max
        self._ready: list[asyncio.Handle] = []
        self.outside: Context = copy_context()
        self.steps = 0
        self.violation: Violation | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]
        self.set_exception_handler(self._on_exception)

    def time(self) -> float:
        return self._now_s

    def add(self, handles: list[asyncio.Handle]) -> None:
        self._ready.extend(handles)

    def fail(self, what: str) -> None:
        """Note the first violation; the run ends before the next callback. Code under test cannot swallow it."""
        if self.violation is None:
            self.violation = Violation(f"at {self._now_s:.3f} s: {what}")

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]
        if not ready:
            while scheduled and scheduled[0]._cancelled:
                heapq.heappop(scheduled)._scheduled = False
            if not scheduled:
                raise Violation(f"at {self._now_s:.3f} s: nothing can happen any more")
            self._now_s = max(self._now_s, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._now_s:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            ready.append(handle)
        # `choices.randrange(len(ready))`, without what it checks first: this is the simulator's innermost line.
        count = len(ready)
        bits = count.bit_length()
        place = self._draw(bits)
        while place >= count:
            place = self._draw(bits)
        handle = ready.pop(place)
        if handle._cancelled:
            return
        process = handle._context.get(PROCESS)  # type: ignore[attr-defined]
        if process is not None:
            if not process.alive:
                return
            if process.paused:
                process.held.append(handle)
                return
            if process.fuse is not None:
                process.fuse -= 1
                if process.fuse < 0:
                    process.kill()
                    return
        self.steps += 1
        if self.steps > self._steps_max:
            self.fail(f"{self.steps} callbacks ran: something spins")
        handle._run()
        if self.violation is not None:
            raise self.violation

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are dropped when they come up."""

    def _write_to_self(self) -> None:
        """Nobody sleeps in a selector."""

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], context: Context | None = None
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, context=context)
        # The tasks of a killed process must stay as they are: to collect them would run their `finally`.
        self._tasks.append(task)
        return task

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "never retrieved" not in context["message"] and error is not None and not isinstance(error, Killed):
            self.fail(f"{context['message']}: {error!r}")

    def failures(self) -> list[BaseException]:
        """What ended tasks with an error that is no kill, a cancellation or a worker's own reason to end."""
        ended = [task.exception() for task in self._tasks if task.done() and not task.cancelled()]
        expected = (Killed, WorkerError, BaseExceptionGroup)
        return [error for error in ended if error is not None and not isinstance(error, expected)]

    def dispose(self) -> None:
        """Let go of what killed processes left, without a warning."""
        for task in self._tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            if task.done():
                if not task.cancelled():
                    task.exception()
            else:
                coroutine = task.get_coro()
                with contextlib.suppress(BaseException):
                    coroutine.close()
        self._tasks.clear()
        self._ready.clear()
        self._scheduled.clear()  # type: ignore[attr-defined]
        self.close()
