"""Whether a place that somebody else noted, a local store or a snapshot, is one that the log has.

Promise: `FITS` means that what follows the place in the log follows from the state that was noted there. Everything else says
why not; only a read that fails raises, and a wrong seal key.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from billing import chain
from billing.chain import Chain, UnreadableRecord
from billing.key_ring import Keys
from billing.v1.account_pb2 import Progress
from billing.v1.ledger_pb2 import LedgerRecord

if TYPE_CHECKING:
    from stream_processors.ledger_host import LogReader

__all__ = ["Standing", "find_place"]


class Standing(Enum):
    """How a place relates to the log."""

    FITS = "fits"
    # The log, of that generation, begins behind it: what lies between was deleted.
    TOO_OLD = "too old"
    # The log is of another generation, which does not carry on that one from there.
    OTHER_GENERATION = "other generation"
    # The log, of that generation, does not have that record where it should be.
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class LogPlace:
    """The finding, and for one that fits the offset to read on from."""

    standing: Standing
    next_offset: int = -1


async def find_place(reader: LogReader, topic: str, place: Progress, seal_key: Keys, first: int, end: int) -> LogPlace:
    """Look for `place` in its partition of the log, whose offsets go from `first` to before `end`."""
    stands = place.ledger_offset
    at_place = await _value_at(reader, topic, place.partition, stands) if first <= stands < end else None
    if at_place is not None and chain.record_hash(at_place) == place.record_hash:
        if not chain.is_sealed(at_place, seal_key):
            # What follows would all look forged, and a writer would go on beside the real one.
            raise UnreadableRecord(
                f"offset {stands}, sequence {place.position.sequence}: our own place is sealed with another key; give this "
                "process the installation's seal key (ledger.seal_key), the older ones too"
            )
        return LogPlace(Standing.FITS, stands + 1)
    at_first = await _value_at(reader, topic, place.partition, first) if end > first else None
    if at_first is None:
        return LogPlace(Standing.LOST)
    # The log may have been founded again on exactly this state, or begin right behind it: then its first record says so.
    probe = Chain(place.partition, seal_key, place.position.generation, place.position.sequence, place.record_hash)
    follows = probe.accept(at_first)
    # What was deleted in front keeps its offsets. A record that follows and stands before the place came late to a log that had
    # been cut or made anew: readers that are behind would wait there for offsets that never come.
    if follows is not None and (first > stands or follows.HasField("founding")):
        return LogPlace(Standing.FITS, first)
    if _generation_of(at_first if at_place is None else at_place) != place.position.generation:
        return LogPlace(Standing.OTHER_GENERATION)
    return LogPlace(Standing.TOO_OLD if stands < first else Standing.LOST)


async def _value_at(reader: LogReader, topic: str, partition: int, offset: int) -> bytes | None:
    async for chunk in reader.read(topic, partition, offset, offset + 1):
        if chunk and chunk[0][0] == offset:
            return chunk[0][1]
    return None


def _generation_of(stored: bytes) -> bytes:
    try:
        return LedgerRecord.FromString(stored).generation
    except DecodeError:
        return b""
