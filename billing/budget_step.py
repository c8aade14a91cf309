"""Counts a batch of usage against budgets. A batch of tenants without budgets ends at the first line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from billing.budgets import Charge
from billing.state import LedgerState
from billing.usage_columns import UsageColumns
from billing.v1.ledger_pb2 import LedgerRecord
from billing.windows import MINUTE_MS


def charge_budgets(
    state: LedgerState, columns: UsageColumns, admitted: Iterable[int], costs: Sequence[int], record: LedgerRecord
) -> None:
    """State in `record` what the admitted events do to budgets."""
    budgets = state.budgets
    budgeted = budgets.tenants.keys() & columns.tenants
    if not budgeted:
        return
    with_users = {tenant_id for tenant_id in budgeted if budgets.needs_users(tenant_id)}
    # Periods begin with whole minutes.
    sums: defaultdict[tuple[str, str, str, int], int] = defaultdict(int)
    for index in admitted:
        tenant_id = columns.tenant_ids[index]
        if tenant_id in budgeted:
            user_id = columns.events[index].user_id if tenant_id in with_users else ""
            sums[tenant_id, columns.projects[index], user_id, columns.ended_ms[index] // MINUTE_MS] += costs[index]
    charges = (
        Charge(tenant_id, project_id, user_id, minute * MINUTE_MS, cost_pico)
        for (tenant_id, project_id, user_id, minute), cost_pico in sums.items()
    )
    budgets.charge(charges, state.accounts, record)
