"""What readers have taken, held against a log in memory; and how much of usage.progress is read for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest

from billing.chain import record_hash
from billing.v1.account_pb2 import LedgerPosition, Progress
from stream_processors import reader_marks
from stream_processors.errors import RefusedToStart
from stream_processors.reader_marks import check_readers, last_marks
from tests.billing.ledgers import KEYS, Ledger, batch, tenants_in, usage
from tests.stream_processors.test_ledger_host import MemoryLogs

PARTITION = 1
TENANT = tenants_in(PARTITION)[0]


class CountingLogs(MemoryLogs):
    def __init__(self) -> None:
        super().__init__()
        self.read_messages = 0

    async def read(self, topic: str, partition: int, start: int, end: int) -> AsyncIterator[Sequence[tuple[int, bytes]]]:
        async for chunk in super().read(topic, partition, start, end):
            self.read_messages += len(chunk)
            yield chunk


def mark(reader: str, offset: int) -> bytes:
    return Progress(partition=PARTITION, reader=reader, ledger_offset=offset).SerializeToString()


async def test_the_last_messages_are_read_and_all_of_them_where_the_publisher_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader_marks, "_RECENT_MESSAGES", 10)
    logs = CountingLogs()
    progress = logs.log("progress", PARTITION)
    progress += [mark("publisher", 1), mark("sink/a", 2), *(mark("sink/a", number) for number in range(3, 40))]
    found = await last_marks(logs, "progress", PARTITION)
    assert {name: one.ledger_offset for name, one in found.items()} == {"publisher": 1, "sink/a": 39}
    assert logs.read_messages == 39
    progress.append(mark("publisher", 40))
    logs.read_messages = 0
    found = await last_marks(logs, "progress", PARTITION)
    assert {name: one.ledger_offset for name, one in found.items()} == {"publisher": 40, "sink/a": 39}
    assert logs.read_messages == 10


async def test_a_mark_beyond_the_end_or_of_another_record_is_refused_and_what_says_nothing_is_not() -> None:
    ledger = Ledger(PARTITION)
    ledger.tenant(TENANT)
    other = Ledger(PARTITION)
    other.tenant(TENANT)
    for number in range(4):
        ledger.usage(batch([usage(f"a-{number}", TENANT)]))
        other.usage(batch([usage(f"b-{number}", TENANT)]))
    logs = MemoryLogs()
    logs.log("ledger", PARTITION).extend(ledger.stored[:4])
    records = ledger.records()
    reached = LedgerPosition(generation=records[3].generation, sequence=3)

    async def check(of: Ledger, sequence: int, *, generation: bytes = records[0].generation, offset: int | None = None) -> None:
        place = Progress(
            partition=PARTITION,
            reader="sink/a",
            position=LedgerPosition(generation=generation, sequence=sequence),
            record_hash=record_hash(of.stored[sequence]),
            ledger_offset=sequence if offset is None else offset,
        )
        await check_readers(logs, "ledger", {"sink/a": place}, reached, KEYS.seal_key)

    await check(ledger, 3)
    await check(ledger, 1)
    # It was handed the records, and does not know where they lie; it is of a ledger that has been founded again since.
    await check(ledger, 3, offset=-1)
    await check(other, 5, generation=b"o" * 16)
    for of, sequence, offset in ((ledger, 4, None), (ledger, 5, None), (other, 3, None), (ledger, 4, -1)):
        with pytest.raises(RefusedToStart, match=f"the reader sink/a has taken sequence {sequence} at offset"):
            await check(of, sequence, offset=offset)
