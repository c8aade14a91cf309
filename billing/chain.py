"""The chain of records: how one is sealed, hashed and told from a zombie's.

A record's stored bytes are its serialized fields 1..98 and then field 99, its seal: an HMAC-SHA256 over SHA-256 of the bytes
before it, so that one pass over the bytes gives both the seal and the hash. A record's hash is SHA-256 over all of its stored
bytes, so anyone with the archive can follow the chain in SQL. A reader accepts a record only if it names the hash of the last
one that it accepted and moves its source forward: the first valid record wins, and whatever a zombie, a retry or a replay
writes changes nothing.

What carries no valid seal was written by somebody else: it is refused, `refusal` says so, and the chain goes on over it, or
whoever can write to the topic could stop the ledger with one message. But if sealed records follow that build on what this
reader refused, it was damaged and not forged: the reader stops.

In the archive a person can be taken out of records (`billing.erasures`). What is left of one no longer has the record's hash:
that is kept beside it, and the next record names it as before. Who did it signs both together (`redaction`), with a key that
opens nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from billing.key_ring import Keys, UnknownKey, as_ring, derived
from billing.limits import SCHEMA_VERSION, WRITER_CHARS_MAX
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.snapshot_pb2 import SnapshotManifest

# Field 99, length-delimited, 32 bytes long.
_SEAL_TAG = bytes(((99 << 3 | 2) & 0x7F | 0x80, (99 << 3 | 2) >> 7, 32))
_SEAL_BYTES = len(_SEAL_TAG) + 32


class UnreadableRecord(ValueError):
    """A record that cannot be read though it must be: the reader stops; it never skips one."""


def seal(record: LedgerRecord, keys: Keys) -> bytes:
    """The stored bytes of `record`, which has no seal yet."""
    return seal_and_hash(record, keys)[0]


def seal_and_hash(record: LedgerRecord | SnapshotManifest, keys: Keys) -> tuple[bytes, bytes]:
    """The stored bytes of `record`, which has no seal yet, and their hash, in one pass over them."""
    if isinstance(keys, bytes):
        key = keys
    else:
        key_id, key = keys.signing
        if isinstance(record, LedgerRecord):
            record.seal_key_id = key_id
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


def is_sealed(stored: bytes, keys: Keys) -> bool:
    """Whether the seal is that of one of `keys`, whichever the record names: for bytes that may be no record."""
    return any(sealed_with(stored, key) for key in as_ring(keys).all())


def redaction(stored_hash: bytes, redacted: bytes, keys: Keys) -> bytes:
    """What stands beside `redacted`, which is what was left of the record with that hash."""
    return hmac.digest(as_ring(_redaction_keys(keys)).signing[1], stored_hash + record_hash(redacted), "sha256")


def is_redaction(mark: bytes, stored_hash: bytes, redacted: bytes, keys: Keys) -> bool:
    """Whether one who has one of `keys` made `redacted` from the record with that hash."""
    named = stored_hash + record_hash(redacted)
    return any(hmac.compare_digest(mark, hmac.digest(key, named, "sha256")) for key in as_ring(_redaction_keys(keys)).all())


def _redaction_keys(keys: Keys) -> Keys:
    return derived(keys, b"taximeter redactions")


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
    seal_key: Keys | None = None
    generation: bytes = b""
    sequence: int = -1
    record_hash: bytes = b""
    ignored: int = 0
    # Of those ignored, the ones without a valid seal; and why the last one that was asked about was refused, if it was.
    refused: int = 0
    refusal: str = ""
    # Something was refused since the last record that was accepted.
    _refused_here: bool = False

    def accept(self, stored: bytes) -> LedgerRecord | None:
        """The record if it is the next one, else None: a zombie's, a repeat, another fork's, or forged (see `refusal`).

        Raises UnreadableRecord for what is sealed and cannot be read, or names a key that is not here, and where the chain went
        on over a record that was refused here.
        """
        self.refusal = ""
        try:
            record = LedgerRecord.FromString(stored)
        except DecodeError as error:
            if self.seal_key is None or is_sealed(stored, self.seal_key):
                raise UnreadableRecord(
                    f"{self._where}: {len(stored)} bytes are no ledger record; restore the topic from its replica, or rebuild "
                    "it from the archive in ClickHouse"
                ) from error
            self._refuse(f"{len(stored)} bytes are no ledger record")
            return None
        sealed, stored_hash = self._verify_named(record, stored)
        if not sealed:
            writer = record.writer[:WRITER_CHARS_MAX]
            self._refuse(f"the seal of sequence {record.sequence}, said to be by {writer!r}, is not the ledger key's")
            return None
        return self._take(record, stored_hash)

    def accept_redacted(self, redacted: bytes, stored_hash: bytes, mark: bytes) -> LedgerRecord | None:
        """As `accept`, of what is left in the archive of the record with that hash.

        Nobody can tell from it alone what was taken out; that the hash is the record's, the next record says.
        """
        self.refusal = ""
        try:
            record = LedgerRecord.FromString(redacted)
        except DecodeError as error:
            raise UnreadableRecord(f"{self._where}: {len(redacted)} bytes are no ledger record; restore the table") from error
        if self.seal_key is not None and not is_redaction(mark, stored_hash, redacted, self.seal_key):
            self._refuse(f"what is left of sequence {record.sequence} is not marked with the ledger's key")
            return None
        return self._take(record, stored_hash)

    def _take(self, record: LedgerRecord, stored_hash: bytes) -> LedgerRecord | None:
        if not self._links(record):
            self.ignored += 1
            if self._refused_here and self._is_beyond(record):
                raise UnreadableRecord(
                    f"{self._where}: the next record was refused, its seal is not the ledger key's, and sequence "
                    f"{record.sequence} was built on it: it was damaged; restore the topic from its replica or a backup"
                )
            return None
        if record.schema_version != SCHEMA_VERSION:
            raise UnreadableRecord(
                f"partition {self.partition}, sequence {record.sequence}: schema version {record.schema_version} is not "
                f"known here (this reader speaks {SCHEMA_VERSION}); upgrade this reader first"
            )
        self.generation = record.generation
        self.sequence = record.sequence
        self.record_hash = stored_hash
        self._refused_here = False
        return record

    @property
    def _where(self) -> str:
        return f"partition {self.partition}, after sequence {self.sequence}"

    def _verify_named(self, record: LedgerRecord, stored: bytes) -> tuple[bool, bytes]:
        if self.seal_key is None:
            return True, record_hash(stored)
        if isinstance(self.seal_key, bytes) and not record.seal_key_id:
            return _verify(stored, self.seal_key)
        try:
            key = as_ring(self.seal_key).find(record.seal_key_id)
        except UnknownKey:
            raise UnreadableRecord(
                f"{self._where}: the record is sealed with the key {record.seal_key_id[:64]!r}, which is not here: add it to "
                "this reader's ring of seal keys; if no such key was ever made, add it as revoked, and the record is refused"
            ) from None
        return (False, b"") if key is None else _verify(stored, key)

    def _refuse(self, why: str) -> None:
        self.ignored += 1
        self.refused += 1
        self.refusal = f"{why}; somebody else wrote it, or it was damaged: find out who can write to the ledger topic"
        self._refused_here = True

    def _is_beyond(self, record: LedgerRecord) -> bool:
        return (
            record.partition == self.partition
            and record.generation == (self.generation or record.generation)
            and record.sequence > self.sequence + 1
        )

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
