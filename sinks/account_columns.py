"""What ledger records say of credit, budgets, projects and leases, as rows: no I/O, nothing decided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from billing.amounts import from_amount
from billing.v1.account_pb2 import BudgetState, Lease, Project
from billing.v1.invoice_pb2 import CreditKind
from billing.v1.ledger_pb2 import CreditState, GrantState, LedgerRecord
from sinks import tables
from sinks.engine import Table
from sinks.event_columns import EnumNames

__all__ = ["account_rows"]

_KINDS = EnumNames(CreditKind.items(), "CREDIT_KIND_")
Row = tuple[object, ...]


def account_rows(records: Sequence[tuple[LedgerRecord, int]]) -> dict[Table, list[Row]]:
    """The rows of records and their versions. Of what has a last state only, the last one."""
    last: dict[Table, dict[object, Row]] = {
        table: {} for table in (tables.CREDIT_GRANTS, tables.CREDIT_ALLOCATIONS, tables.BUDGETS, tables.PROJECTS, tables.LEASES)
    }
    for record, version in records:
        for table, key, row in _rows(record, version):
            last[table][key] = row
    return {table: list(rows.values()) for table, rows in last.items()}


def _rows(record: LedgerRecord, version: int) -> Iterator[tuple[Table, Any, Row]]:
    if record.credits:
        # Whatever changes credit states the account too.
        currency_of = {account.tenant_id: account.currency for account in record.accounts}
        for credit in record.credits:
            for grant in credit.grants:
                row = _grant(record, credit, grant, currency_of[credit.tenant_id], version)
                yield tables.CREDIT_GRANTS, (credit.tenant_id, grant.grant_id, credit.at_ms), row
            yield tables.CREDIT_ALLOCATIONS, credit.tenant_id, _allocation(credit, version)
    for budget in record.budgets:
        yield tables.BUDGETS, (budget.tenant_id, budget.project_id, budget.user_id), _budget(budget, version)
    for project in record.projects:
        yield tables.PROJECTS, (project.tenant_id, project.project_id), _project(project, version)
    for lease in record.leases:
        yield tables.LEASES, (lease.tenant_id, lease.holder_id, lease.epoch), _lease(lease, version)


def _grant(record: LedgerRecord, credit: CreditState, grant: GrantState, currency: str, version: int) -> Row:
    return (
        credit.tenant_id,
        grant.grant_id,
        credit.at_ms,
        currency,
        _KINDS[grant.kind],
        grant.priority,
        grant.granted_ms,
        grant.expires_ms,
        from_amount(grant.amount),
        from_amount(grant.used),
        from_amount(grant.expired),
        grant.reference,
        record.partition,
        record.generation.hex(),
        record.sequence,
        version,
    )


def _allocation(credit: CreditState, version: int) -> Row:
    parts = [(part.grant_id, from_amount(part.amount)) for part in credit.uninvoiced]
    uninvoiced_pico = sum(pico for _, pico in parts)
    uncovered_pico = sum(pico for name, pico in parts if not name)
    due_pico, allocated_pico = from_amount(credit.due), from_amount(credit.allocated)
    return credit.tenant_id, credit.at_ms, allocated_pico, due_pico, uninvoiced_pico, uncovered_pico, version


def _budget(budget: BudgetState, version: int) -> Row:
    return (
        budget.tenant_id,
        budget.project_id,
        budget.user_id,
        from_amount(budget.amount),
        list(budget.threshold_millionths),
        int(budget.hard_stop),
        budget.period_start_ms,
        budget.period_end_ms,
        from_amount(budget.spend),
        budget.warned,
        int(budget.used_up),
        int(budget.gone),
        version,
    )


def _project(project: Project, version: int) -> Row:
    return project.tenant_id, project.project_id, project.display_name, int(project.closed), version


def _lease(lease: Lease, version: int) -> Row:
    return (
        lease.tenant_id,
        lease.holder_id,
        lease.epoch,
        from_amount(lease.granted),
        from_amount(lease.charged),
        lease.expires_ms,
        int(lease.ended),
        int(lease.gone),
        version,
    )
