"""A copy of the ledger in a folder: the log is the state, so whoever has the log has everything but the secrets.

Promise: what a manifest names is whole, is a chain under the ledger's key from its founding record to `head`, and stands
message for message at the offsets of the log. Taken again, a backup gains what has come since; files that it has never change.
A run may end anywhere: `manifest.json` names only what is durable, and is replaced as a whole.

    manifest.json                          BackupManifest, after everything that it names
    partition-N/OFFSET.messages            the messages from that offset on
    partition-N/OFFSET.messages.partial    of a run that was killed; the next one writes it anew

Messages that are not of the chain (a zombie's, forged ones) are kept, and are refused again by whoever reads them: so
snapshots, readers' positions and what the ledger says of refused records stay true of a log that is made of the backup. It is
as confidential as the topic: the founding record holds the key of the dedupe hash, and records hold usage.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from google.protobuf import json_format

from billing.chain import Chain, UnreadableRecord
from billing.key_ring import Keys
from billing.v1.account_pb2 import LedgerPosition, Progress
from billing.v1.backup_pb2 import BackupManifest, BackupPartition, BackupSegment
from billing.v1.ledger_pb2 import LedgerRecord
from stream_processors.errors import BackupError
from stream_processors.kafka_ports import MESSAGE_BYTES_MAX
from stream_processors.ledger_host import LogReader
from stream_processors.log_place import Standing, find_place
from stream_processors.seen_runs import sync_folder

__all__ = ["Accepted", "Stored", "end_of", "read_manifest", "read_messages", "take"]

_VERSION = 1
_MANIFEST = "manifest.json"
_LOCK = "lock"
# What a run that was killed before its first manifest leaves.
_OURS = (_LOCK, _MANIFEST, "partition-")
_LENGTH = struct.Struct("<I")
# A file of this size is begun anew; and what a crash costs the next run.
_SEGMENT_BYTES = 256 << 20
_MANIFEST_BYTES_MAX = 64 << 20

# A record of the chain, and its hash.
Accepted = Callable[[LedgerRecord, bytes], None]


def _nobody(record: LedgerRecord, record_hash: bytes) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One message of a backup; `record` where it is of the chain."""

    offset: int
    value: bytes
    record: LedgerRecord | None
    # Of the last record of the chain, this one included.
    record_hash: bytes


def end_of(partition: BackupPartition) -> int:
    """The offset of the first message that the backup does not have."""
    return partition.segments[-1].end_offset if partition.segments else 0


# --- taking ---


async def take(
    reader: LogReader,
    topic: str,
    partitions: int,
    seal_key: Keys,
    folder: Path,
    taken_ms: int,
    *,
    on_record: Accepted = _nobody,
    segment_bytes: int = _SEGMENT_BYTES,
) -> BackupManifest:
    """Add to the backup what the log has beyond it, or begin one. BackupError where the log is not the backup's.

    1. Every partition is looked at: the log must have the backup's last record where the backup has it. Nothing is written yet.
    2. Messages go into a file that has no name yet in the manifest. A crash: it is written anew.
    3. The file is synced, gets its name, and its folder is synced. A crash: the next run begins at the same offset.
    4. The manifest that names it is synced and takes the place of the one before. A crash: either is whole.
    5. The same for the next file; so a run that was killed has lost the file that it was at.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _held(folder):
        manifest = _begin(folder, topic, partitions)
        manifest.taken_ms = taken_ms
        ends = [await _end_of_log(reader, topic, each, seal_key) for each in manifest.partitions]
        for partition, end in zip(manifest.partitions, ends, strict=True):
            copying = _Copying(folder, manifest, partition, seal_key, on_record, segment_bytes)
            with copying:
                async for chunk in reader.read(topic, partition.head.partition, end_of(partition), end):
                    for offset, value in chunk:
                        copying.add(offset, value)
                copying.finish(end)
        _write_manifest(folder, manifest)
        return manifest


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    with (folder / _LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupError(
                f"{folder} is being written by another process: wait for it, or give a folder of its own"
            ) from None
        yield


def _begin(folder: Path, topic: str, partitions: int) -> BackupManifest:
    if not (folder / _MANIFEST).exists():
        foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith(_OURS))
        if foreign:
            raise BackupError(f"{folder} holds {foreign[0]} and no backup: give an empty folder, or one that holds a backup")
        heads = [BackupPartition(head=Progress(partition=partition)) for partition in range(partitions)]
        return BackupManifest(schema_version=_VERSION, ledger_topic=topic, partitions=heads)
    manifest = read_manifest(folder)
    if (manifest.ledger_topic, len(manifest.partitions)) != (topic, partitions):
        raise BackupError(
            f"{folder} is a backup of {manifest.ledger_topic} with {len(manifest.partitions)} partitions, and this ledger is "
            f"{topic} with {partitions}: give each ledger a folder of its own"
        )
    return manifest


async def _end_of_log(reader: LogReader, topic: str, partition: BackupPartition, seal_key: Keys) -> int:
    """Up to where the log goes. It must be the one that the backup is of, and have what follows."""
    number, head = partition.head.partition, partition.head
    where = f"{topic}[{number}]"
    first, end = await reader.bounds(topic, number)
    if not partition.segments:
        if first == end == 0:
            raise BackupError(f"{where} is empty: no ledger is founded; run: taximeter topics apply")
        if first > 0:
            raise BackupError(
                f"{where} begins at offset {first}: what came before was deleted, and a ledger cannot be made of the rest. "
                "Copy the table ledger_records of ClickHouse instead (BACKUP TABLE), and keep an earlier backup if there is one"
            )
        return end
    if first > end_of(partition):
        raise BackupError(
            f"{where} begins at offset {first}, and the backup ends at {end_of(partition)}: what lay between was deleted "
            "before it was copied. Keep this backup, and take backups more often than the topic's retention"
        )
    try:
        place = await find_place(reader, topic, head, seal_key, first, end)
    except UnreadableRecord as error:
        raise BackupError(f"{where}: {error}") from error
    if place.standing is not Standing.FITS or place.next_offset != head.ledger_offset + 1 or end < end_of(partition):
        raise BackupError(
            f"{where}, offsets {first} to {end}, does not have the backup's last record (sequence {head.position.sequence} of "
            f"generation {head.position.generation.hex()[:12]}) at offset {head.ledger_offset}: the log lost its end, or was "
            "made anew. Keep this backup: it may have what the log lost. For the log as it is now, begin another folder"
        )
    return end


@dataclass
class _Copying:
    """One partition of a run: files, and after each the manifest."""

    folder: Path
    manifest: BackupManifest
    partition: BackupPartition
    seal_key: Keys
    on_record: Accepted
    segment_bytes: int
    _chain: Chain = field(init=False)
    _offset: int = field(init=False)
    _file: IO[bytes] | None = None
    _segment: BackupSegment = field(default_factory=BackupSegment)
    _running: hashlib._Hash = field(default_factory=hashlib.sha256)
    # What is in the file and not yet in the manifest.
    _reached: BackupPartition = field(default_factory=BackupPartition)

    def __post_init__(self) -> None:
        self._chain = _chain_at(self.partition.head, self.seal_key)
        self._offset = end_of(self.partition)
        self._reached.CopyFrom(self.partition)

    def __enter__(self) -> _Copying:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, offset: int, value: bytes) -> None:
        where = f"{self.manifest.ledger_topic}[{self.partition.head.partition}], offset {offset}"
        if offset != self._offset:
            raise BackupError(
                f"{where} came and {self._offset} was due: the ledger's offsets have no holes. A broker lost messages, or "
                "somebody writes to the topic in transactions"
            )
        record = _accept(self._chain, value, where)
        if self._offset == 0:
            _check_founding(record, where)
        _reach(self._reached, record, self._chain.record_hash, offset)
        if record is not None:
            self.on_record(record, self._chain.record_hash)
        file = self._open()
        for part in (_LENGTH.pack(len(value)), value):
            file.write(part)
            self._running.update(part)
            self._segment.size_bytes += len(part)
        self._offset = offset + 1
        if self._segment.size_bytes >= self.segment_bytes:
            self._close()

    def finish(self, end: int) -> None:
        if self._offset < end:
            raise BackupError(
                f"{self.manifest.ledger_topic}[{self.partition.head.partition}] ends at offset {end}, and nothing came from "
                f"{self._offset} on: the ledger's offsets have no holes. Is the topic written in transactions?"
            )
        if self._file is not None:
            self._close()

    @property
    def _path(self) -> Path:
        return self.folder / self._segment.name

    def _open(self) -> IO[bytes]:
        if self._file is None:
            name = f"partition-{self.partition.head.partition}/{self._offset:020d}.messages"
            self._segment = BackupSegment(name=name, first_offset=self._offset)
            self._running = hashlib.sha256()
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            self._file = open(_partial(self._path), "wb", opener=_private)  # noqa: SIM115  closed by _close or __exit__
        return self._file

    def _close(self) -> None:
        assert self._file is not None
        _sync(self._file)
        self._file.close()
        self._file = None
        os.replace(_partial(self._path), self._path)
        sync_folder(self._path.parent)
        self._segment.end_offset = self._offset
        self._segment.digest = self._running.digest()
        self._reached.segments.append(self._segment)
        self.partition.CopyFrom(self._reached)
        _write_manifest(self.folder, self.manifest)


def _check_founding(record: LedgerRecord | None, where: str) -> None:
    if record is None:
        raise BackupError(
            f"{where} is no founding record under this seal key: give this process the installation's (ledger.seal_key), the "
            "older ones too"
        )
    if record.founding.HasField("predecessor"):
        raise BackupError(
            f"{where}: this log carries on a state that is not in it (`taximeter up`, or --found-again-on): the memory of what "
            "was charged before is on the workers' disks alone. Stop the workers and copy their ledger.state_dir; of "
            "`taximeter up`, its whole data directory"
        )


def _reach(partition: BackupPartition, record: LedgerRecord | None, record_hash: bytes, offset: int) -> None:
    """What the backup's head is with this message."""
    if record is None:
        partition.ignored += 1
        return
    partition.records += 1
    partition.log_time_ms = record.log_time_ms
    partition.head.CopyFrom(
        Progress(
            partition=record.partition,
            position=LedgerPosition(generation=record.generation, sequence=record.sequence),
            record_hash=record_hash,
            ledger_offset=offset,
        )
    )


def _accept(chain: Chain, value: bytes, where: str) -> LedgerRecord | None:
    try:
        return chain.accept(value)
    except UnreadableRecord as error:
        raise BackupError(f"{where}: {error}") from error


def _chain_at(head: Progress, seal_key: Keys) -> Chain:
    if not head.record_hash:
        return Chain(head.partition, seal_key)
    return Chain(head.partition, seal_key, head.position.generation, head.position.sequence, head.record_hash)


def _write_manifest(folder: Path, manifest: BackupManifest) -> None:
    path = folder / _MANIFEST
    with open(_partial(path), "wb", opener=_private) as file:
        file.write(json_format.MessageToJson(manifest).encode())
        _sync(file)
    os.replace(_partial(path), path)
    sync_folder(folder)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


# --- reading ---


def read_manifest(folder: Path) -> BackupManifest:
    """What the backup says that it holds. Raises BackupError where there is none, or one of another version."""
    path = folder / _MANIFEST
    try:
        if path.stat().st_size > _MANIFEST_BYTES_MAX:
            raise BackupError(f"{path} has over {_MANIFEST_BYTES_MAX} bytes: is it a backup's?")
        manifest = json_format.Parse(path.read_bytes(), BackupManifest(), ignore_unknown_fields=True)
    except FileNotFoundError:
        raise BackupError(
            f"{folder} holds no backup: {_MANIFEST} is not there; see that it is the folder of `backup take`"
        ) from None
    except OSError as error:
        raise BackupError(f"{path} cannot be read ({error.strerror})") from None
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise BackupError(f"{path} is damaged ({error}): take another copy of the backup") from None
    if manifest.schema_version != _VERSION:
        raise BackupError(
            f"{path} has version {manifest.schema_version}, and this one reads {_VERSION}: use the version that wrote it"
        )
    if [each.head.partition for each in manifest.partitions] != list(range(len(manifest.partitions))):
        raise BackupError(f"{path} does not name each partition once, in order: take another copy of the backup")
    return manifest


def read_messages(folder: Path, partition: BackupPartition, topic: str, seal_key: Keys) -> Iterator[Stored]:
    """Every message of one partition, proved on the way: sizes, hashes of files, the chain, its seals, and its end.

    Raises BackupError for the first thing that is not as the manifest says. What came before it was right.
    """
    number = partition.head.partition
    if not partition.segments:
        raise BackupError(f"{folder} has nothing of {topic}[{number}]: the first run was not finished; run `backup take` again")
    chain = Chain(number, seal_key)
    reached = BackupPartition(head=Progress(partition=number))
    offset = 0
    for segment in partition.segments:
        path = folder / f"partition-{number}" / Path(segment.name).name
        if segment.first_offset != offset:
            raise BackupError(f"{path} begins at offset {segment.first_offset}, and {offset} was due: {_COPY}")
        for value in _values(path, segment):
            where = f"{path}, offset {offset} of {topic}[{number}]"
            record = _accept(chain, value, where)
            if offset == 0:
                _check_founding(record, where)
            _reach(reached, record, chain.record_hash, offset)
            yield Stored(offset, value, record, chain.record_hash)
            offset += 1
        if offset != segment.end_offset:
            raise BackupError(f"{path} ends before offset {offset}, and the manifest says {segment.end_offset}: {_COPY}")
    reached.segments.extend(partition.segments)
    if reached != partition:
        raise BackupError(
            f"{topic}[{number}]: the manifest says that the backup ends at sequence {partition.head.position.sequence}, and "
            f"its files lead to {reached.head.position.sequence}, {reached.records} records: {_COPY}"
        )


_COPY = "the backup is damaged; take another copy of it"


def _values(path: Path, segment: BackupSegment) -> Iterator[bytes]:
    running = hashlib.sha256()
    left = segment.size_bytes
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != left:
                raise BackupError(f"{path} has {os.fstat(file.fileno()).st_size} bytes, and the manifest says {left}: {_COPY}")
            while left:
                header = file.read(_LENGTH.size)
                length = _LENGTH.unpack(header)[0] if len(header) == _LENGTH.size else MESSAGE_BYTES_MAX + 1
                left -= _LENGTH.size + length
                if length > MESSAGE_BYTES_MAX or left < 0:
                    raise BackupError(f"{path} is no file of messages from {file.tell()} on: {_COPY}")
                value = file.read(length)
                running.update(header)
                running.update(value)
                yield value
    except FileNotFoundError:
        raise BackupError(f"{path} is not there, and the manifest names it: {_COPY}") from None
    except OSError as error:
        raise BackupError(f"{path} cannot be read ({error.strerror})") from None
    if running.digest() != segment.digest:
        raise BackupError(f"{path} does not have the hash that the manifest says: {_COPY}")
