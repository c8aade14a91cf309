"""The overview: what the dashboard shows of the installation, or of one tenant, as one message; and a watch of it.

Promise: every figure is one that another RPC or command gives too, as of the same database. Everybody who watches the same
thing shares its queries (`serving.api.sharing`), and the watch says it again as soon as the database has something new. Times
are counted back from log time, so that what stands still looks as it did, and says since when.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar
from zoneinfo import ZoneInfo

import grpc

from billing.identity import partition_of
from billing.periods import period_at
from billing.v1.billing_service_pb2 import (
    AccountSum,
    Burn,
    Completeness,
    GetOverviewRequest,
    GetOverviewResponse,
    InstallationOverview,
    OverviewAlerts,
    OverviewRow,
    OverviewTop,
    RejectedSum,
    TenantOverview,
    WatchOverviewRequest,
    WatchOverviewResponse,
)
from serving.api.alerting import alert_entry
from serving.api.errors import ApiError
from serving.api.fields import to_time
from serving.api.invoicing import invoice_summary
from serving.api.reading import budget_entries, find_balance, money, partition_states, tenant_balance
from sinks import overview, queries
from sinks.completeness import completeness
from sinks.day_totals import DAY_S
from sinks.errors import LedgerError
from sinks.invoices import invoice_summaries
from sinks.overview import Stated, Sums
from sinks.tenant_usage import Asked, TenantUsage

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from google.protobuf.message import Message

    from serving.api.calls import Call
    from sinks.rows import Balance

__all__ = ["burn", "get_overview", "watch_overview"]

_MINUTE_MS: Final = 60_000
_HOUR_MS: Final = 3_600_000
_DAY_MS: Final = 86_400_000
_DAYS: Final = 30
_MINUTES: Final = 60
_TOP: Final = 20
_ALERTS: Final = 20
_INVOICES: Final = 12
_BURN_DAYS: Final = 7
# How often the database is asked whether anything is new, by all watches together.
_MARKS_EACH_S: Final = 0.1
# What reads records or events, for all watches together.
_SELDOM_S: Final = 5.0
_FORESEEN_MS: Final = 100 * 365 * _DAY_MS

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Equal to itself alone."""

    message: Message


@dataclass(frozen=True, slots=True)
class _Made:
    """One of the two for everybody who asks, and what stands for its content."""

    answer: GetOverviewResponse
    position: str


def get_overview(call: Call, request: GetOverviewRequest) -> GetOverviewResponse:
    """Of the installation, or of one tenant."""
    return _overview(call, request.tenant_id, whole=True).answer


def watch_overview(call: Call, request: WatchOverviewRequest, place: Any) -> tuple[list[Message], Any]:
    """One look: the overview, where it is another than the last one."""
    # What is there at once is shown at once; what reads records or events comes with the next look.
    made = _overview(call, request.tenant_id, whole=place is not None)
    answer = WatchOverviewResponse(position=made.position)
    if made.position == (request.after if place is None else place):
        return [answer] if place is None else [], made.position
    if made.answer.HasField("tenant"):
        answer.tenant.CopyFrom(made.answer.tenant)
    else:
        answer.installation.CopyFrom(made.answer.installation)
    return [answer], made.position


def _overview(call: Call, named: str, *, whole: bool) -> _Made:
    tenant_id = call.principal.tenant_or_all(named)
    stated = _share(call, "stated", int(time.monotonic() / _MARKS_EACH_S), lambda: overview.stated_until(call.reader))
    if tenant_id is None:
        mark: Hashable = tuple(stated.items())
        seldom = _seldom(call, "completeness", mark, lambda: _completeness(call), whole=whole)
        quick = _share(call, "installation", mark, lambda: _Part(_installation(call)))
    else:
        mark = of_tenant = stated.get(partition_of(tenant_id, call.partitions), Stated(0, 0, 0))
        written = {partition: of.position for partition, of in stated.items()}
        seldom = _seldom(call, ("users", tenant_id), mark, lambda: _users(call, tenant_id, of_tenant), whole=whole)
        quick = _share(
            call, ("tenant", tenant_id), mark, lambda: _Part(_tenant(call, tenant_id, of_tenant.log_time_ms, written))
        )
    return _share(call, ("overview", tenant_id), (quick, seldom), lambda: _joined(quick, seldom))


def _share(call: Call, key: Hashable, mark: Hashable, make: Callable[[], T], rest_s: float = 0.0) -> T:
    try:
        return call.shared.get(key, mark, make, rest_s=rest_s, wait_s=call.left_s)
    except TimeoutError as error:
        raise ApiError(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's time is over: give it more time") from error


def _seldom(call: Call, key: Hashable, mark: Hashable, make: Callable[[], Message], *, whole: bool) -> _Part | None:
    if not whole:
        known: _Part | None = call.shared.peek(key)
        return known
    return _share(call, key, mark, lambda: _Part(make()), _SELDOM_S)


def _joined(first: _Part, then: _Part | None) -> _Made:
    answer = GetOverviewResponse()
    quick, seldom = first.message, None if then is None else then.message
    if isinstance(quick, TenantOverview):
        answer.tenant.CopyFrom(quick)
        if isinstance(seldom, OverviewTop):
            answer.tenant.users.CopyFrom(seldom)
    elif isinstance(quick, InstallationOverview):
        answer.installation.CopyFrom(quick)
        if isinstance(seldom, Completeness):
            answer.installation.completeness.CopyFrom(seldom)
    content = answer.SerializeToString(deterministic=True)
    return _Made(answer, hashlib.blake2b(content, digest_size=16).hexdigest())


def _installation(call: Call) -> InstallationOverview:
    """Of all tenants, but for what is seldom asked."""
    reader = call.reader
    positions = queries.freshness(reader)
    latest_ms = max((row.log_time_ms for row in positions), default=0)
    start_s = max(latest_ms // _DAY_MS - _DAYS + 1, 0) * DAY_S
    kept = _share(call, "installation usage", None, overview.InstallationUsage)
    usage = kept.since(reader, start_s, latest_ms // 1_000, _MINUTES)
    return InstallationOverview(
        as_of=to_time(min((row.log_time_ms for row in positions), default=0)),
        latest=to_time(latest_ms),
        start=to_time(start_s * 1_000),
        minutes=[_row(row, is_span=True) for row in usage.minutes],
        days=[_row(row, is_span=True) for row in usage.days],
        tenants=_top(usage.tenants),
        models=_top(usage.models),
        accounts=[
            AccountSum(
                status=row.status,
                currency=row.currency,
                tenants=row.tenants,
                credit=money(row.credit_pico),
                spend=money(row.spend_pico),
                balance=money(row.credit_pico - row.spend_pico),
                leased=money(row.leased_pico),
                duplicates=row.duplicates,
                conflicts=row.conflicts,
            )
            for row in overview.account_sums(reader)
        ],
        rejected=[
            RejectedSum(reason=reason, count=count) for reason, count in overview.rejected_sums(reader, start_s * 1_000).items()
        ],
        partitions=partition_states(positions),
        alerts=_alerts(call, None),
    )


def _completeness(call: Call) -> Completeness:
    try:
        report = completeness(call.reader)
    except LedgerError as error:
        # Nothing else of the view depends on it.
        return Completeness(problem=str(error))
    return Completeness(
        as_of=to_time(report.as_of_ms),
        producers=report.producers,
        missing_events=sum(state.missing for state in report.incomplete),
        under_way_events=report.under_way,
        silent_producers=len({state.producer_id for state in report.silent}),
    )


def _tenant(call: Call, tenant_id: str, as_of_ms: int, written: Mapping[int, int]) -> TenantOverview:
    """Of one tenant, but for what is seldom asked."""
    reader = call.reader
    account = find_balance(call, tenant_id)
    calendar = account.calendar
    zone = calendar.time_zone or "UTC"
    at_ms = as_of_ms or account.log_time_ms
    period = period_at(calendar, at_ms)
    minutes_from_ms = max(at_ms // _MINUTE_MS - _MINUTES + 1, 0) * _MINUTE_MS
    asked = Asked(zone, period, _days_from_ms(zone, at_ms, _DAYS), minutes_from_ms, at_ms)
    kept = _share(call, ("tenant usage", tenant_id), None, TenantUsage)
    usage = kept.since(reader, tenant_id, asked, written)
    return TenantOverview(
        balance=tenant_balance(account),
        time_zone=zone,
        as_of=to_time(as_of_ms),
        period_start=to_time(period.start_ms),
        period_end=to_time(period.end_ms),
        period=map(_row, usage.total),
        minutes=[_row(row, is_span=True) for row in usage.minutes],
        days=[_row(row, is_span=True) for row in usage.days],
        projects=_top(usage.projects),
        models=_top(usage.models),
        burn=_burn(account, zone, at_ms, usage.days),
        budgets=budget_entries(reader, account),
        invoices=map(invoice_summary, invoice_summaries(reader, tenant_id)[:_INVOICES]),
        alerts=_alerts(call, tenant_id),
    )


def _days_from_ms(zone: str, at_ms: int, days: int) -> int:
    """Midnight before the last `days`, today among them, in the zone; the ledger's word on zones is where it is about money."""
    today = datetime.fromtimestamp(at_ms / 1_000, ZoneInfo(zone)).replace(hour=0, minute=0, second=0, microsecond=0)
    return max(int((today - timedelta(days=days - 1)).timestamp()) // 60, 0) * _MINUTE_MS


def _users(call: Call, tenant_id: str, stated: Stated) -> OverviewTop:
    """Who used what in the period, from its events."""
    account = find_balance(call, tenant_id)
    period = period_at(account.calendar, stated.log_time_ms or account.log_time_ms)
    rows, names = overview.top_users(call.reader, tenant_id, *period, _TOP)
    return OverviewTop(rows=map(_row, rows), names=names)


def _burn(account: Balance, zone: str, at_ms: int, days: Sequence[Sums]) -> Burn:
    """From the last seven days, or from the first of them on that has usage where none before it has."""
    # Of days only the whole cost is known, so the time begins where the first of them does.
    first_s = _days_from_ms(zone, at_ms, _BURN_DAYS) // 1_000
    # The minute that runs counts as one.
    end_ms = (at_ms // _MINUTE_MS + 1) * _MINUTE_MS
    mine = [row for row in days if row.currency == account.currency]
    recent = [row for row in mine if int(row.name) >= first_s]
    start_s = int(recent[0].name) if recent and len(recent) == len(mine) else first_s
    start_ms = min(max(start_s, 0) * 1_000, end_ms - _HOUR_MS)
    return burn(account, start_ms, end_ms, sum(row.cost_pico for row in recent))


def burn(account: Balance, start_ms: int, end_ms: int, cost_pico: int) -> Burn:
    """The rate of [start_ms, end_ms), and when it has used up what is left. Whole pico and milliseconds, rounded down."""
    assert start_ms < end_ms, "a rate needs time"
    span_ms, left_pico = end_ms - start_ms, account.balance_pico + account.credit_limit_pico
    depleted_ms = 0
    if cost_pico > 0 and (account.billing_mode != "postpaid" or account.credit_limit_pico):
        depleted_ms = end_ms + max(left_pico, 0) * span_ms // cost_pico
    return Burn(
        start=to_time(start_ms),
        end=to_time(end_ms),
        cost=money(cost_pico),
        cost_per_day=money(cost_pico * _DAY_MS // span_ms),
        # Who knows what a balance does in a hundred years?
        depleted=to_time(depleted_ms) if depleted_ms < end_ms + _FORESEEN_MS else None,
    )


def _alerts(call: Call, tenant_id: str | None) -> OverviewAlerts:
    rows = queries.alerts(call.reader, tenant_id, active=True, limit=_ALERTS)
    # Fewer than were asked for are all.
    active = len(rows) if len(rows) < _ALERTS else queries.active_alerts(call.reader, tenant_id)
    return OverviewAlerts(alerts=map(alert_entry, rows), active=active)


def _top(rows: Sequence[Sums]) -> OverviewTop:
    return OverviewTop(rows=map(_row, overview.top(rows, _TOP)), names=len(rows))


def _row(row: Sums, *, is_span: bool = False) -> OverviewRow:
    """A row for an answer; the name of a span is the second in which it begins."""
    return OverviewRow(
        start=to_time(int(row.name) * 1_000) if is_span else None,
        name="" if is_span else row.name,
        requests=row.events,
        refused_requests=row.refused_events,
        unrated_requests=row.unrated_events,
        input_tokens_all=row.input_tokens,
        output_tokens_all=row.output_tokens,
        cost=money(row.cost_pico),
        currency=row.currency,
        gpu_ms=row.gpu_ms,
    )
