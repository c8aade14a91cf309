"""The chain of records: how one is sealed, hashed and told from a zombie's.

A record's stored bytes are its serialized fields 1..98 and then field 99, its seal: an HMAC-SHA256 over SHA-256 of the bytes
before it, so that one pass over the bytes gives both the seal and the hash. A record's hash is SHA-256 over all of its stored
bytes, so anyone with the archive can follow the chain in SQL. A reader accepts a record only if it names the hash of the last
one that it accepted and moves its source forward: the first valid record wins, and whatever a zombie, a retry or a replay
writes changes nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from billing.limits import SCHEMA_VERSION
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.snapshot_pb2 import SnapshotManifest

# Field 99, length-delimited, 32 bytes long.
_SEAL_TAG = bytes(((99 << 3 | 2) & 0x7F | 0x80, (99 << 3 | 2) >> 7, 32))
_SEAL_BYTES = len(_SEAL_TAG) + 32


class UnreadableRecord(ValueError):
    """A record that cannot be read, or not believed: the reader stops; it never skips one."""


def seal(record: LedgerRecord, key: bytes) -> bytes:
    """The stored bytes of `record`, which has no seal yet."""
    return seal_and_hash(record, key)[0]


def seal_and_hash(record: LedgerRecord | SnapshotManifest, key: bytes) -> tuple[bytes, bytes]:
    """The stored bytes of `record`, which has no seal yet, and their hash, in one pass over them."""
    body = record.SerializeToString()
    running = hashlib.sha256(body)
    seal_field = _SEAL_TAG + hmac.digest(key, running.digest(), "sha256")
    running.update(seal_field)
    return body + seal_field, running.digest()


def record_hash(stored: bytes) -> bytes:
    """The hash that the next record names."""
    return hashlib.sha256(stored).digest()


def sealed_with(stored: bytes, key: bytes) -> bool:
    """Whether the seal is that of `key`."""
    return _verify(stored, key)[0]


def _verify(stored: bytes, key: bytes) -> tuple[bool, bytes]:
    """Whether the seal is that of `key`, and the hash of the stored bytes, in one pass."""
    view = memoryview(stored)
    running = hashlib.sha256(view[:-_SEAL_BYTES])
    expected = _SEAL_TAG + hmac.digest(key, running.digest(), "sha256")
    running.update(view[-_SEAL_BYTES:])
    return hmac.compare_digest(view[-_SEAL_BYTES:], expected), running.digest()


@dataclass(slots=True)
class Chain:
    """A reader's place in one partition's chain. Starts empty (takes a founding record) or from a stored position.

    `seal_key` None means: links are checked, seals are not (a reader that was not given the key).
    """

    partition: int
    seal_key: bytes | None = None
    generation: bytes = b""
    sequence: int = -1
    record_hash: bytes = b""
    ignored: int = 0

    def accept(self, stored: bytes) -> LedgerRecord | None:
        """The record if it is the next one, else None (a zombie's, a repeat, another fork's), counted in `ignored`.

        Raises UnreadableRecord for bytes that are no record, and for one that claims to be the next but has no valid seal.
        """
        try:
            record = LedgerRecord.FromString(stored)
        except DecodeError as error:
            raise UnreadableRecord(
                f"partition {self.partition}, after sequence {self.sequence}: {len(stored)} bytes are no ledger record; "
                "restore the topic from its replica, or rebuild it from the archive in ClickHouse"
            ) from error
        if not self._links(record):
            self.ignored += 1
            return None
        if record.schema_version != SCHEMA_VERSION:
            raise UnreadableRecord(
                f"partition {self.partition}, sequence {record.sequence}: schema version {record.schema_version} is not "
                f"known here (this reader speaks {SCHEMA_VERSION}); upgrade this reader first"
            )
        is_sealed, stored_hash = (True, record_hash(stored)) if self.seal_key is None else _verify(stored, self.seal_key)
        if not is_sealed:
            raise UnreadableRecord(
                f"partition {self.partition}, sequence {record.sequence}: the seal is not the ledger key's; somebody else "
                "wrote this record, or it was damaged: find out who can write to the ledger topic"
            )
        self.generation = record.generation
        self.sequence = record.sequence
        self.record_hash = stored_hash
        return record

    def _links(self, record: LedgerRecord) -> bool:
        if record.partition != self.partition:
            return False
        if record.sequence == 0 and record.WhichOneof("source") == "founding":
            founding = record.founding
            if not self.generation:
                return True
            # A founding record that carries on exactly where this reader stands: the broker forgot, the state did not.
            return (
                founding.predecessor.generation == self.generation
                and founding.predecessor.sequence == self.sequence
                and founding.predecessor_hash == self.record_hash
            )
        return (
            record.generation == self.generation
            and record.sequence == self.sequence + 1
            and record.previous_hash == self.record_hash
        )
