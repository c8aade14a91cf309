"""A group of the journal: what is committed together, and how long a commit waits for others to join.

While several requests are under way, a commit waits a little for more of them to join (as PostgreSQL's commit_delay with its
commit_siblings): a commit costs the processor about the same for one request as for ten, and time that the writer takes is
taken from those who serve. With few of them nobody waits for anybody.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Final

from producers.receipt import Receipt

__all__ = ["Group", "gather_s"]

# Requests under way from which on a commit waits for them: for each of them so many times as long as the last commit took of
# the processor, since that began, and no longer than the bound.
_UNDER_WAY_MIN: Final = 4
_GATHER_FACTOR: Final = 4
GATHER_MAX_S: Final = 0.008
# A round of an event loop that takes longer had something to do.
BUSY_S: Final = 0.000_1


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


def gather_s(under_way: int, busy_s: float, passed_s: float) -> float:
    """How long a commit waits for others to join: so many requests are under way, the last commit took `busy_s` of the
    processor, and began `passed_s` ago."""
    if under_way < _UNDER_WAY_MIN:
        return 0.0
    return max(0.0, min(_GATHER_FACTOR * under_way * busy_s, GATHER_MAX_S) - passed_s)
