"""A group of the journal: what is committed together, and how long a commit waits for others to join.

A commit costs the processor about the same for one request as for ten, and time that the writer takes is taken from those who
serve. So while commits have several requests each, the next one waits a little for more to join (as PostgreSQL's commit_delay
does, which asks how many are open: here it is how many came). Where few come, nobody waits for anybody.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Final

from producers.receipt import Receipt

__all__ = ["Group", "gather_s"]

# Requests of a commit from which on the next one waits: for each of them so many times as long as the commit took of the
# processor, since that began, and no longer than the bound. So a wait that brings nobody is the last one.
_JOINED_MIN: Final = 2
_GATHER_FACTOR: Final = 8
_GATHER_MAX_S: Final = 0.016


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
