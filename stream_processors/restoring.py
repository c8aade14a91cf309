"""A partition's local store at its takeover: the one that lies here, or the newest snapshot where that saves a long replay.

Promise: a snapshot takes the place of the local store only if it is whole, the log has the record that it stands on, and the
local store is empty, was left behind by the log's retention, or is far behind. What is refused is named in the log of this
process, and the next older one is tried; without any, the log is replayed from its beginning. Where the log of the same ledger
does not have a snapshot's record, acknowledged records are missing from it, and the worker refuses to start.
"""

from __future__ import annotations

import logging
import shutil
import time
from asyncio import to_thread
from dataclasses import dataclass, field
from pathlib import Path

from billing.chain import UnreadableRecord
from billing.key_ring import Keys
from billing.v1.account_pb2 import Progress
from stream_processors.errors import BucketError, RefusedToStart, SnapshotRefused
from stream_processors.ledger_host import LogReader
from stream_processors.local_store import LocalStore
from stream_processors.log_place import Standing, find_place
from stream_processors.snapshots import Snapshot, SnapshotStore

__all__ = ["Restoring"]

logger = logging.getLogger(__name__)

# So many records are replayed sooner than a snapshot is fetched, or about so: 5 million events at the most.
_BEHIND_RECORDS_MAX = 10_000


@dataclass
class Restoring:
    """One takeover. What it once refused it does not try again."""

    reader: LogReader
    ledger_topic: str
    seal_key: Keys
    snapshots: SnapshotStore
    folder: Path
    refused: set[bytes] = field(default_factory=set)

    async def open(self) -> tuple[LocalStore, Snapshot | None]:
        """The local store, and the snapshot that it was made from just now, if it was."""
        while True:
            store = LocalStore(self.folder, self.snapshots.partition)
            try:
                snapshot = await self._better_than(store)
            except BaseException:
                store.close()
                raise
            if snapshot is None:
                return store, None
            store.close()
            began = time.monotonic()
            try:
                await to_thread(self.snapshots.restore, snapshot, self.folder)
            except (SnapshotRefused, BucketError) as error:
                self.refuse(snapshot, error)
                continue
            store = LocalStore(self.folder, self.snapshots.partition)
            took_s = time.monotonic() - began
            logger.info("%s restored in %.2f s, %d bytes", snapshot, took_s, snapshot.size_bytes)
            return store, snapshot

    def refuse(self, snapshot: Snapshot, reason: Exception) -> None:
        """Not this one."""
        logger.error("%s is not used (%s); trying an older one, or the log", snapshot, reason)
        self.refused.add(snapshot.taken.digest)

    def discard(self, snapshot: Snapshot, reason: Exception) -> None:
        """Not this one, and what was made of it goes too."""
        self.refuse(snapshot, reason)
        shutil.rmtree(self.folder)

    async def _better_than(self, store: LocalStore) -> Snapshot | None:
        first, end = await self.reader.bounds(self.ledger_topic, self.snapshots.partition)
        is_left_behind = False
        if not store.empty:
            standing = await self._standing(store.place, first, end)
            is_left_behind = standing is Standing.TOO_OLD
            if not is_left_behind and (standing is not Standing.FITS or self._is_close(store.place, end)):
                return None
        try:
            found = await to_thread(self.snapshots.find)
        except BucketError as error:
            logger.error("%s[%d]: %s; going on without snapshots", self.ledger_topic, self.snapshots.partition, error)
            return None
        for snapshot in found:
            if snapshot.taken.digest in self.refused:
                continue
            standing = await self._standing(snapshot.place, first, end)
            if standing is Standing.LOST:
                raise RefusedToStart(
                    f"{self.ledger_topic}[{self.snapshots.partition}]: {snapshot} stands at offset "
                    f"{snapshot.place.ledger_offset}, and the log, offsets {first} to {end}, does not have that record: "
                    "acknowledged records were deleted or cut. Restore the topic from its replicas or a backup. Only if it is "
                    "known that the log is right, delete that snapshot's manifest"
                )
            if standing is not Standing.FITS:
                logger.warning("%s is not used: its place in the log is %s", snapshot, standing.value)
                continue
            is_ahead = snapshot.place.ledger_offset - store.place.ledger_offset > _BEHIND_RECORDS_MAX
            return snapshot if store.empty or is_left_behind or is_ahead else None
        return None

    async def _standing(self, place: Progress, first: int, end: int) -> Standing:
        try:
            return (await find_place(self.reader, self.ledger_topic, place, self.seal_key, first, end)).standing
        except UnreadableRecord as error:
            raise RefusedToStart(f"{self.ledger_topic}[{self.snapshots.partition}]: {error}") from error

    @staticmethod
    def _is_close(place: Progress, end: int) -> bool:
        return end - place.ledger_offset <= _BEHIND_RECORDS_MAX
