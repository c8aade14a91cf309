"""Snapshots of one partition's local state in a bucket: written beside the work, restored on a new disk.

Promise: a snapshot that `restore` accepts is, byte for byte, what a worker of this installation captured after exactly one
record: its manifest is sealed under the ledger key, and names the partition, that record, and the SHA-256 of every file.
Anything else raises `SnapshotRefused`, and nothing of it is used.

In the bucket, under `partition-N/`:

    files/SHA-256                     what a store held (state), and the runs of its dedupe memory; shared by snapshots
    manifests/LOGTIME-SEQUENCE-…      one a snapshot, written after all of its files

A run never changes, so a snapshot uploads the runs that no snapshot before had, and what RocksDB holds, which is small. A kill
while one is written leaves files that no manifest names; they are collected once they are an hour old. Of two workers that
write here at one time, a zombie and its heir, one may take away what the other is about to name: that snapshot is refused then,
and the one before it, or the log, serves.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from billing.chain import is_sealed, seal_and_hash
from billing.key_ring import Keys, derived
from billing.v1.account_pb2 import Progress
from billing.v1.ledger_pb2 import SnapshotTaken
from billing.v1.snapshot_pb2 import SnapshotFile, SnapshotManifest
from stream_processors.bucket import Bucket, Listed
from stream_processors.errors import BucketError, SnapshotRefused
from stream_processors.local_store import Captured, write_pairs
from stream_processors.seen_runs import sync_folder

__all__ = ["Snapshot", "SnapshotStore"]

logger = logging.getLogger(__name__)

_VERSION = 1
_STATE = "state"
_RUN_NAME = re.compile(r"[0-9]-[0-9]{12}\.run")
_PAIR = struct.Struct("<II")
_MANIFEST_BYTES_MAX = 4 << 20
_MANIFESTS_READ_MAX = 100
_ORPHAN_AGE_S_MIN = 3_600
_RESTORING_THREADS = 4
_PAIRS_A_PIECE = 500


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One that is in the bucket, its seal checked."""

    name: str
    manifest: SnapshotManifest
    taken: SnapshotTaken

    @property
    def place(self) -> Progress:
        return self.manifest.place

    @property
    def size_bytes(self) -> int:
        """Of all of its files, those that it shares included."""
        return sum(file.size_bytes for file in self.manifest.files)

    def __str__(self) -> str:
        position = self.place.position
        return f"snapshot {self.name} (generation {position.generation.hex()[:12]}, sequence {position.sequence})"


class SnapshotStore:
    """One partition's snapshots. Its calls block; they are for one thread at a time."""

    def __init__(self, bucket: Bucket, partition: int, seal_key: Keys, *, kept: int = 3, writer: str = "") -> None:
        self.partition = partition
        self._bucket = bucket
        # Of its own: nothing that is sealed for the ledger is a manifest.
        self._keys = derived(seal_key, b"taximeter snapshot manifest")
        self._kept = kept
        self._writer = writer
        self._prefix = f"partition-{partition}"
        # Of runs, by name in the store: they never change.
        self._digests: dict[str, bytes] = {}
        # What was found damaged on the way here is written anew, not shared.
        self._distrusted: set[bytes] = set()

    # --- what is there ---

    def find(self) -> list[Snapshot]:
        """Those that are whole by their manifests, the newest first. Others are named in the log and left alone."""
        return self._find()[0]

    def _find(self) -> tuple[list[Snapshot], bool]:
        """And whether there is nothing else."""
        found: list[Snapshot] = []
        listed = self._bucket.list(f"{self._prefix}/manifests")
        for each in listed[-_MANIFESTS_READ_MAX:]:
            try:
                found.append(self._read_manifest(each))
            except SnapshotRefused as refusal:
                logger.error("%s", refusal)
            except FileNotFoundError:
                continue
        found.sort(key=lambda s: (s.manifest.log_time_ms, s.place.position.sequence, s.name), reverse=True)
        return found, len(found) == len(listed)

    def _read_manifest(self, listed: Listed) -> Snapshot:
        where = f"snapshot manifest {listed.name}"
        if listed.size_bytes > _MANIFEST_BYTES_MAX:
            raise SnapshotRefused(f"{where} has {listed.size_bytes} bytes, over {_MANIFEST_BYTES_MAX}; somebody else wrote it")
        stored = b"".join(self._bucket.read(listed.name, listed.size_bytes))
        if not is_sealed(stored, self._keys):
            raise SnapshotRefused(
                f"{where} is not sealed with this ledger's key: it was damaged, or somebody else wrote it: find out who can "
                "write there, and delete it"
            )
        try:
            manifest = SnapshotManifest.FromString(stored)
        except DecodeError as error:
            raise SnapshotRefused(f"{where} cannot be decoded ({error})") from error
        if manifest.schema_version != _VERSION:
            raise SnapshotRefused(f"{where} has version {manifest.schema_version}, this worker reads {_VERSION}; upgrade it")
        if manifest.place.partition != self.partition:
            raise SnapshotRefused(f"{where} is one of partition {manifest.place.partition}; it was moved here")
        names = [file.name for file in manifest.files]
        if sorted(set(names)) != sorted(names) or not all(name == _STATE or _RUN_NAME.fullmatch(name) for name in names):
            raise SnapshotRefused(f"{where} names the files {names}, which no snapshot has")
        taken = SnapshotTaken(position=manifest.place.position, digest=hashlib.sha256(stored).digest())
        return Snapshot(listed.name, manifest, taken)

    # --- writing ---

    def write(self, captured: Captured, taken_ms: int, is_cancelled: Callable[[], bool]) -> Snapshot:
        """Make what was captured durable, then let go of what is superseded. Raises CancelledError between pieces of work."""
        try:
            state = self._write_state(captured, is_cancelled)
        finally:
            captured.release()
        found, _ = self._find()
        shared = self._shared(found)
        files = [state]
        for path in captured.runs:
            digest = self._digests.get(path.name) or _digest_of(path)
            self._digests[path.name] = digest
            files.append(SnapshotFile(name=path.name, digest=digest, size_bytes=path.stat().st_size))
        for file in files:
            if is_cancelled():
                raise CancelledError
            if file.digest not in shared:
                self._bucket.put(self._file(file.digest), captured.folder / file.name)
                self._distrusted.discard(file.digest)
        snapshot = self._put_manifest(captured, files, taken_ms)
        shutil.rmtree(captured.folder, ignore_errors=True)
        # The digests of runs that are no more.
        self._digests = {file.name: file.digest for file in files if file.name != _STATE}
        try:
            self._collect()
        except BucketError as error:
            logger.warning("superseded snapshots stay for now: %s", error)
        return snapshot

    def _write_state(self, captured: Captured, is_cancelled: Callable[[], bool]) -> SnapshotFile:
        running = hashlib.sha256()
        path = captured.folder / _STATE
        with path.open("wb") as file:
            for piece in _packed(captured.pairs):
                if is_cancelled():
                    raise CancelledError
                running.update(piece)
                file.write(piece)
            size_bytes = file.tell()
        return SnapshotFile(name=_STATE, digest=running.digest(), size_bytes=size_bytes)

    def _put_manifest(self, captured: Captured, files: list[SnapshotFile], taken_ms: int) -> Snapshot:
        manifest = SnapshotManifest(
            schema_version=_VERSION,
            place=captured.place,
            log_time_ms=captured.log_time_ms,
            taken_ms=taken_ms,
            writer=self._writer,
            files=files,
        )
        stored, digest = seal_and_hash(manifest, self._keys)
        sequence = captured.place.position.sequence
        # With its digest: two that were taken at one place are two.
        name = f"{self._prefix}/manifests/{captured.log_time_ms:015d}-{sequence:015d}-{digest.hex()[:16]}"
        self._bucket.put(name, stored)
        return Snapshot(name, manifest, SnapshotTaken(position=captured.place.position, digest=digest))

    def _shared(self, snapshots: list[Snapshot]) -> set[bytes]:
        """Files that are there because a manifest names them, so they were durable before it, and that have their size."""
        named = {file.digest: file.size_bytes for each in snapshots for file in each.manifest.files}
        sizes = {each.name: each.size_bytes for each in self._bucket.list(f"{self._prefix}/files")}
        whole = {digest for digest, size in named.items() if sizes.get(self._file(digest)) == size}
        return whole - self._distrusted

    def _file(self, digest: bytes) -> str:
        return f"{self._prefix}/files/{digest.hex()}"

    def _collect(self) -> None:
        """Keep the last snapshots, and the files that they name."""
        found, is_all_ours = self._find()
        keep, gone = found[: self._kept], found[self._kept :]
        # Manifests first: one that is there has its files.
        self._bucket.delete([each.name for each in gone])
        named = {self._file(file.digest) for each in keep for file in each.manifest.files}
        superseded = {self._file(file.digest) for each in gone for file in each.manifest.files} - named
        if is_all_ours:
            listed = self._bucket.list(f"{self._prefix}/files")
            # Younger ones may be another worker's, who is about to write its manifest.
            newest_s = max((each.written_s for each in listed), default=0.0)
            old = {each.name for each in listed if newest_s - each.written_s > _ORPHAN_AGE_S_MIN}
            superseded |= old - named
        self._bucket.delete(sorted(superseded))
        self._bucket.sweep(self._prefix)

    # --- restoring ---

    def restore(self, snapshot: Snapshot, folder: Path) -> None:
        """Make `folder` a local store that stands where the snapshot was taken. Raises SnapshotRefused where it is damaged."""
        draft = folder.with_name(f"{folder.name}.restoring")
        shutil.rmtree(draft, ignore_errors=True)
        (draft / "seen").mkdir(parents=True)
        with ThreadPoolExecutor(_RESTORING_THREADS, thread_name_prefix="restoring") as threads:
            # All of them: the first refusal is raised when no thread writes there any more.
            outcomes = [threads.submit(self._fetch, snapshot, file, draft) for file in snapshot.manifest.files]
        for outcome in outcomes:
            outcome.result()
        sync_folder(draft / "seen")
        state = draft / "fetched"
        write_pairs(draft, _pairs(state))
        state.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        sync_folder(folder.parent)

    def verify(self, snapshot: Snapshot) -> None:
        """Read every file, and keep none. Raises SnapshotRefused where one is not what the manifest says."""
        for file in snapshot.manifest.files:
            for _ in self._checked(snapshot, file):
                pass

    def _fetch(self, snapshot: Snapshot, file: SnapshotFile, draft: Path) -> None:
        path = draft / "fetched" if file.name == _STATE else draft / "seen" / file.name
        with path.open("wb") as target:
            for piece in self._checked(snapshot, file):
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())

    def _checked(self, snapshot: Snapshot, file: SnapshotFile) -> Iterator[bytes]:
        """The bytes of a file; at their end they have been those that the manifest names."""
        running = hashlib.sha256()
        try:
            for piece in self._bucket.read(self._file(file.digest), file.size_bytes):
                running.update(piece)
                yield piece
        except FileNotFoundError:
            raise SnapshotRefused(f"{snapshot}: its file {file.name} ({file.digest.hex()}) is not there") from None
        if running.digest() != file.digest:
            self._distrusted.add(file.digest)
            raise SnapshotRefused(f"{snapshot}: its file {file.name} is damaged: it does not have the hash {file.digest.hex()}")


def _packed(pairs: Iterator[tuple[bytes, bytes]]) -> Iterator[bytes]:
    while several := list(itertools.islice(pairs, _PAIRS_A_PIECE)):
        yield b"".join([part for key, value in several for part in (_PAIR.pack(len(key), len(value)), key, value)])


def _pairs(path: Path) -> Iterator[tuple[bytes, bytes]]:
    with path.open("rb") as file:
        while header := file.read(_PAIR.size):
            key_bytes, value_bytes = _PAIR.unpack(header)
            yield file.read(key_bytes), file.read(value_bytes)


def _digest_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
