"""Follows alerts on the Kafka topic `billing.alerts`: what is told, in the order of each partition, each once.

Promise: `on_alert` is called for every alert message that the topic holds and that comes, in each partition's order, on the
follower's own thread, with the cursor behind it. Whoever keeps that cursor after the alert was dealt with, and gives it at
the next start, gets what came after it: nothing is missing, and nothing comes again, though the publisher may have written a
message twice and the topic is read from its beginning after every lost connection. What its retention removed does not come.

An `on_alert` that raises is not called for what follows: the follower is `failed`, and the cursor stays before that alert.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from google.protobuf.message import DecodeError

from billing.v1.alert_pb2 import Alert
from producers.follower import TopicFollower

__all__ = ["AlertCursor", "AlertFollower"]


class _Place(NamedTuple):
    """The last alert of a partition. Sequences order a generation; log time, which never goes back, orders generations."""

    generation: str
    told_ms: int
    sequence: int
    number: int


class AlertCursor:
    """How far somebody has followed. Its text is opaque to whoever keeps it."""

    def __init__(self, text: str = "") -> None:
        """The cursor of which `text` was made; empty: at the beginning. Raises ValueError."""
        self._places: dict[int, _Place] = {}
        if not text:
            return
        try:
            said = json.loads(base64.urlsafe_b64decode(text.encode()))
            for partition, (generation, told_ms, sequence, number) in said.items():
                self._places[int(partition)] = _Place(str(generation), int(told_ms), int(sequence), int(number))
        except (ValueError, TypeError, AttributeError, binascii.Error) as error:
            raise ValueError(f"cursor: {text[:40]!r} is none; give one that came with an alert, or nothing") from error

    def __str__(self) -> str:
        said = {str(partition): list(place) for partition, place in sorted(self._places.items())}
        return base64.urlsafe_b64encode(json.dumps(said, separators=(",", ":")).encode()).decode()

    def of(self, partitions: Iterable[int]) -> AlertCursor:
        """The same, of these partitions alone."""
        part = AlertCursor()
        part._places = {each: self._places[each] for each in partitions if each in self._places}
        return part

    def is_new(self, alert: Alert, partition: int) -> bool:
        """Whether the alert lies behind the cursor."""
        last = self._places.get(partition)
        if last is None:
            return True
        if alert.position.generation.hex() == last.generation:
            return (alert.position.sequence, alert.index) > (last.sequence, last.number)
        return alert.told_ms > last.told_ms

    def move(self, alert: Alert, partition: int) -> None:
        """The alert was dealt with."""
        position = alert.position
        self._places[partition] = _Place(position.generation.hex(), alert.told_ms, position.sequence, alert.index)


class AlertFollower:
    """One thread. `start` once, `close` once."""

    def __init__(
        self,
        bootstrap: str,
        on_alert: Callable[[Alert, str], None],
        *,
        topic: str = "billing.alerts",
        after: str = "",
        security: Mapping[str, str] | None = None,
    ) -> None:
        """`on_alert` takes an alert and the cursor behind it; `after` is the last one that was kept. Raises ValueError."""
        self.failed = threading.Event()
        self.unreadable = 0
        self._on_alert = on_alert
        self._cursor = AlertCursor(after)
        self._follower = TopicFollower(bootstrap, topic, self._take, security=security)

    @property
    def ready(self) -> threading.Event:
        """Set when all that was there at the start has been read."""
        return self._follower.ready

    def behind_s(self) -> float:
        """For how long it has not been at the topic's end; 0: it is there."""
        return self._follower.behind_s()

    def start(self) -> None:
        self._follower.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop. Raises `TimeoutError` if an `on_alert` does not return in time."""
        self._follower.close(timeout_s)

    def _take(self, _: bytes, value: bytes, partition: int) -> None:
        if self.failed.is_set():
            return
        try:
            alert = Alert.FromString(value)
        except DecodeError:
            self.unreadable += 1
            return
        if not self._cursor.is_new(alert, partition):
            return
        behind = AlertCursor(str(self._cursor))
        behind.move(alert, partition)
        try:
            self._on_alert(alert, str(behind))
        except BaseException:
            self.failed.set()
            raise
        self._cursor = behind
