"""A group of the journal: what is committed together, and how long a commit waits for others to join.

A commit costs the processor about the same for one request as for ten, and time that the writer takes is taken from those who
serve. So while this process is busy and commits have several requests each, the next one waits a little for more to join (as
PostgreSQL's commit_delay does, which asks how many are open: here it is how many came). Where few come, or the processor has
time, nobody waits for anybody: there a wait would bring the next one, as more come the longer it is.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Final

from producers.receipt import Receipt

__all__ = ["Busy", "Group", "gather_s"]

# Requests of a commit from which on the next one waits: for each of them so many times as long as the commit took of the
# processor, since that began, and no longer than the bound. So a wait that brings nobody is the last one.
_JOINED_MIN: Final = 2
_GATHER_FACTOR: Final = 8
_GATHER_MAX_S: Final = 0.016
# Of a core, by all threads of this process, from which on it is busy. Python runs one of them at a time, so that one core is
# about all that it can have; at half of the requests that it can serve it needs half.
_BUSY_MIN: Final = 0.75
_BUSY_WINDOW_S: Final = 0.1


class Busy:
    """Whether this process had little time to spare in the last window that is over."""

    __slots__ = ("_began_s", "_cpu_s", "now")

    def __init__(self) -> None:
        self.now = False
        self._began_s = self._cpu_s = 0.0

    def look(self, now_s: float, cpu_s: float) -> bool:
        """At a commit: by the clock, and by what this process has had of the processor since it began."""
        passed_s = now_s - self._began_s
        if passed_s >= _BUSY_WINDOW_S:
            self.now = cpu_s - self._cpu_s >= _BUSY_MIN * passed_s
            self._began_s, self._cpu_s = now_s, cpu_s
        return self.now


class Group:
    """What is committed together. Only its last state of an open request counts, so many updates are one write."""

    __slots__ = ("closed", "count", "event_bytes", "events", "opened", "receipt", "started", "woken", "woken_by")

    def __init__(self, hurry: Callable[[Group], None] | None = None) -> None:
        """`hurry`: has the writer told of it now."""
        self.events: defaultdict[int, list[bytes]] = defaultdict(list)
        self.opened: dict[int, tuple[int, bytes]] = {}
        self.started: set[int] = set()
        # With the place of the request's event among those of its partition.
        self.closed: dict[int, tuple[int, int]] = {}
        self.count = 0
        self.event_bytes = 0
        self.receipt = Receipt(None if hurry is None else partial(hurry, self))
        # Whether the writer has been told, or else which event loop is about to.
        self.woken = False
        self.woken_by: asyncio.AbstractEventLoop | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.count or self.opened or self.closed)


def gather_s(joined: int, busy_s: float, passed_s: float) -> float:
    """How long a commit waits for others to join: the last one was of so many requests, took `busy_s` of the processor, and
    began `passed_s` ago."""
    if joined < _JOINED_MIN:
        return 0.0
    return max(0.0, min(_GATHER_FACTOR * joined * busy_s, _GATHER_MAX_S) - passed_s)
