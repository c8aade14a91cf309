"""What a local store calls the states that a record says in full: a name for each, the same whenever it is stated again."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from billing.v1.account_pb2 import Account, ApiKey, BudgetState, Lease, ProducerRegistration, Project
from billing.v1.alert_pb2 import ALERT_STATE_RESOLVED, Alert
from billing.v1.invoice_pb2 import PeriodLine, PeriodLineKey
from billing.v1.ledger_pb2 import (
    CorrectedEvent,
    CreditState,
    GrantState,
    InvoiceSeries,
    KeyPlaces,
    LedgerRecord,
    PeriodQuantities,
    PeriodUnits,
    ProducerMark,
    WindowKey,
)

__all__ = ["Stated", "account_name", "states_of", "window_name"]

Stated = (
    Account
    | Alert
    | ApiKey
    | BudgetState
    | CorrectedEvent
    | CreditState
    | InvoiceSeries
    | KeyPlaces
    | Lease
    | PeriodLine
    | PeriodQuantities
    | ProducerMark
    | ProducerRegistration
    | Project
)
_EPOCH = struct.Struct(">QI")


def states_of(record: LedgerRecord) -> Iterator[tuple[bytes, Stated | None]]:
    """Each state of `record` under its name; None: it is let go. In the order in which they hold."""
    for account in record.accounts:
        yield account_name(account.tenant_id), account
    for key in record.keys:
        yield b"k" + key.key_id.encode(), key
    for lease in record.leases:
        name = b"l" + _EPOCH.pack(lease.epoch, len(lease.holder_id)) + f"{lease.holder_id}{lease.tenant_id}".encode()
        yield name, None if lease.gone else lease
    for quantities in record.quantities:
        # One entry a quantity: a record states only those that it moved.
        for units in quantities.units:
            stated = _alone(quantities, units)
            yield _quantity_name(stated), stated
    for held in record.credits:
        for grant in held.grants:
            yield _grant_name(held.tenant_id, grant), CreditState(tenant_id=held.tenant_id, grants=[grant])
        rest = CreditState()
        rest.CopyFrom(held)
        del rest.grants[:]
        yield b"e" + held.tenant_id.encode(), rest
    for line in record.lines:
        yield _line_name(line.key), line
    for line_key in record.invoiced:
        yield _line_name(line_key), None
    for series in record.invoice_series:
        yield b"j" + series.series.encode(), series
    for budget in record.budgets:
        yield _budget_name(budget), None if budget.gone else budget
    for project in record.projects:
        yield b"r" + Project(tenant_id=project.tenant_id, project_id=project.project_id).SerializeToString(), project
    for alert in record.alerts:
        yield _alert_name(alert), None if alert.state == ALERT_STATE_RESOLVED else alert
    for alert in record.alert_states:
        yield _alert_name(alert), alert
    for places in record.key_places:
        yield b"y" + KeyPlaces(tenant_id=places.tenant_id, key_id=places.key_id).SerializeToString(), places
    for entry in record.corrected:
        yield b"x" + entry.key, entry
    for registration in record.registrations:
        yield b"t" + registration.producer_id.encode(), registration
    for mark in record.producers:
        yield b"n" + mark.producer_id.encode(), mark


def account_name(tenant_id: str) -> bytes:
    """Of a tenant's account."""
    return b"a" + tenant_id.encode()


def window_name(key: WindowKey) -> bytes:
    """Of an open window: with the sequence that opened it, as a record states it and as a record lets it go."""
    return b"w" + key.SerializeToString()


def _line_name(key: PeriodLineKey) -> bytes:
    return b"i" + key.SerializeToString(deterministic=True)


def _alone(quantities: PeriodQuantities, units: PeriodUnits) -> PeriodQuantities:
    stated = PeriodQuantities()
    stated.CopyFrom(quantities)
    del stated.units[:]
    stated.units.append(units)
    return stated


def _quantity_name(stated: PeriodQuantities) -> bytes:
    return b"q" + _alone(stated, PeriodUnits(quantity=stated.units[0].quantity)).SerializeToString(deterministic=True)


def _budget_name(budget: BudgetState) -> bytes:
    names = BudgetState(tenant_id=budget.tenant_id, project_id=budget.project_id, user_id=budget.user_id)
    return b"d" + names.SerializeToString()


def _alert_name(alert: Alert) -> bytes:
    names = Alert(rule=alert.rule, tenant_id=alert.tenant_id, subject=alert.subject)
    return b"o" + names.SerializeToString()


def _grant_name(tenant_id: str, grant: GrantState) -> bytes:
    return b"g" + CreditState(tenant_id=tenant_id, grants=[GrantState(grant_id=grant.grant_id)]).SerializeToString()
