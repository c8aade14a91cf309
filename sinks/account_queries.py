"""What the database says of credit, budgets, projects, keys and leases of tenants; and the bookkeeper's report of credit.

Promise of the report: opening + granted - used - expired = closing for every kind of credit of every tenant, at the month's
ends of the tenant's own zone, because the ledger sets spend against grants at each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import cast

from billing.periods import period_start_ms
from sinks.engine import Parameter, Reader, decimal_to_pico
from sinks.rated_usage import payers

__all__ = [
    "BudgetRow",
    "CreditMonths",
    "GrantRow",
    "KeyRow",
    "LeaseRow",
    "Money",
    "budgets",
    "credit_report",
    "grants",
    "key_count",
    "keys",
    "leases",
    "money",
    "projects",
    "refusals",
]


@dataclass(frozen=True, slots=True)
class GrantRow:
    """A grant as it was last stated."""

    grant_id: str
    kind: str
    priority: int
    granted_ms: int
    expires_ms: int
    amount_pico: int
    used_pico: int
    expired_pico: int
    reference: str

    @property
    def left_pico(self) -> int:
        """What can still be used, but for spend that is not set against grants yet."""
        return self.amount_pico - self.used_pico - self.expired_pico


@dataclass(frozen=True, slots=True)
class Money:
    """The sums of an account that its balance consists of."""

    leased_pico: int
    credit_limit_pico: int
    # Spend that is set against grants; 0 where the tenant never had credit and no invoice was drawn.
    allocated_pico: int
    due_pico: int
    uninvoiced_pico: int


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """A budget and what it has seen of its period."""

    project_id: str
    user_id: str
    amount_pico: int
    spend_pico: int
    thresholds_millionths: tuple[int, ...]
    hard_stop: bool
    period_start_ms: int
    period_end_ms: int
    used_up: bool

    @property
    def name(self) -> str:
        """Whose it is, for people."""
        return f"project {self.project_id}" if self.project_id else f"user {self.user_id}" if self.user_id else "the tenant"


@dataclass(frozen=True, slots=True)
class KeyRow:
    """An API key, without anything of its secret."""

    key_id: str
    tenant_id: str
    project_id: str
    user_id: str
    scopes: tuple[str, ...]
    created_ms: int
    expires_ms: int
    revoked: bool


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """What one start of a gateway holds."""

    holder_id: str
    epoch: int
    granted_pico: int
    charged_pico: int
    expires_ms: int
    ended: bool

    @property
    def held_pico(self) -> int:
        """Reserved for requests that run, or at hand for the next ones."""
        return max(0, self.granted_pico - self.charged_pico)


@dataclass(frozen=True, slots=True)
class CreditMonths:
    """One kind of one tenant's credit over some months."""

    tenant_id: str
    currency: str
    kind: str
    opening_pico: int
    granted_pico: int
    used_pico: int
    expired_pico: int

    @property
    def closing_pico(self) -> int:
        """What is left at the end."""
        return self.opening_pico + self.granted_pico - self.used_pico - self.expired_pico

    @property
    def deferred(self) -> bool:
        """Whether what is left is revenue to come: somebody paid for it, or is owed it."""
        return self.kind != "promotional"


def grants(reader: Reader, tenant_id: str, grant_id: str | None = None) -> list[GrantRow]:
    """A tenant's grants in the order in which they came, or the one of that name."""
    one = " AND grant_id = {grant:String}" if grant_id is not None else ""
    rows = reader.query(
        f"SELECT grant_id, kind, priority, {_ms('granted')}, {_ms('expires')}, amount, used, expired, reference "  # noqa: S608
        f"FROM credit_grants FINAL WHERE tenant_id = {{tenant:String}}{one} "
        "ORDER BY granted, grant_id, at DESC, version DESC LIMIT 1 BY grant_id",
        {"tenant": tenant_id} | ({} if grant_id is None else {"grant": grant_id}),
    ).rows
    return [
        GrantRow(
            str(row[0]),
            str(row[1]),
            _int(row[2]),
            _int(row[3]),
            _int(row[4]),
            _pico(row[5]),
            _pico(row[6]),
            _pico(row[7]),
            str(row[8]),
        )
        for row in rows
    ]


def money(reader: Reader, tenant_id: str) -> Money:
    """What is leased, how far spend is set against credit, and what no invoice has."""
    parameters: dict[str, Parameter] = {"tenant": tenant_id}
    account = reader.query(
        "SELECT leased, credit_limit FROM accounts FINAL WHERE tenant_id = {tenant:String}", parameters
    ).rows or [(Decimal(0), Decimal(0))]
    credit = reader.query(
        "SELECT allocated, due, uninvoiced FROM credit_allocations FINAL WHERE tenant_id = {tenant:String}", parameters
    ).rows or [(Decimal(0), Decimal(0), Decimal(0))]
    return Money(*map(_pico, account[0]), *map(_pico, credit[0]))


def budgets(reader: Reader, tenant_id: str) -> list[BudgetRow]:
    """A tenant's budgets."""
    rows = reader.query(
        f"SELECT project_id, user_id, amount, spend, thresholds_millionths, hard_stop, {_ms('period_start')}, "  # noqa: S608
        f"{_ms('period_end')}, used_up FROM budgets FINAL WHERE tenant_id = {{tenant:String}} AND gone = 0 "
        "ORDER BY project_id, user_id",
        {"tenant": tenant_id},
    ).rows
    return [
        BudgetRow(
            str(row[0]),
            str(row[1]),
            _pico(row[2]),
            _pico(row[3]),
            tuple(cast("Sequence[int]", row[4])),
            bool(row[5]),
            _int(row[6]),
            _int(row[7]),
            bool(row[8]),
        )
        for row in rows
    ]


def leases(reader: Reader, tenant_id: str) -> list[LeaseRow]:
    """Who holds what of a tenant's balance."""
    rows = reader.query(
        f"SELECT holder_id, epoch, granted, charged, {_ms('expires')}, ended FROM leases FINAL "  # noqa: S608
        "WHERE tenant_id = {tenant:String} AND gone = 0 ORDER BY holder_id, epoch",
        {"tenant": tenant_id},
    ).rows
    return [LeaseRow(str(row[0]), _int(row[1]), _pico(row[2]), _pico(row[3]), _int(row[4]), bool(row[5])) for row in rows]


def projects(reader: Reader, tenant_id: str) -> list[tuple[str, str, bool]]:
    """A tenant's projects: ID, name, whether it is closed."""
    rows = reader.query(
        "SELECT project_id, display_name, closed FROM projects FINAL WHERE tenant_id = {tenant:String} ORDER BY project_id",
        {"tenant": tenant_id},
    ).rows
    return [(str(row[0]), str(row[1]), bool(row[2])) for row in rows]


def keys(reader: Reader, tenant_id: str, *, key_id: str | None = None) -> list[KeyRow]:
    """A tenant's keys, revoked ones too, in the order in which they were made, or the one of that ID; of the empty tenant:
    operators' keys."""
    one = " AND key_id = {key:String}" if key_id is not None else ""
    rows = reader.query(
        f"SELECT key_id, tenant_id, project_id, user_id, scopes, {_ms('created')}, {_ms('expires')}, revoked "  # noqa: S608
        f"FROM api_keys FINAL WHERE tenant_id = {{tenant:String}}{one} ORDER BY created, key_id",
        {"tenant": tenant_id} | ({} if key_id is None else {"key": key_id}),
    ).rows
    return [
        KeyRow(
            str(row[0]),
            str(row[1]),
            str(row[2]),
            str(row[3]),
            tuple(cast("Sequence[str]", row[4])),
            _int(row[5]),
            _int(row[6]),
            bool(row[7]),
        )
        for row in rows
    ]


def key_count(reader: Reader, tenant_id: str) -> int:
    """How many keys of the tenant are not revoked."""
    rows = reader.query(
        "SELECT count() FROM api_keys FINAL WHERE tenant_id = {tenant:String} AND revoked = 0", {"tenant": tenant_id}
    ).rows
    return _int(rows[0][0])


def refusals(reader: Reader, tenant_id: str, since_ms: int) -> dict[str, int]:
    """Why gateways refused the tenant's requests since then, and how often."""
    rows = reader.query(
        "SELECT refusal_reason, count() FROM usage_events FINAL WHERE tenant_id = {tenant:String} AND outcome = 'rejected' "
        "AND ended >= fromUnixTimestamp64Milli({since:Int64}) GROUP BY refusal_reason ORDER BY refusal_reason",
        {"tenant": tenant_id, "since": since_ms},
    ).rows
    return {str(reason): _int(count) for reason, count in rows}


def credit_report(reader: Reader, first_month: int, last_month: int, tenant_id: str | None = None) -> list[CreditMonths]:
    """Credit from the beginning of `first_month` to the end of `last_month` (months since 1970-01), by tenant and kind."""
    by_bounds: dict[tuple[int, int], set[str]] = {}
    for payer in payers(reader, tenant_id):
        bounds = period_start_ms(payer.calendar, first_month), period_start_ms(payer.calendar, last_month + 1)
        by_bounds.setdefault(bounds, set()).add(payer.tenant_id)
    found: list[CreditMonths] = []
    for (from_ms, to_ms), names in by_bounds.items():
        found += [row for row in _between(reader, from_ms, to_ms, tenant_id) if row.tenant_id in names]
    return sorted(found, key=lambda row: (row.tenant_id, row.currency, row.kind))


def _between(reader: Reader, from_ms: int, to_ms: int, tenant_id: str | None) -> list[CreditMonths]:
    def at(column: str, before: str) -> str:
        return f"argMaxIf({column}, (at, version), at < fromUnixTimestamp64Milli({{{before}:Int64}}))"

    whose = " AND tenant_id = {tenant:String}" if tenant_id is not None else ""
    states = ", ".join(f"{at(column, bound)} AS {column}_{bound}" for bound in ("start", "end") for column in _SUMS)
    sums = ", ".join(f"sum({column}_{bound})" for bound in ("start", "end") for column in _SUMS)
    rows = reader.query(
        f"SELECT tenant_id, currency, kind, {sums} FROM (SELECT tenant_id, any(g.currency) AS currency, any(g.kind) AS kind, "  # noqa: S608
        f"{states} FROM credit_grants AS g FINAL WHERE at < fromUnixTimestamp64Milli({{end:Int64}}){whose} "
        "GROUP BY tenant_id, grant_id) GROUP BY tenant_id, currency, kind",
        {"start": from_ms, "end": to_ms} | ({} if tenant_id is None else {"tenant": tenant_id}),
    ).rows
    found = []
    for name, currency, kind, *amounts in rows:
        before, after = [_pico(value) for value in amounts[:3]], [_pico(value) for value in amounts[3:]]
        granted, used, expired = (later - earlier for earlier, later in zip(before, after, strict=True))
        opening_pico = before[0] - before[1] - before[2]
        if opening_pico or granted or used or expired:
            found.append(CreditMonths(str(name), str(currency), str(kind), opening_pico, granted, used, expired))
    return found


_SUMS = ("amount", "used", "expired")


def _ms(column: str) -> str:
    return f"toUnixTimestamp64Milli({column})"


def _int(value: object) -> int:
    assert isinstance(value, int), value
    return value


def _pico(value: object) -> int:
    assert isinstance(value, Decimal), value
    return decimal_to_pico(value)
