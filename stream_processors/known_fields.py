"""Which fields of the ledger's contracts this version knows: what a newer one wrote must not be gone on from by an older one.

Promise: a worker that would lose a part of the state, because it does not know where it stands, says so and does not start. A
reader that only shows what the ledger says may pass over what it does not know; who writes the next record may not.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from billing.v1.ledger_pb2 import LedgerRecord

__all__ = ["is_known", "known_fields", "packed_fields", "unknown_bytes", "unpack_fields"]


@functools.cache
def known_fields() -> frozenset[str]:
    """Message and number of every field that a ledger record can hold, at whatever depth."""
    seen: set[str] = set()

    def below(message: Descriptor) -> Iterator[str]:
        if message.full_name in seen:
            return
        seen.add(message.full_name)
        for field in message.fields:
            yield f"{message.full_name}.{field.number}"
            if field.message_type is not None:
                yield from below(field.message_type)

    return frozenset(below(LedgerRecord.DESCRIPTOR))


@functools.cache
def packed_fields() -> bytes:
    """Those of this version, for whoever keeps them beside what it writes."""
    return zlib.compress("\n".join(sorted(known_fields())).encode())


def unpack_fields(packed: bytes) -> frozenset[str]:
    """What `packed_fields` gave, here or in another version."""
    return frozenset(zlib.decompress(packed).decode().split("\n"))


def is_known(record: LedgerRecord, stored: bytes) -> bool:
    """Whether this version knows every field of `record`, whose stored bytes these are."""
    known = LedgerRecord.FromString(stored)
    known.DiscardUnknownFields()
    # The size is the quick answer. Another encoding of the same may have another.
    return known.ByteSize() == len(stored) or not unknown_bytes(record)


def unknown_bytes(message: Message) -> int:
    """How many bytes of `message` stand in fields that this version does not know."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    return message.ByteSize() - known.ByteSize()
