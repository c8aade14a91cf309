"""What a producer's numbering proves: which of its events the ledger has, and which are missing.

A sequence number is evidence, never a reason to drop: identity is the request ID.
"""

from __future__ import annotations

from billing.limits import PRODUCER_RANGES_MAX
from billing.v1.ledger_pb2 import ProducerMark, SequenceRange


class ProducerSequences:
    """The numbers of one producer in one partition: covered without a gap, and ranges beyond the first hole."""

    __slots__ = ("beyond", "covered", "highest", "missing_since_ms", "producer_id", "seen_ms")

    def __init__(self, producer_id: str) -> None:
        self.producer_id = producer_id
        self.covered = 0
        self.beyond: list[tuple[int, int]] = []
        self.highest = 0
        self.seen_ms = 0
        self.missing_since_ms = 0

    def take(self, first: int, count: int, highest: int, log_time_ms: int) -> None:
        """Note a batch: events first … first + count - 1 are in the ledger, `highest` was assigned by then."""
        if count and first > 0:
            self._cover(first, first + count - 1)
        last_known = self.beyond[-1][1] if self.beyond else self.covered
        self.highest = max(self.highest, highest, last_known)
        self.seen_ms = log_time_ms
        if self.covered >= self.highest:
            self.missing_since_ms = 0
        elif not self.missing_since_ms:
            self.missing_since_ms = log_time_ms

    def _cover(self, first: int, last: int) -> None:
        if first <= self.covered + 1:
            self.covered = max(self.covered, last)
        else:
            self.beyond = _merged([*self.beyond, (first, last)])
        while self.beyond and self.beyond[0][0] <= self.covered + 1:
            self.covered = max(self.covered, self.beyond.pop(0)[1])
        if len(self.beyond) > PRODUCER_RANGES_MAX:
            # Forget the furthest range: its events are in the ledger all the same, and the producer sends them again.
            self.beyond.pop()

    def missing(self) -> list[tuple[int, int]]:
        """The ranges that the ledger lacks, of what it knows to have been assigned."""
        holes = []
        next_expected = self.covered + 1
        for first, last in self.beyond:
            holes.append((next_expected, first - 1))
            next_expected = last + 1
        if next_expected <= self.highest:
            holes.append((next_expected, self.highest))
        return holes

    def to_mark(self) -> ProducerMark:
        """The contract form."""
        return ProducerMark(
            producer_id=self.producer_id,
            covered_sequence=self.covered,
            beyond=[SequenceRange(first=first, last=last) for first, last in self.beyond],
            highest_sequence=self.highest,
            seen_ms=self.seen_ms,
            missing_since_ms=self.missing_since_ms,
        )

    @classmethod
    def from_mark(cls, mark: ProducerMark) -> ProducerSequences:
        """The state that `mark` states."""
        sequences = cls(mark.producer_id)
        sequences.covered = mark.covered_sequence
        sequences.beyond = [(r.first, r.last) for r in mark.beyond]
        sequences.highest = mark.highest_sequence
        sequences.seen_ms = mark.seen_ms
        sequences.missing_since_ms = mark.missing_since_ms
        return sequences


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged
