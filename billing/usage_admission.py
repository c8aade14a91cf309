"""Which events of a batch are charged, and what becomes of the others: every one of them is named in the record.

The checks go over whole columns. Only a batch in which something is unusual (a duplicate, a far time, a wrong partition, a
field over its bound) is looked at event by event.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from billing.abuse import Evidence
from billing.amounts import to_amount
from billing.identity import identities, partition_of
from billing.limits import BATCH_BYTES_MAX, ID_CHARS_MAX, SCHEMA_VERSION
from billing.rating import event_cost_pico
from billing.registrations import SIGNATURE_BYTES
from billing.state import LedgerState
from billing.usage_columns import UsageColumns
from billing.v1.ledger_pb2 import (
    DROP_REASON_CONFLICT,
    DROP_REASON_DUPLICATE,
    DROP_REASON_FOREIGN_TENANT,
    DROP_REASON_FORWARDED,
    DROP_REASON_INVALID,
    DROP_REASON_TOO_FAR_IN_FUTURE,
    DROP_REASON_TOO_OLD,
    Dropped,
    DropReason,
)
from billing.v1.usage_pb2 import RawUsageBatch, UsageBatch
from billing.validation import event_problem


@dataclass(frozen=True, slots=True)
class Forward:
    """Events that were sent to the wrong partition: `value` is a UsageBatch for `partition`."""

    partition: int
    value: bytes


class Admission:
    """One batch at the door. What it finds of each tenant is `evidence`, for the abuse rules."""

    def __init__(
        self, state: LedgerState, columns: UsageColumns, log_time_ms: int, foreign: frozenset[str], *, forwarded: bool
    ) -> None:
        self.evidence: defaultdict[str, Evidence] = defaultdict(Evidence)
        self.dropped: list[Dropped] = []
        self.duplicates = 0
        self.conflicts = 0
        self.digests, self.fingerprints = identities(
            state.settings.dedupe_key, columns.tenant_ids, columns.request_ids, columns.raws
        )
        self._state = state
        self._columns = columns
        self._log_time_ms = log_time_ms
        # Tenants that the producer may not bill.
        self._foreign = foreign
        # Another partition sent it on to this one.
        self._forwarded = forwarded
        # By partition: the bytes of events that live there.
        self._elsewhere: dict[int, list[bytes]] = {}

    def admit(self) -> Sequence[int]:
        """The indexes of the events that are charged; what happened to the others is in `dropped`."""
        settings, columns = self._state.settings, self._columns
        count = len(columns)
        if not count:
            return ()
        known = self._state.seen.find(self.digests)
        if (
            columns.well_formed()
            and known.count(None) == count
            and len(set(self.digests)) == count
            and columns.last_ended_ms <= self._log_time_ms + settings.future_alert_ms
            and columns.first_ended_ms >= self._log_time_ms - settings.dedupe_horizon_ms
            and all(map(self._lives_here, columns.tenants))
            and not self._foreign
        ):
            return range(count)
        return self._admit_each(known)

    def _lives_here(self, tenant_id: str) -> bool:
        return partition_of(tenant_id, self._state.settings.partitions) == self._state.partition

    def _admit_each(self, known: Sequence[bytes | None]) -> list[int]:
        columns = self._columns
        admitted: list[int] = []
        fresh: dict[bytes, bytes] = {}
        here = {tenant_id: self._lives_here(tenant_id) for tenant_id in columns.tenants}
        alert_after_ms = self._log_time_ms + self._state.settings.future_alert_ms
        oldest_ms = self._log_time_ms - self._state.settings.dedupe_horizon_ms
        for index, digest in enumerate(self.digests):
            tenant_id = columns.tenant_ids[index]
            if tenant_id in self._foreign:
                self._drop(
                    index,
                    DROP_REASON_FOREIGN_TENANT,
                    f"tenant_id: {tenant_id[:ID_CHARS_MAX]!r} is not one that this producer is registered for; register it for "
                    "the tenant, and import the event",
                )
                continue
            before = known[index] or fresh.get(digest)
            # What is remembered was well formed and in its place when it came: the cheap question comes first.
            if before is not None and before == self.fingerprints[index]:
                self._duplicate(index)
                continue
            problem = event_problem(columns.events[index])
            if problem is not None:
                self._drop(index, DROP_REASON_INVALID, problem)
            elif not here[tenant_id]:
                self._send_on(index)
            elif before is not None:
                self._conflict(index)
            elif oldest_ms <= columns.ended_ms[index] <= alert_after_ms or self._far_time_allowed(index):
                fresh[digest] = self.fingerprints[index]
                admitted.append(index)
        return admitted

    def _drop(self, index: int, reason: DropReason.ValueType, detail: str = "") -> Dropped:
        dropped = Dropped(index=index, reason=reason, detail=detail)
        self.dropped.append(dropped)
        return dropped

    def _duplicate(self, index: int) -> None:
        tenant_id = self._columns.tenant_ids[index]
        self.duplicates += 1
        self._state.account_of(tenant_id).duplicates += 1
        self.evidence[tenant_id].duplicates.append(self._columns.request_ids[index])
        self._drop(index, DROP_REASON_DUPLICATE)

    def _conflict(self, index: int) -> None:
        event = self._columns.events[index]
        account = self._state.account_of(event.tenant_id)
        self.conflicts += 1
        account.conflicts += 1
        self.evidence[event.tenant_id].conflicts.append(event.request_id)
        rate = self._state.books.rate(
            account.currency, event.ended_ms, event.model, event.operation, event.service_class, event.tenant_id
        )
        counted = self._state.quantities.counted(event, rate, account.currency, account.calendar)
        detail = f"request_id: {event.request_id} came before with another payload; the first stays charged"
        dropped = self._drop(index, DROP_REASON_CONFLICT, detail)
        dropped.would_have_cost.CopyFrom(to_amount(event_cost_pico(event, rate, counted)))

    def _send_on(self, index: int) -> None:
        tenant_id = self._columns.tenant_ids[index]
        partition = partition_of(tenant_id, self._state.settings.partitions)
        if self._forwarded:
            self._drop(
                index,
                DROP_REASON_INVALID,
                f"tenant_id: {tenant_id} lives in partition {partition}; it was sent on once already, partition by murmur2",
            )
            return
        self._elsewhere.setdefault(partition, []).append(self._columns.raws[index])
        self._drop(index, DROP_REASON_FORWARDED, f"partition {partition}")

    def _far_time_allowed(self, index: int) -> bool:
        settings = self._state.settings
        ended_ms = self._columns.ended_ms[index]
        ahead_ms = ended_ms - self._log_time_ms
        if ahead_ms > settings.future_reject_ms:
            self._drop(
                index,
                DROP_REASON_TOO_FAR_IN_FUTURE,
                f"ended_ms: {ended_ms} is {ahead_ms} ms ahead of the ledger, over {settings.future_reject_ms}; "
                "set the server's clock and send it again",
            )
            return False
        if ahead_ms > 0:
            self.evidence[self._columns.tenant_ids[index]].future.append((self._columns.request_ids[index], ahead_ms))
            return True
        if self._columns.events[index].backfill:
            return True
        self._drop(
            index,
            DROP_REASON_TOO_OLD,
            f"ended_ms: {ended_ms} is older than the dedupe horizon of {settings.dedupe_horizon_ms} ms; "
            "import it as a backfill, which looks for earlier charges first",
        )
        return False

    def sent_on(self) -> list[Forward]:
        """What other partitions are to get."""
        return [forward for partition, raws in sorted(self._elsewhere.items()) for forward in _forwards(partition, raws)]


def _forwards(partition: int, raws: list[bytes]) -> list[Forward]:
    """The same event bytes in a batch of nobody's numbering: fingerprints stay, the sender's sequence is not touched.

    In two, where the mark that they were forwarded takes the room that a full batch does not have.
    """
    head = UsageBatch(schema_version=SCHEMA_VERSION, forwarded=True).SerializeToString()
    value = head + RawUsageBatch(events=raws).SerializeToString()
    if len(value) + SIGNATURE_BYTES <= BATCH_BYTES_MAX or len(raws) == 1:
        return [Forward(partition, value)]
    middle = len(raws) // 2
    return _forwards(partition, raws[:middle]) + _forwards(partition, raws[middle:])
