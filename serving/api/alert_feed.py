"""Alerts as their topic tells them, kept in memory for those who watch.

Promise: a watch gets every alert that is told after the place at which it stands, once, whatever the topic repeats: each
partition's in its order. What is kept has a bound; whoever stands before what had to go is told so.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from google.protobuf.message import DecodeError

from billing.v1.alert_pb2 import Alert
from producers.alerts import AlertCursor
from producers.follower import TopicFollower

if TYPE_CHECKING:
    from serving.api.settings import AlertSource

__all__ = ["AlertFeed", "Told"]

_KEPT_BYTES_MAX: Final = 64 << 20
_RETENTION_MS: Final = 90 * 86_400_000


class Told(NamedTuple):
    """One message of the topic."""

    partition: int
    alert: Alert


@dataclass(frozen=True, slots=True)
class _Kept:
    told: Told
    size: int


class AlertFeed:
    """`follow` once, `close` once. Tests and benchmarks may hand messages to `take` instead."""

    def __init__(self, *, bytes_max: int = _KEPT_BYTES_MAX) -> None:
        self.retention_ms = _RETENTION_MS
        # Somebody hands messages to `take`.
        self.is_fed = False
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._kept: deque[_Kept] = deque()
        self._kept_bytes = 0
        # Of the first that is kept, counted from the first that came.
        self._first = 0
        self._end = AlertCursor()
        # By partition, the last one that had to go.
        self._gone: dict[int, Alert] = {}
        self._follower: TopicFollower | None = None

    @property
    def ready(self) -> bool:
        """Whether everything is here that the topic held at the start."""
        return self.is_fed or (self._follower is not None and self._follower.ready.is_set())

    def take(self, _: bytes, value: bytes, partition: int) -> None:
        """A message of `billing.alerts`."""
        try:
            alert = Alert.FromString(value)
        except DecodeError:
            # Somebody else wrote it: there is no alert in it to miss.
            return
        with self._lock:
            if not self._end.is_new(alert, partition):
                return
            self._end.move(alert, partition)
            self._kept.append(_Kept(Told(partition, alert), len(value)))
            self._kept_bytes += len(value)
            while self._kept_bytes > self._bytes_max and len(self._kept) > 1:
                gone = self._kept.popleft()
                self._kept_bytes -= gone.size
                self._gone[gone.told.partition] = gone.told.alert
                self._first += 1

    def end(self) -> tuple[AlertCursor, int]:
        """Behind everything that was told: the cursor, and the number of the next."""
        with self._lock:
            return AlertCursor(str(self._end)), self._first + len(self._kept)

    def since(self, number: int, count_max: int) -> tuple[list[Told], int]:
        """What is kept from this number on, at most so many, and the number of the next. Ask `has_lost` as well."""
        with self._lock:
            begin = max(0, number - self._first)
            found = [each.told for each in islice(self._kept, begin, begin + count_max)]
            return found, self._first + begin + len(found)

    def has_lost(self, cursor: AlertCursor, partitions: Iterable[int] | None) -> bool:
        """Whether something behind the cursor had to go; in these partitions, or in all."""
        with self._lock:
            wanted = self._gone if partitions is None else {each for each in partitions if each in self._gone}
            return any(cursor.is_new(self._gone[each], each) for each in wanted)

    def follow(self, source: AlertSource) -> bool:
        """Read the topic from its beginning, and go on. False: it is not read to its end within the source's time."""
        self._follower = TopicFollower(source.bootstrap, source.topic, self.take, security=source.security)
        self.retention_ms = source.retention_ms
        self._follower.start()
        return self._follower.ready.wait(source.ready_timeout_s)

    def behind_s(self) -> float:
        """For how long it has not been at the topic's end; 0: it is there, or follows none."""
        return 0.0 if self._follower is None else self._follower.behind_s()

    def close(self) -> None:
        if self._follower is not None:
            self._follower.close()
