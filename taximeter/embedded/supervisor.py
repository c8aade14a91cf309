"""Several processes as one: started, watched, stopped in order.

Promise: while `watch` runs, a part that ends is started again, after a pause that doubles each time up to a bound and
starts over once the part has lived long enough. A part that other parts stand on (`foundation`) takes them down with
it: they are stopped, the foundation and what prepares it are started again, then they. `stop` ends every part in
order and waits for each, at most its grace; a second signal is not needed. No part outlives this process, however it
ends: see `process.Child`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from taximeter.embedded.process import Child, ChildError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from threading import Event

__all__ = ["Launchable", "Part", "Runnable", "Supervisor"]

_log = logging.getLogger(__name__)

_WATCH_INTERVAL_S: Final = 0.1
_BACK_OFF_FIRST_S: Final = 0.5
_BACK_OFF_MAX_S: Final = 30.0
# A part that lived this long starts over with the shortest pause.
_STEADY_S: Final = 60.0
_ABANDONED_GRACE_S: Final = 2.0
_WORDS_CHARS: Final = 300


class Runnable(Protocol):
    """What can be started and stopped: a process, or a process and what belongs to it."""

    @property
    def alive(self) -> bool: ...
    @property
    def pid(self) -> int: ...
    def start(self) -> None:
        """Start, and return when it is ready; ChildError when it does not become so in time."""
        ...

    def stop(self) -> None: ...


class Launchable(Runnable, Protocol):
    """A Runnable whose start has two halves, so that several become ready side by side."""

    def launch(self) -> None: ...
    def await_ready(self) -> None: ...
    def last_words(self) -> str:
        """How it ended, for a person."""
        ...

    def abandon(self) -> None:
        """Stop it soon: what it stands on has gone, and with it what a clean end would wait for."""
        ...


@dataclass(slots=True)
class Part:
    """A child process and what it takes for it to be ready."""

    child: Child
    ready: Callable[[], bool]
    ready_timeout_s: float
    grace_s: float
    # Where the part says by a file that it is ready: an old one is removed before each start.
    ready_file: Path | None = None

    @property
    def alive(self) -> bool:
        return self.child.alive

    @property
    def pid(self) -> int:
        return self.child.pid

    def start(self) -> None:
        self.launch()
        self.await_ready()

    def launch(self) -> None:
        if self.ready_file is not None:
            self.ready_file.unlink(missing_ok=True)
        self.child.start()

    def await_ready(self) -> None:
        self.child.wait_until(self.ready, self.ready_timeout_s)

    def stop(self) -> None:
        self.child.stop(self.grace_s)

    def last_words(self) -> str:
        last = self.child.log_tail(1).strip()
        return f"exit code {self.child.exit_code}" + (f": {last[:_WORDS_CHARS]}" if last else "")

    def abandon(self) -> None:
        self.child.stop(min(self.grace_s, _ABANDONED_GRACE_S))


@dataclass(slots=True)
class _Health:
    started_s: float = 0.0
    pause_s: float = _BACK_OFF_FIRST_S
    due_s: float | None = None
    restarts: int = 0


@dataclass(slots=True)
class Supervisor:
    """`foundation` (the broker) first, then `prepare` (topics, ledger), then all `parts` side by side."""

    foundation: Runnable
    prepare: Callable[[], None]
    parts: Mapping[str, Launchable]
    stop_order: Sequence[str]
    # Parts that are stopped with the foundation, because what they have open does not survive it.
    standing_on_foundation: frozenset[str]
    on_change: Callable[[], None] = lambda: None
    tell: Callable[[str], None] = lambda _: None
    _health: dict[str, _Health] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert set(self.stop_order) == set(self.parts), "every part stands once in the order in which they stop"

    def start(self) -> None:
        """Everything, in order; ChildError, with everything stopped, when one part does not come up."""
        try:
            self.foundation.start()
            self.prepare()
            self._start_all(list(self.parts))
        except BaseException:
            self.stop()
            raise
        self.on_change()

    def watch(self, ended: Event) -> None:
        """Keep everything running until `ended` is set."""
        while not ended.wait(_WATCH_INTERVAL_S):
            if not self.foundation.alive:
                self._start_over(ended)
                continue
            for name, part in self.parts.items():
                if not part.alive and not ended.is_set():
                    self._restart(name)

    def stop(self) -> None:
        """Every part in order, the foundation last."""
        for name in self.stop_order:
            self.parts[name].stop()
        self.foundation.stop()

    def pids(self) -> dict[str, int]:
        """The process of each part that runs."""
        running = {name: part.pid for name, part in self.parts.items() if part.alive}
        if self.foundation.alive:
            running["broker"] = self.foundation.pid
        return running

    def restarts(self) -> dict[str, int]:
        """How often each part was started again."""
        return {name: health.restarts for name, health in self._health.items() if health.restarts}

    def _start_all(self, names: Sequence[str]) -> None:
        for name in names:
            self.parts[name].launch()
        for name in names:
            self.parts[name].await_ready()
            self._note_start(name)

    def _note_start(self, name: str) -> None:
        health = self._health.setdefault(name, _Health())
        health.started_s = time.monotonic()
        health.due_s = None

    def _restart(self, name: str) -> None:
        health = self._health.setdefault(name, _Health())
        now_s = time.monotonic()
        if health.due_s is None:
            if now_s - health.started_s >= _STEADY_S:
                health.pause_s = _BACK_OFF_FIRST_S
            health.due_s = now_s + health.pause_s
            self.tell(f"{name} ended ({self.parts[name].last_words()}); starting it again in {health.pause_s:g} s")
            health.pause_s = min(health.pause_s * 2, _BACK_OFF_MAX_S)
            return
        if now_s < health.due_s:
            return
        health.restarts += 1
        try:
            self.parts[name].start()
        except ChildError as error:
            _log.warning("%s did not come up: %s", name, error)
            health.started_s = time.monotonic()
            health.due_s = None
            return
        self._note_start(name)
        self.tell(f"{name} runs again")
        self.on_change()

    def _start_over(self, ended: Event) -> None:
        """The foundation has gone, with all that it held in memory."""
        self.tell("the broker ended; starting it again, and a new generation of the ledger on the local state")
        for name in self.stop_order:
            if name in self.standing_on_foundation:
                self.parts[name].abandon()
        pause_s = _BACK_OFF_FIRST_S
        while not ended.wait(pause_s):
            try:
                self.foundation.start()
                self.prepare()
                self._start_all([name for name in self.parts if name in self.standing_on_foundation])
            except ChildError as error:
                _log.warning("the broker did not come up: %s", error)
                for name in self.stop_order:
                    if name in self.standing_on_foundation:
                        self.parts[name].abandon()
                self.foundation.stop()
                pause_s = min(pause_s * 2, _BACK_OFF_MAX_S)
            else:
                self.tell("the broker runs again")
                self.on_change()
                return
