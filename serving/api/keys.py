"""The keys of an installation as the ledger last stated them, followed from their topic: a revoked key opens nothing from the
moment at which its message is read, a fraction of a second after the ledger.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from billing.v1.account_pb2 import ApiKey
from producers.follower import TopicFollower
from serving.gateway.directory import Directory

if TYPE_CHECKING:
    from serving.api.settings import KeySource

__all__ = ["Keys"]

_LOOK_S: Final = 0.02


class Keys:
    """`follow` once, `close` once. Tests and benchmarks may hand messages to `take` instead."""

    def __init__(self, partitions: int) -> None:
        self.directory = Directory(partitions)
        self.ready = False
        self._stated: dict[str, ApiKey] = {}
        self._follower: TopicFollower | None = None

    def take(self, key: bytes, value: bytes, partition: int) -> None:
        """A message of `billing.keys`."""
        self.directory.on_key(key, value, partition)
        try:
            stated = ApiKey.FromString(value)
        except DecodeError:
            return
        if stated.key_id:
            self._stated[stated.key_id] = stated

    def find(self, key_id: str) -> ApiKey | None:
        """Everything that is known of a key but its secret."""
        return self._stated.get(key_id)

    def wait_for(self, key_id: str, timeout_s: float) -> ApiKey | None:
        """The key, as soon as it is known: the ledger has one a moment before its topic."""
        deadline_s = time.monotonic() + timeout_s
        while (found := self.find(key_id)) is None and time.monotonic() < deadline_s:
            time.sleep(_LOOK_S)
        return found

    def follow(self, source: KeySource) -> None:
        """Read the topic from its beginning, and go on. Raises TimeoutError if it cannot be read in time."""
        self._follower = TopicFollower(source.bootstrap, source.topic, self.take, security=source.security)
        self._follower.start()
        if not self._follower.ready.wait(source.ready_timeout_s):
            raise TimeoutError(
                f"topic {source.topic} could not be read from {source.bootstrap} within {source.ready_timeout_s:g} s: "
                "see that Kafka is there and the topic exists"
            )
        self.ready = True

    def behind_s(self) -> float:
        """For how long it has not been at the topic's end; 0: it is there, or follows none."""
        return 0.0 if self._follower is None else self._follower.behind_s()

    def close(self) -> None:
        self.ready = False
        if self._follower is not None:
            self._follower.close()
