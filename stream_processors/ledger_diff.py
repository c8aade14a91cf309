"""What this version would have written: every input of a ledger through its step again, held against the records there are.

For an upgrade: run it with the new version before a worker does. Promise: it reads and changes nothing. Each record is compared
by meaning, field by field; a difference does not spread, because the next input is taken on the state that the log states. An
input of which the ledger kept only the beginning (a rejected message over 64 KiB) is passed over and counted. Memory: the
dedupe keys of the log, twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from billing import replay
from billing.chain import Chain, UnreadableRecord
from billing.commands import key_id_of
from billing.key_ring import Keys
from billing.state import LedgerState, MemorySeenKeys
from billing.step import CommandInput, Input, LedgerKeys, TickInput, UsageInput, step
from billing.v1.command_pb2 import SignedCommand
from billing.v1.ledger_pb2 import LedgerRecord
from stream_processors.errors import RefusedToStart
from stream_processors.known_fields import unknown_bytes
from stream_processors.ledger_host import LogReader
from stream_processors.settings import TopicNames

__all__ = ["Difference", "LedgerDiff", "compare", "input_of"]

_SHOWN_CHARS_MAX = 120
# They follow from the others.
_SEALS = frozenset({"previous_hash", "seal"})


@dataclass(frozen=True, slots=True)
class Difference:
    """One field of one record. `field` is its path, such as usage.cost_pico_low[3]."""

    partition: int
    sequence: int
    field: str
    stored: str
    made: str

    def __str__(self) -> str:
        return f"partition {self.partition}, record {self.sequence}: {self.field}: stored {self.stored}, now {self.made}"


@dataclass(slots=True)
class LedgerDiff:
    """What came of it."""

    records: int = 0
    skipped: int = 0
    differing_records: int = 0
    differences: list[Difference] = field(default_factory=list)


async def compare(
    reader: LogReader,
    names: TopicNames,
    partition: int,
    keys: LedgerKeys,
    found: LedgerDiff,
    *,
    differing_records_max: int = 100,
    on_record: Callable[[], None] = lambda: None,
) -> None:
    """Add to `found` what one partition gives. RefusedToStart where the log cannot be read from its beginning."""
    first, end = await reader.bounds(names.ledger, partition)
    where = f"{names.ledger}[{partition}]"
    follow = Chain(partition, keys.seal_key)
    worker = _Again(partition, names, keys)
    async for chunk in reader.read(names.ledger, partition, first, end):
        for offset, stored in chunk:
            try:
                record = follow.accept(stored)
            except UnreadableRecord as error:
                raise RefusedToStart(f"{where}, offset {offset}: {error}") from error
            if record is None and not worker.is_founded:
                raise RefusedToStart(
                    f"{where} begins at offset {first} without its founding record: what came before was deleted; "
                    "compare on a copy of the log that has it"
                )
            if record is not None:
                worker.take(record, stored, found)
                on_record()
            if found.differing_records >= differing_records_max:
                return


class _Again:
    """One partition: the state that the log states, and the one on which the next input is taken."""

    def __init__(self, partition: int, names: TopicNames, keys: LedgerKeys) -> None:
        self._partition = partition
        self._names = names
        self._keys = keys
        self._stated = LedgerState(MemorySeenKeys())
        self._taken = LedgerState(MemorySeenKeys())

    @property
    def is_founded(self) -> bool:
        return self._stated.founded

    def take(self, record: LedgerRecord, stored: bytes, found: LedgerDiff) -> None:
        found.records += 1
        source = None if record.HasField("founding") else input_of(record, self._names, self._keys.command_key)
        replay.apply(self._stated, record, stored)
        if source is None:
            found.skipped += not record.HasField("founding")
            replay.apply(self._taken, record, stored)
            return
        result = step(self._taken, source, record.log_time_ms, keys=self._keys, writer=record.writer)
        if result.stored == stored:
            return
        differences = list(_differences(LedgerRecord.FromString(stored), LedgerRecord.FromString(result.stored), ""))
        if differences:
            found.differing_records += 1
            found.differences += [Difference(self._partition, record.sequence, *each) for each in differences]
            self._taken = copy.deepcopy(self._stated)
        # Where only the encoding is another, the chain goes on from what is stored.
        self._taken.record_hash = self._stated.record_hash


def input_of(record: LedgerRecord, names: TopicNames, command_keys: Keys | None = None) -> Input | None:
    """What the record was made from; None: not all of it was kept. With the keys, a command names the one that signed it."""
    offsets = {position.topic: position.offset for position in record.inputs}
    match record.WhichOneof("source"):
        case "usage":
            return UsageInput(names.events, offsets[names.events], record.usage.batch)
        case "command":
            command, signature = record.command.command, record.command.signature
            key_id = "" if command_keys is None else key_id_of(command, signature, command_keys)
            signed = SignedCommand(command=command, signature=signature, key_id=key_id)
            return CommandInput(names.commands, offsets[names.commands], signed.SerializeToString())
        case "tick":
            tick = record.tick
            return TickInput(tick.snapshot if tick.HasField("snapshot") else None, tick.refused, tick.refused_records)
        case "rejected" if record.rejected.payload_bytes == len(record.rejected.payload):
            rejected = record.rejected
            kind = UsageInput if rejected.topic == names.events else CommandInput
            return kind(rejected.topic, rejected.offset, rejected.payload)
    return None


def _differences(stored: Message, made: Message, path: str) -> Iterator[tuple[str, str, str]]:
    """Field, what is stored, what was made now."""
    for each in stored.DESCRIPTOR.fields:
        name = f"{path}{each.name}"
        if not path and each.name in _SEALS:
            continue
        one, other = getattr(stored, each.name), getattr(made, each.name)
        if one == other:
            continue
        is_map = each.message_type is not None and each.message_type.GetOptions().map_entry
        if not each.is_repeated and each.message_type is not None:
            yield from _differences(one, other, f"{name}.")
        elif each.is_repeated and not is_map and len(one) == len(other):
            for index, (left, right) in enumerate(zip(one, other, strict=True)):
                if left != right and each.message_type is not None:
                    yield from _differences(left, right, f"{name}[{index}].")
                elif left != right:
                    yield f"{name}[{index}]", _shown(left), _shown(right)
        elif each.is_repeated:
            yield name, f"{len(one)}: {_shown(one)}", f"{len(other)}: {_shown(other)}"
        else:
            yield name, _shown(one), _shown(other)
    if not path and (kept := unknown_bytes(stored)) != (now := unknown_bytes(made)):
        yield "fields that this version does not know", f"{kept} bytes", f"{now} bytes"


def _shown(value: Any) -> str:
    text = value.hex() if isinstance(value, bytes) else " ".join(str(value).split())
    return text if len(text) <= _SHOWN_CHARS_MAX else f"{text[:_SHOWN_CHARS_MAX]}…"
