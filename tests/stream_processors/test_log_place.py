"""Where a noted place stands in a log: what was deleted in front of it, cut behind it, or written late to a log made anew."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest

from billing.chain import record_hash
from billing.founding import found_again
from billing.v1.account_pb2 import LedgerPosition, Progress
from billing.v1.ledger_pb2 import LedgerRecord
from stream_processors.log_place import LogPlace, Standing, find_place
from tests.billing.ledgers import KEYS, NOW_MS, Ledger, batch, tenants_in, usage

LOST = LogPlace(Standing.LOST)


class Log:
    """A partition's log in memory that begins at `first`."""

    def __init__(self, first: int, values: Sequence[bytes]) -> None:
        self.first, self.values = first, values

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        return self.first, self.first + len(self.values)

    async def read(self, topic: str, partition: int, start: int, end: int) -> AsyncIterator[Sequence[tuple[int, bytes]]]:
        for offset in range(max(start, self.first), min(end, self.first + len(self.values))):
            yield [(offset, self.values[offset - self.first])]


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    made = Ledger()
    made.price()
    for number in range(4):
        made.usage(batch([usage(f"r{number}", tenants_in(1)[0])]))
    return made


def place_of(ledger: Ledger, sequence: int) -> Progress:
    """The place of a reader that has taken that record, which stands at the offset that is its number."""
    stored = ledger.stored[sequence]
    record = LedgerRecord.FromString(stored)
    return Progress(
        partition=record.partition,
        position=LedgerPosition(generation=record.generation, sequence=sequence),
        record_hash=record_hash(stored),
        ledger_offset=sequence,
    )


async def look(ledger: Ledger, sequence: int, first: int, values: Sequence[bytes]) -> LogPlace:
    log, place = Log(first, values), place_of(ledger, sequence)
    return await find_place(log, "ledger", place, KEYS.seal_key, *await log.bounds("ledger", place.partition))


async def test_a_record_that_is_there_and_one_right_behind_what_was_deleted_fit(ledger: Ledger) -> None:
    stored = ledger.stored
    assert await look(ledger, 2, 0, stored) == LogPlace(Standing.FITS, 3)
    assert await look(ledger, 2, 3, stored[3:]) == LogPlace(Standing.FITS, 3), "retention deleted all up to the place"
    assert await look(ledger, 1, 3, stored[3:]) == LogPlace(Standing.TOO_OLD)


async def test_a_log_that_was_cut_is_lost_also_where_the_next_record_came_late_to_its_beginning(ledger: Ledger) -> None:
    stored = ledger.stored
    assert await look(ledger, 2, 0, stored[:2]) == LOST
    assert await look(ledger, 2, 0, []) == LOST
    # A writer had the next record in flight when the topic was made anew: it follows, and stands where nothing of it may.
    assert await look(ledger, 2, 0, stored[3:4]) == LOST
    assert await look(ledger, 2, 0, stored[3:]) == LOST
    assert await look(ledger, 2, 2, stored[3:]) == LOST, "a hole where the place was"


async def test_a_log_that_was_founded_again_on_the_place_fits_wherever_it_begins(ledger: Ledger) -> None:
    _, founding = found_again(ledger.state, b"n" * 16, NOW_MS, KEYS.seal_key, "test")
    last = ledger.state.sequence
    assert await look(ledger, last, 0, [founding]) == LogPlace(Standing.FITS, 0)
    assert await look(ledger, last - 1, 0, [founding]) == LogPlace(Standing.OTHER_GENERATION)
