"""A sink's place in one partition of the ledger: which records are the next ones, and in which generation.

Promise: records are accepted by the chain's rule alone. A generation that carries on exactly where this sink stands is entered;
one that carries on from elsewhere is a LedgerGap that names both places. Generations get their ordinal here, one after the
other, so the same log always gives the same versions.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import DecodeError

from billing.chain import Chain, is_sealed
from billing.key_ring import Keys
from billing.v1.account_pb2 import LedgerPosition
from billing.v1.ledger_pb2 import Founding, LedgerRecord
from sinks.columns import NO_OFFSET, Accepted
from sinks.engine import Engine
from sinks.erasing import erase_pending
from sinks.errors import LedgerGap
from sinks.writer import Position, Writer

__all__ = ["Follower", "describe", "feed", "gap", "generation_of"]

_FEED_BYTES_MAX = 8_000_000


class Follower:
    """Accepts one partition's records from `position` on, or from a founding record where there is none.

    `accept_gap`: an empty database may begin at a founding record that carries on a predecessor; what was before is then
    missing here for good, and `audit` says so.
    """

    def __init__(self, partition: int, position: Position | None, seal_key: Keys | None, *, accept_gap: bool = False) -> None:
        self._chain = Chain(partition, seal_key)
        self._ordinal = 0
        self._accept_gap = accept_gap
        if position is not None:
            self._chain.generation = position.generation
            self._chain.sequence = position.sequence
            self._chain.record_hash = position.record_hash
            self._ordinal = position.generation_ordinal

    @property
    def partition(self) -> int:
        return self._chain.partition

    @property
    def generation(self) -> bytes:
        """Empty before the first record."""
        return self._chain.generation

    @property
    def sequence(self) -> int:
        return self._chain.sequence

    @property
    def record_hash(self) -> bytes:
        return self._chain.record_hash

    @property
    def ignored(self) -> int:
        """Records that were not ours to accept: a zombie's, repeats, another fork's."""
        return self._chain.ignored

    @property
    def refused(self) -> int:
        """Of those, what the ledger's key did not seal."""
        return self._chain.refused

    @property
    def refusal(self) -> str:
        """Why the last record was refused, if it was for its seal."""
        return self._chain.refusal

    def is_own(self, stored: bytes) -> bool:
        """Whether one of this sink's keys sealed it; a sink without keys takes it as it is."""
        return self._chain.seal_key is None or is_sealed(stored, self._chain.seal_key)

    def __str__(self) -> str:
        return describe(self._chain.generation, self._chain.sequence)

    def accept(self, stored: bytes, ledger_offset: int = NO_OFFSET) -> Accepted | None:
        """The record if it is the next one. Raises UnreadableRecord, and LedgerGap (see above)."""
        before = self._chain.generation
        if not before and not self._accept_gap:
            self._refuse_gap(stored)
        record = self._chain.accept(stored)
        if record is None:
            return None
        if record.generation != before:
            self._ordinal += 1
        return Accepted(record, stored, self._chain.record_hash, self._ordinal, ledger_offset)

    def _refuse_gap(self, stored: bytes) -> None:
        founding = _founding(stored)
        if founding is not None and founding.HasField("predecessor"):
            raise gap(self.partition, "nothing", founding.predecessor)


def gap(partition: int, position: str, predecessor: LedgerPosition) -> LedgerGap:
    """The error for a log that carries on from where this sink is not."""
    needed = describe(predecessor.generation, predecessor.sequence)
    return LedgerGap(
        f"usage.ledger[{partition}]: the log carries on from {needed}, this database stands at {position}; hand over the "
        "records in between (the ledger worker's local copy has them, `taximeter up` does it), or restore a backup",
        partition=partition,
        position=position,
        needed=needed,
    )


def describe(generation: bytes, sequence: int) -> str:
    """A ledger position for people."""
    return f"generation {generation.hex()[:12]}, sequence {sequence}" if generation else "nothing"


def generation_of(stored: bytes) -> bytes:
    """The generation that a record says it is of."""
    return LedgerRecord.FromString(stored).generation


def _founding(stored: bytes) -> Founding | None:
    try:
        record = LedgerRecord.FromString(stored)
    except DecodeError:
        # The chain says what it is.
        return None
    return record.founding if record.WhichOneof("source") == "founding" else None


def feed(
    engine: Engine,
    records: Iterable[bytes],
    seal_key: Keys | None,
    *,
    usage_topic: str = "usage.events",
    accept_gap: bool = False,
) -> dict[int, Position]:
    """Write records that are handed over, not read from Kafka; returns the positions after them.

    They may begin before this database's position and be of several partitions; what does not link is left out, so whether a
    gap is closed is seen from the positions. No other writer may be running.
    """
    writer = Writer(engine, usage_topic=usage_topic, seal_keys=seal_key)
    positions = writer.positions()
    followers: dict[int, Follower] = {}
    batch: list[Accepted] = []
    size = 0
    for stored in records:
        partition = LedgerRecord.FromString(stored).partition
        follower = followers.get(partition)
        if follower is None:
            follower = Follower(partition, positions.get(partition), seal_key, accept_gap=accept_gap)
            followers[partition] = follower
        accepted = follower.accept(stored)
        if accepted is not None:
            batch.append(accepted)
            size += len(stored)
        if size >= _FEED_BYTES_MAX:
            positions |= writer.write(batch)
            batch, size = [], 0
    positions |= writer.write(batch)
    if seal_key is not None and writer.erasing_due:
        erase_pending(engine, seal_key, usage_topic=usage_topic)
    return positions
