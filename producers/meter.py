"""The meter: what a server that serves models calls for each request.

Promise: `record` costs the caller a few microseconds and returns a receipt; the event is on disk when the receipt says so, and
reaches the ledger once, whatever then dies. An event that cannot be billed (`InvalidEvent`) or kept (`JournalFull`) is refused
in the call, so that the caller can refuse the work.

For work that streams, `open` before it begins, `progress` while it runs, `close` with the final event. If the process dies in
between, the next one turns what the last progress said into an event with OUTCOME_INTERRUPTED: delivered work is billed, work
that was never delivered is not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from billing.identity import partition_of
from billing.rating import token_quantities
from billing.v1.usage_pb2 import OUTCOME_INTERRUPTED, UsageEvent
from billing.validation import event_problem
from producers.errors import InvalidEvent, RequestClosed
from producers.journal import EVENT_BYTES_MAX, Journal, JournalSettings
from producers.receipt import Receipt

__all__ = ["MeterSettings", "OpenRequest", "Receipt", "UsageMeter"]


@dataclass(frozen=True)
class MeterSettings:
    """Where the journal is and what bounds it: see `JournalSettings`. `partitions` is the ledger's N."""

    journal_path: Path
    partitions: int
    producer_id: str = ""
    producer_id_prefix: str = ""
    journal_bytes_max: int = 1 << 30
    pending_bytes_max: int = 64 << 20


class UsageMeter:
    """Every method may be called from any thread."""

    def __init__(self, settings: MeterSettings) -> None:
        """Opens the journal. Raises what `Journal` raises."""
        self.settings = settings
        self.journal = Journal(
            settings.journal_path,
            JournalSettings(
                partitions=settings.partitions,
                producer_id=settings.producer_id,
                producer_id_prefix=settings.producer_id_prefix,
                journal_bytes_max=settings.journal_bytes_max,
                pending_bytes_max=settings.pending_bytes_max,
            ),
        )

    def record(self, event: UsageEvent) -> Receipt:
        """Take one event. Raises `InvalidEvent`, `JournalFull`, `JournalClosed`."""
        return self.journal.append(self._partition(event), _serialized(event))

    def open(self, event: UsageEvent) -> OpenRequest:
        """Take a request before its work begins: wait for its receipt, then forward. `event` says what it has used so far:
        nothing, as a rule, and then a machine that loses its power may lose the opening."""
        partition = self._partition(event)
        has_usage = bool(event.units) or any(token_quantities(event))
        slot, receipt = self.journal.open(partition, _interrupted(event), has_usage=has_usage)
        return OpenRequest(self.journal, slot, partition, event, receipt)

    def recover(self, timeout_s: float = 30.0) -> int:
        """Turn what an earlier process left open into durable events; how many there were. Call it at the start.

        Where the disk refuses (`JournalFull`), they stay as they are and it may be called again.
        """
        left = self.journal.left_open()
        receipts = {self.journal.close_request(row.slot, row.partition, row.event) for row in left}
        deadline = time.monotonic() + timeout_s
        for receipt in receipts:
            receipt.durable(max(0.0, deadline - time.monotonic()))
        return len(left)

    def metrics(self) -> dict[str, int]:
        """Counts since this process opened the journal, and how much it holds now."""
        return {
            **self.journal.metrics(),
            "oldest_unacknowledged_ms": self.journal.oldest_unacknowledged_ms(time.time_ns() // 1_000_000),
        }

    def close(self, timeout_s: float = 30.0) -> None:
        """Make durable what was recorded, then let go of the journal; close its publisher first. Raises `JournalError`."""
        self.journal.close(timeout_s)

    def _partition(self, event: UsageEvent) -> int:
        return partition_of(event.tenant_id, self.settings.partitions)


class OpenRequest:
    """A request whose work runs. Its `receipt` says when it is open on disk."""

    __slots__ = ("_closing", "_identity", "_journal", "_partition", "_slot", "receipt")

    def __init__(self, journal: Journal, slot: int, partition: int, event: UsageEvent, receipt: Receipt) -> None:
        self._journal = journal
        self._slot = slot
        self._partition = partition
        self._identity = (event.tenant_id, event.request_id)
        self._closing: Receipt | None = None
        self.receipt = receipt

    def progress(self, event: UsageEvent) -> Receipt:
        """What it has used by now; the latest wins. `ended_ms` 0 becomes the time of this call."""
        self._check(event)
        return self._journal.update(self._slot, self._partition, _interrupted(event))

    def close(self, event: UsageEvent) -> Receipt:
        """What it used in the end: it becomes a recorded event. Where the receipt fails, close may be called again."""
        self._check(event)
        self._closing = self._journal.close_request(self._slot, self._partition, _serialized(event))
        return self._closing

    def _check(self, event: UsageEvent) -> None:
        if self._closing is not None and not self._closing.has_failed:
            raise RequestClosed(f"request_id={self._identity[1]}: it is closed, its usage cannot change; open another request")
        if (event.tenant_id, event.request_id) != self._identity:
            raise InvalidEvent(
                f"tenant_id, request_id: {event.tenant_id!r}, {event.request_id!r} is another request than {self._identity!r}; "
                f"send each event to the request that was opened for it"
            )


def _serialized(event: UsageEvent) -> bytes:
    # Deterministic: the fingerprint of an event that is sent again must be that of the first time.
    data = event.SerializeToString(deterministic=True)
    if problem := event_problem(event, len(data)):
        raise InvalidEvent(problem)
    if len(data) > EVENT_BYTES_MAX:
        raise InvalidEvent(
            f"attributes: the event has {len(data)} bytes, a batch takes {EVENT_BYTES_MAX}; send less beside the counts"
        )
    return data


def _interrupted(event: UsageEvent) -> bytes:
    """The event as it is to be billed if this process dies now: made here, so that recovering is a move and cannot fail."""
    if event.outcome == OUTCOME_INTERRUPTED and event.ended_ms:
        return _serialized(event)
    copy = UsageEvent()
    copy.CopyFrom(event)
    copy.outcome = OUTCOME_INTERRUPTED
    if not copy.ended_ms:
        copy.ended_ms = max(copy.started_ms, time.time_ns() // 1_000_000)
    return _serialized(copy)
