"""Rates the events of a batch whose price has terms besides flat prices, in the order of the batch.

Their prices depend on what the period has seen, and on each request by itself, so they are rated one by one before the columns
are summed. A batch under books of flat prices never comes here.
"""

from __future__ import annotations

from collections.abc import Sequence

from billing.rating import FREE_OUTCOMES
from billing.schedules import Part
from billing.state import LedgerState
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import UsageEvent


def rate_by_terms(
    state: LedgerState,
    events: Sequence[UsageEvent],
    admitted: Sequence[int],
    costs: list[int],
    record: LedgerRecord,
) -> dict[int, list[Part]]:
    """Note the cost of each such event in `costs`, and state the counters that it moved in `record`.

    Returns what each is made of, by its place in the batch.
    """
    parts_of = {}
    for index in admitted:
        event = events[index]
        if event.outcome in FREE_OUTCOMES:
            continue
        account = state.account_of(event.tenant_id)
        rate = state.books.rate(
            account.currency, event.ended_ms, event.model, event.operation, event.service_class, event.tenant_id
        )
        if rate is not None and rate.terms is not None:
            parts = parts_of[index] = state.quantities.take(event, rate, account.currency, account.calendar)
            costs[index] = sum(part.amount_pico for part in parts)
    record.quantities.extend(state.quantities.take_moved())
    return parts_of
