"""How far one partition's events have come, as plain state: sent, acknowledged by Kafka, covered by the ledger.

    freed ≤ covered ≤ acknowledged ≤ sent ≤ assigned      (sequence numbers)

Only the ledger's own word moves `covered` on, and only `covered` frees the journal. Everything that says that Kafka or the
ledger may have lost something moves `sent` back, and the events between go out again: that is harmless, the ledger charges
each request once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Delivery"]

_RESEND_ROUNDS_MAX = 5
# While the ledger is at work on what was sent, more is gathered before it is sent: a record costs as much as a hundred events,
# and records that come faster than they are taken only wait in a line.
_BUSY_LINGERS = 5


@dataclass(slots=True)
class Delivery:
    """One partition. Times are monotonic seconds."""

    partition: int
    covered: int
    sent: int
    acknowledged: int
    # The highest ever sent by this process: below it, sending is sending again.
    furthest: int
    # Changes whenever `sent` goes back: what was in flight before then says nothing about the order any more.
    epoch: int = 0
    generation: bytes = b""
    kafka_offset: int = -1
    # Since when there is something to send, something acknowledged that the ledger does not cover, nothing sent.
    unsent_since: float | None = None
    uncovered_since: float | None = None
    sent_at: float = -math.inf
    not_before: float = 0.0
    resend_round: int = 0
    numbering_conflict: bool = False

    @classmethod
    def begin(cls, partition: int, freed: int) -> Delivery:
        """After a start: what was sent before and is still in the journal goes out again unless the ledger covers it."""
        return cls(partition, covered=freed, sent=freed, acknowledged=freed, furthest=freed)

    def go_back(self, sequence: int) -> bool:
        """Send again what follows `sequence`; whether there is anything."""
        if sequence >= self.sent:
            return False
        self.sent = sequence
        self.acknowledged = min(self.acknowledged, sequence)
        self.epoch += 1
        self.uncovered_since = None
        return True

    def on_sent(self, last: int, now: float) -> None:
        self.sent = last
        self.furthest = max(self.furthest, last)
        self.sent_at = now
        self.unsent_since = None

    def on_acknowledged(self, last: int, epoch: int, offset: int, now: float) -> bool:
        """Kafka has it. False when the offset shows that Kafka has begun a new log: then what is not covered may be gone."""
        if epoch == self.epoch:
            self.acknowledged = max(self.acknowledged, last)
            if self.uncovered_since is None and self.acknowledged > self.covered:
                self.uncovered_since = now
        if offset < 0:
            return True
        is_same_log = offset > self.kafka_offset
        self.kafka_offset = offset
        return is_same_log

    def on_progress(self, covered: int, generation: bytes, highest: int, freed: int, now: float) -> bool:
        """The ledger's word. False when it is the word of another ledger: then everything that is not freed goes out again."""
        is_same = generation == self.generation or not self.generation
        self.generation = generation
        if covered > highest:
            # Not our numbers: another journal has this producer ID, or this journal was restored from a copy.
            self.numbering_conflict = True
        if self.numbering_conflict:
            return is_same
        if not is_same:
            self.covered = max(freed, covered)
        elif covered <= self.covered:
            return True
        self.covered = max(self.covered, covered)
        self.resend_round = 0
        self.acknowledged = max(self.acknowledged, self.covered)
        self.sent = max(self.sent, self.covered)
        self.uncovered_since = now if self.acknowledged > self.covered else None
        return is_same

    def linger_s(self, linger_ms: int) -> float:
        """How long to gather what is to be sent together, where that is `linger_ms` while nothing is under way."""
        return linger_ms * (_BUSY_LINGERS if self.sent > self.covered else 1) / 1_000

    def on_freed(self, freed: int) -> None:
        """The journal no longer has what was to be sent again."""
        self.sent = max(self.sent, freed)
        self.acknowledged = max(self.acknowledged, freed)

    def is_overdue(self, bound_s: float, now: float) -> bool:
        """Whether the ledger has left uncovered for too long what Kafka acknowledged. The bound doubles each time."""
        return self.uncovered_since is not None and now - self.uncovered_since >= bound_s * 2**self.resend_round

    def on_overdue(self) -> None:
        self.resend_round = min(self.resend_round + 1, _RESEND_ROUNDS_MAX)
