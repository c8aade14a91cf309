"""What a takeover refused: counted, the first few and the last named, told once."""

from __future__ import annotations

from collections.abc import Iterable

from billing.limits import REFUSED_RECORDS_NAMED
from billing.v1.ledger_pb2 import RefusedRecord
from stream_processors.untold import Untold


def refused(offsets: Iterable[int]) -> Untold:
    untold = Untold()
    for offset in offsets:
        untold.add(RefusedRecord(offset=offset))
    return untold


def offsets(untold: Untold) -> list[int]:
    return [each.offset for each in untold.named]


def test_the_first_few_and_the_last_are_named_and_all_are_counted() -> None:
    untold = Untold()
    named = [untold.add(RefusedRecord(offset=offset)) for offset in range(100)]
    assert (offsets(untold), untold.records) == ([*range(REFUSED_RECORDS_NAMED - 1), 99], 100)
    assert named == [True] * REFUSED_RECORDS_NAMED + [False] * 90


def test_what_was_told_is_left_out() -> None:
    for last in (3, REFUSED_RECORDS_NAMED - 1, 99):
        untold = refused(range(last + 1))
        untold.leave_told(refused(range(last + 1)).named)
        assert (offsets(untold), untold.records) == ([], 0)
    # Two came between the takeover and its record.
    untold = refused(range(6))
    untold.leave_told(refused(range(4)).named)
    assert (offsets(untold), untold.records) == ([4, 5], 2)
    assert untold.add(RefusedRecord(offset=8))
    assert untold.records == 3


def test_where_not_all_can_be_named_all_are_told_again_rather_than_some_never() -> None:
    untold = refused(range(100))
    untold.leave_told(refused(range(50)).named)
    assert (untold.records, untold.named[-1].offset) == (100, 99)
    untold.leave_told(untold.named)
    assert untold.records == 0
