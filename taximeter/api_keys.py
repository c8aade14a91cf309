"""API keys as the ledger last stated them, read from their topic: what changes a key needs all of it, its secret's hash too."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from billing.v1.account_pb2 import ApiKey
from producers.follower import TopicFollower
from taximeter.compose import kafka_security, topic_names
from taximeter.errors import NotReadyError, TaximeterError

if TYPE_CHECKING:
    from taximeter.config import Config

__all__ = ["find_key", "read_keys"]

_READ_S: Final = 30.0
# A key that was made a moment ago is in the ledger before it is on the topic.
_PUBLISHED_S: Final = 5.0


def read_keys(config: Config, *, until: str = "") -> dict[str, ApiKey]:
    """All keys, revoked ones too; `until`: a key that is waited for a little. NotReadyError if Kafka does not answer."""
    keys: dict[str, ApiKey] = {}

    def take(key: bytes, value: bytes, _partition: int) -> None:
        if value:
            update = ApiKey.FromString(value)
            keys[update.key_id] = update

    topic = topic_names(config).keys
    follower = TopicFollower(config.kafka.bootstrap, topic, take, security=kafka_security(config.kafka))
    follower.start()
    try:
        if not follower.ready.wait(_READ_S):
            raise NotReadyError(
                f"topic {topic} could not be read from {config.kafka.bootstrap} within {_READ_S:g} s: see `taximeter doctor`"
            )
        deadline = time.monotonic() + _PUBLISHED_S
        while until and until not in keys and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        follower.close()
    return keys


def find_key(config: Config, key_id: str) -> ApiKey:
    """One key. TaximeterError where there is none, or one that is revoked."""
    key = read_keys(config, until=key_id).get(key_id)
    if key is None:
        raise TaximeterError(f"key {key_id!r} is not known: `taximeter key list TENANT` shows a tenant's keys")
    if key.revoked:
        raise TaximeterError(f"key {key_id} is revoked already, and stays so: create another")
    return key
