"""A group of the journal: what is committed together, and how long a commit waits for others to join.

While many requests are open, a commit waits a little for more of them to join (as PostgreSQL's commit_delay with its
commit_siblings): a commit costs the processor about the same for one request as for ten, and time that the writer takes is
taken from those who serve. With few open requests nobody waits for anybody.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from producers.receipt import Receipt

__all__ = ["Group", "gather_s"]

# Open requests that may still join a commit, from which on it waits for them: so many times as long as the last commit took of
# the processor, since that began, and no longer than the bound.
_SIBLINGS_MIN: Final = 8
_GATHER_FACTOR: Final = 16
_GATHER_MAX_S: Final = 0.016


class Group:
    """What is committed together. Only its last state of an open request counts, so many updates are one write."""

    __slots__ = ("closed", "count", "event_bytes", "events", "opened", "receipt", "started", "woken")

    def __init__(self) -> None:
        self.events: defaultdict[int, list[bytes]] = defaultdict(list)
        self.opened: dict[int, tuple[int, bytes]] = {}
        self.started: set[int] = set()
        # With the place of the request's event among those of its partition.
        self.closed: dict[int, tuple[int, int]] = {}
        self.count = 0
        self.event_bytes = 0
        self.receipt = Receipt()
        self.woken = False

    @property
    def is_empty(self) -> bool:
        return not (self.count or self.opened or self.closed)


def gather_s(siblings: int, busy_s: float, passed_s: float) -> float:
    """How long a commit waits for others to join: `siblings` may, the last commit took `busy_s` of the processor, and began
    `passed_s` ago."""
    if siblings < _SIBLINGS_MIN:
        return 0.0
    return min(max(0.0, _GATHER_FACTOR * busy_s - passed_s), _GATHER_MAX_S)
