"""What a producer's numbering proves: which of its events the ledger has, and which are missing.

A sequence number is evidence, never a reason to drop: identity is the request ID. Nor is a hole a loss yet: batches may come
out of order, and what Kafka or the ledger lost is sent again. So each hole has the log time since when it has been one, and the
tail (announced, not come) the time since when nothing of it came; `completeness` says when that is too long.
"""

from __future__ import annotations

from typing import NamedTuple

from billing.limits import ID_CHARS_MAX, PRODUCER_RANGES_MAX, SEQUENCE_MAX
from billing.v1.ledger_pb2 import ProducerMark, SequenceRange
from billing.v1.usage_pb2 import UsageBatch


class Hole(NamedTuple):
    """Numbers that were assigned and are not in the ledger, both ends included."""

    first: int
    last: int
    # Log time.
    since_ms: int

    @property
    def numbers(self) -> int:
        return self.last - self.first + 1


def is_numbered(batch: UsageBatch) -> bool:
    """Whether the batch's numbers say something. Nonsense ones are passed over; its events are judged all the same."""
    return (
        0 < len(batch.producer_id) <= ID_CHARS_MAX
        and batch.first_sequence <= SEQUENCE_MAX
        and batch.highest_sequence <= SEQUENCE_MAX
    )


def first_number(batch: UsageBatch) -> int:
    """The number of the batch's first event; 0: it is not numbered."""
    return batch.first_sequence if is_numbered(batch) else 0


class ProducerSequences:
    """The numbers of one producer in one partition: covered without a gap, and ranges beyond the first hole."""

    __slots__ = (
        "alerted_ms",
        "alerted_through",
        "beyond",
        "closed",
        "covered",
        "heartbeats",
        "highest",
        "producer_id",
        "retired_through",
        "seen_ms",
        "silent_ms",
        "tail_since_ms",
    )

    def __init__(self, producer_id: str) -> None:
        self.producer_id = producer_id
        self.covered = 0
        # First, last, and since when the hole before it is one.
        self.beyond: list[tuple[int, int, int]] = []
        self.highest = 0
        self.seen_ms = 0
        self.tail_since_ms = 0
        # It sends heartbeats, so its silence says something; unless its last word was that it ends.
        self.heartbeats = False
        self.closed = False
        # What is missing up to here does not come any more, an operator said.
        self.retired_through = 0
        # What was told: missing numbers up to here, when last; since when it is silent.
        self.alerted_through = 0
        self.alerted_ms = 0
        self.silent_ms = 0

    @property
    def last_known(self) -> int:
        """The highest number that is in the ledger."""
        return self.beyond[-1][1] if self.beyond else self.covered

    def take(self, first: int, count: int, highest: int, log_time_ms: int, *, closed: bool = False) -> None:
        """Note a batch: events first … first + count - 1 are in the ledger, `highest` was assigned by then."""
        known_before = self.last_known
        self.highest = max(self.highest, highest)
        if count and first > 0:
            self._cover(first, first + count - 1, log_time_ms)
            self.highest = max(self.highest, first + count - 1)
        last_known = self.last_known
        self.seen_ms = log_time_ms
        self.heartbeats = self.heartbeats or not count
        self.closed = closed
        if last_known >= self.highest:
            self.tail_since_ms = 0
        elif last_known > known_before or not self.tail_since_ms:
            # A backlog that is being sent is no loss: what counts is how long nothing of it has come.
            self.tail_since_ms = log_time_ms

    def _cover(self, first: int, last: int, log_time_ms: int) -> None:
        if first <= self.covered + 1:
            self.covered = max(self.covered, last)
        else:
            self._add_beyond(first, last, log_time_ms)
        while self.beyond and self.beyond[0][0] <= self.covered + 1:
            self.covered = max(self.covered, self.beyond.pop(0)[1])
        if len(self.beyond) > PRODUCER_RANGES_MAX:
            # Forget the furthest range: its events are in the ledger all the same, and the producer sends them again.
            self.beyond.pop()

    def _add_beyond(self, first: int, last: int, log_time_ms: int) -> None:
        before = [entry for entry in self.beyond if entry[1] + 1 < first]
        after = [entry for entry in self.beyond if entry[0] > last + 1]
        joined = self.beyond[len(before) : len(self.beyond) - len(after)]
        # What lands within a hole leaves two that are as old as it was.
        older = joined or after
        since_ms = older[0][2] if older else log_time_ms
        if joined:
            first, last = min(first, joined[0][0]), max(last, joined[-1][1])
        self.beyond = [*before, (first, last, since_ms), *after]

    def retire(self) -> None:
        """Its numbers that are missing now are given up, and its silence is expected."""
        self.retired_through = self.highest
        self.closed = True

    def missing(self) -> list[Hole]:
        """The ranges that the ledger lacks, of what it knows to have been assigned and nobody has given up."""
        if not self.beyond and not self.tail_since_ms:
            return []
        holes = []
        next_expected = max(self.covered, self.retired_through) + 1
        for first, last, since_ms in [*self.beyond, (self.highest + 1, self.highest + 1, self.tail_since_ms)]:
            if next_expected < first:
                holes.append(Hole(next_expected, first - 1, since_ms))
            next_expected = max(next_expected, last + 1)
        return holes

    @property
    def missing_since_ms(self) -> int:
        """Since when something is missing, or under way; 0 when nothing is."""
        holes = self.missing()
        return holes[0].since_ms if holes else 0

    def to_mark(self) -> ProducerMark:
        """The contract form."""
        return ProducerMark(
            producer_id=self.producer_id,
            covered_sequence=self.covered,
            beyond=[SequenceRange(first=first, last=last, since_ms=since_ms) for first, last, since_ms in self.beyond],
            highest_sequence=self.highest,
            seen_ms=self.seen_ms,
            missing_since_ms=self.missing_since_ms,
            tail_since_ms=self.tail_since_ms,
            heartbeats=self.heartbeats,
            closed=self.closed,
            retired_through=self.retired_through,
            alerted_through=self.alerted_through,
            alerted_ms=self.alerted_ms,
            silent_ms=self.silent_ms,
        )

    @classmethod
    def from_mark(cls, mark: ProducerMark) -> ProducerSequences:
        """The state that `mark` states."""
        sequences = cls(mark.producer_id)
        sequences.covered = mark.covered_sequence
        sequences.highest = mark.highest_sequence
        sequences.seen_ms = mark.seen_ms
        # A mark of an earlier version says since when something was missing, and not which hole.
        sequences.beyond = [(r.first, r.last, r.since_ms or mark.seen_ms) for r in mark.beyond]
        sequences.tail_since_ms = mark.tail_since_ms
        if sequences.last_known < mark.highest_sequence:
            sequences.tail_since_ms = mark.tail_since_ms or mark.seen_ms
        sequences.heartbeats = mark.heartbeats
        sequences.closed = mark.closed
        sequences.retired_through = mark.retired_through
        sequences.alerted_through = mark.alerted_through
        sequences.alerted_ms = mark.alerted_ms
        sequences.silent_ms = mark.silent_ms
        return sequences
