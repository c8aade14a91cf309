"""A ledger from its backup, in a cluster that has none: every record where it was, and behind the last a new generation.

Promise: after `restore` the topic holds the backup message for message, at the same offsets, and in each partition one more
record: the founding record of a new generation, which names the backup's last record as its predecessor. So the cut stays in
the chain, whoever followed the old generation beyond it is told, and producers send again what the new one does not cover. It
may be interrupted anywhere and run again; it never writes to a topic that holds anything but the beginning of this very backup.

In this order:

1. The whole backup is proved, and the founding records are made: nothing is written of a backup that is damaged.
2. The topics are looked at. What does not fit is refused, and nothing is written yet.
3. The ledger's topic is made, and gets what it lacks of the backup. A crash: the next run goes on behind the last message.
4. Each partition is founded again. A crash in between: the others are founded with the same generation.
5. The other topics are made. Before that no worker can start, and no producer can send.

`inputs_kept`: the topics of usage and commands are still those that the ledger was reading; it reads on where the backup
stands, so what came after it is taken again. Without, they must be new, and are read from their beginnings.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from billing import replay
from billing.chain import Chain
from billing.founding import GENERATION_BYTES, found_again
from billing.limits import RECORD_BYTES_MAX
from billing.state import LedgerState, MemorySeenKeys
from billing.step import UsageInput
from billing.v1.backup_pb2 import BackupPartition
from billing.v1.ledger_pb2 import LedgerRecord
from stream_processors import topics
from stream_processors.errors import BackupError, RefusedToStart, WorkerError
from stream_processors.kafka_ports import KafkaLogReader, KafkaLogWriter
from stream_processors.ledger_backup import Accepted, Stored, end_of, read_manifest, read_messages
from stream_processors.ledger_diff import input_of
from stream_processors.topics import ApplySettings, Change

__all__ = ["plan", "restore"]

# Written, and acknowledged, before more is read.
_BATCH_BYTES = 8 << 20
_BATCH_MESSAGES = 2_000


@dataclass(slots=True)
class _Partition:
    """One partition of the backup, what it leads to, and what of it is in the cluster already."""

    backup: BackupPartition
    state: LedgerState
    # The last usage that was kept whole: its offset and its bytes.
    usage: UsageInput | None = None
    # Where the log ends that is there, and the generation that it was founded again with, if it was.
    start: int = 0
    generation: bytes = b""
    founding: LedgerRecord = field(default_factory=LedgerRecord)
    founding_stored: bytes = b""

    @property
    def number(self) -> int:
        return self.backup.head.partition

    @property
    def end(self) -> int:
        return end_of(self.backup)


async def plan(settings: ApplySettings, folder: Path, *, inputs_kept: bool, on_record: Accepted) -> list[Change]:
    """What `restore` would do. It proves the backup and looks at the topics."""
    work = _Restore(settings, folder, inputs_kept)
    partitions = await work.prepare(on_record)
    wanted = [change for change in await topics.plan(settings) if change.kind != "found ledger"]
    return wanted + work.changes(partitions)


async def restore(settings: ApplySettings, folder: Path, *, inputs_kept: bool, on_record: Accepted) -> list[Change]:
    """Do it; what was done."""
    work = _Restore(settings, folder, inputs_kept)
    partitions = await work.prepare(on_record)
    changes = await asyncio.to_thread(topics.make_ledger_topic, settings) + work.changes(partitions)
    await work.write(partitions)
    return changes + await topics.apply(settings)


@dataclass(frozen=True, slots=True)
class _Restore:
    settings: ApplySettings
    folder: Path
    inputs_kept: bool

    @property
    def topic(self) -> str:
        return self.settings.names.ledger

    def changes(self, partitions: list[_Partition]) -> list[Change]:
        changes = []
        for each in partitions:
            name = f"{self.topic}[{each.number}]"
            if each.start < each.end:
                detail = f"offsets {each.start} to {each.end - 1}, to sequence {each.state.sequence}"
                changes.append(Change("write records", name, detail))
            if not each.generation:
                reads = ", ".join(f"{entry.topic} from {entry.offset + 1}" for entry in each.founding.inputs) or "inputs from 0"
                changes.append(Change("found ledger", name, f"generation {each.founding.generation.hex()[:12]}, {reads}"))
        return changes

    # --- what there is ---

    async def prepare(self, on_record: Accepted) -> list[_Partition]:
        manifest = read_manifest(self.folder)
        wanted = self.settings.topics.partitions
        if (manifest.ledger_topic, len(manifest.partitions)) != (self.topic, wanted):
            raise BackupError(
                f"{self.folder} is a backup of {manifest.ledger_topic} with {len(manifest.partitions)} partitions, and the "
                f"configuration says {self.topic} with {wanted}: set kafka.topic_prefix and ledger.partitions to the backup's"
            )
        partitions = [self._prove(backup, on_record) for backup in manifest.partitions]
        await self._look(partitions)
        generation = next((each.generation for each in partitions if each.generation), secrets.token_bytes(GENERATION_BYTES))
        for each in partitions:
            if not each.generation:
                self._found(each, generation)
        return partitions

    def _messages(self, backup: BackupPartition) -> Iterator[Stored]:
        return read_messages(self.folder, backup, self.topic, self.settings.seal_key)

    def _prove(self, backup: BackupPartition, on_record: Accepted) -> _Partition:
        seen = MemorySeenKeys()
        proved = _Partition(backup, LedgerState(seen))
        for message in self._messages(backup):
            record = message.record
            if record is None:
                continue
            if record.HasField("founding"):
                # Its inputs are of other topics, or may be.
                proved.usage = None
            elif isinstance(source := input_of(record, self.settings.names), UsageInput):
                proved.usage = source
            replay.apply(proved.state, record, message.value)
            # A founding record does not state them, and no input is taken here: the log has them.
            seen.days.clear()
            on_record(record, proved.state.record_hash)
        return proved

    def _found(self, each: _Partition, generation: bytes) -> None:
        now_ms = time.time_ns() // 1_000_000
        each.founding, each.founding_stored = found_again(
            each.state, generation, now_ms, self.settings.seal_key, "backup restore", inputs_kept=self.inputs_kept
        )
        if len(each.founding_stored) > RECORD_BYTES_MAX:
            raise BackupError(
                f"{self.topic}[{each.number}]: the state of {len(each.state.accounts)} accounts takes "
                f"{len(each.founding_stored)} bytes in a founding record, over the {RECORD_BYTES_MAX} of a record; restore the "
                "topic from a mirror of the cluster instead"
            )

    async def _look(self, partitions: list[_Partition]) -> None:
        names, wanted = self.settings.names, self.settings.topics.partitions
        existing = await asyncio.to_thread(topics.existing_topics, self.settings)
        for name in (names.ledger, names.events, names.commands):
            if existing.get(name, wanted) != wanted:
                raise RefusedToStart(
                    f"topic {name} has {existing[name]} partitions, and the backup {wanted}: delete it, or restore into "
                    "another cluster"
                )
        reader = KafkaLogReader(self.settings.kafka)
        for each in partitions:
            if names.ledger in existing:
                await self._look_at_ledger(reader, each)
            if each.generation:
                continue
            for name in (names.events, names.commands):
                there = await reader.bounds(name, each.number) if name in existing else (0, 0)
                await self._look_at_input(reader, each, name, *there)

    async def _look_at_ledger(self, reader: KafkaLogReader, each: _Partition) -> None:
        first, end = await reader.bounds(self.topic, each.number)
        if first == end == 0:
            return
        last = await _message_at(reader, self.topic, each.number, end - 1) if first == 0 else None
        if last is not None and end == each.end + 1:
            state = each.state
            follow = Chain(each.number, self.settings.seal_key, state.generation, state.sequence, state.record_hash)
            record = follow.accept(last)
            if record is not None and record.HasField("founding"):
                each.start, each.generation = each.end, record.generation
                return
        if last is not None and end <= each.end and last == self._stored_at(each.backup, end - 1):
            each.start = end
            return
        raise RefusedToStart(
            f"{self.topic}[{each.number}] holds offsets {first} to {end}, and they are not the beginning of this backup: a "
            "ledger is there, or was. Restore into a cluster without one, or, if it is known that this one is lost, delete the "
            f"topics {self.topic} and {self.settings.names.progress}"
        )

    def _stored_at(self, backup: BackupPartition, offset: int) -> bytes | None:
        return next((message.value for message in self._messages(backup) if message.offset == offset), None)

    async def _look_at_input(self, reader: KafkaLogReader, each: _Partition, topic: str, first: int, end: int) -> None:
        where = f"{topic}[{each.number}]"
        if not self.inputs_kept and end > 0:
            raise RefusedToStart(
                f"{where} is not new, it holds offsets {first} to {end}. If it is the topic that the ledger was reading, say "
                "--inputs-kept: the ledger reads on where the backup stands. Else delete it, or restore into another cluster"
            )
        if not self.inputs_kept:
            return
        due = each.state.inputs.get(topic, -1) + 1
        if not first <= due <= end:
            raise RefusedToStart(
                f"{where} holds offsets {first} to {end}, and the backup has taken everything before {due}: it is another "
                "topic, or what follows was deleted unread. Delete it, and restore without --inputs-kept"
            )
        usage = each.usage
        if usage is None or usage.topic != topic or usage.offset < first:
            return
        if await _message_at(reader, topic, each.number, usage.offset) != usage.value:
            raise RefusedToStart(
                f"{where}, offset {usage.offset}, is not what the ledger has taken from there: it is another topic. Delete it, "
                "and restore without --inputs-kept"
            )

    # --- writing ---

    async def write(self, partitions: list[_Partition]) -> None:
        writer = KafkaLogWriter(self.settings.kafka)
        try:
            for each in partitions:
                await self._write_backup(writer, each)
            for each in partitions:
                if not each.generation:
                    await _append(writer, self.topic, each.number, each.end, [each.founding_stored])
        finally:
            await writer.close(self.settings.kafka.request_timeout_ms / 1000)

    async def _write_backup(self, writer: KafkaLogWriter, each: _Partition) -> None:
        if each.start == each.end:
            return
        batch: list[bytes] = []
        size, first = 0, each.start
        for message in self._messages(each.backup):
            if message.offset < each.start:
                continue
            batch.append(message.value)
            size += len(message.value)
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_MESSAGES:
                await _append(writer, self.topic, each.number, first, batch)
                batch, size, first = [], 0, message.offset + 1
        await _append(writer, self.topic, each.number, first, batch)


async def _message_at(reader: KafkaLogReader, topic: str, partition: int, offset: int) -> bytes | None:
    async for chunk in reader.read(topic, partition, offset, offset + 1):
        return chunk[0][1]
    return None


async def _append(writer: KafkaLogWriter, topic: str, partition: int, first: int, values: list[bytes]) -> None:
    """Each must get the offset that it had. Their time is now: retention counts from when this cluster got them."""
    if not values:
        return
    offsets: list[int] = []
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_done(offset: int, problem: str) -> None:
        offsets.append(offset)
        if done.done():
            return
        if problem:
            done.set_exception(WorkerError(f"{topic}[{partition}] could not be written ({problem}); run it again: it goes on"))
        elif len(offsets) == len(values):
            done.set_result(None)

    for value in values:
        writer.write(topic, partition, value, on_done)
    await done
    if offsets != list(range(first, first + len(values))):
        raise RefusedToStart(
            f"{topic}[{partition}]: a message got another offset than {first} to {first + len(values) - 1}: somebody else "
            "wrote at the same time. Stop whoever does, delete the topic, and run it again"
        )
