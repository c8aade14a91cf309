"""Balances, usage, statements, tenants, prices and how far the database is: what reads accounts, totals and books."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar, cast

import grpc

from billing.amounts import decimal_text
from billing.identity import partition_of
from billing.periods import month_of, period_at, period_start_ms
from billing.v1.account_pb2 import Calendar
from billing.v1.billing_service_pb2 import (
    BudgetEntry,
    GetBalanceRequest,
    GetBalanceResponse,
    GetPipelineRequest,
    GetPipelineResponse,
    GetPriceBookRequest,
    GetPriceBookResponse,
    GetStatementRequest,
    GetStatementResponse,
    GetTenantRequest,
    GetTenantResponse,
    ListTenantsRequest,
    ListTenantsResponse,
    ListUsageRequest,
    ListUsageResponse,
    PartitionState,
    ProjectEntry,
    StatementEntry,
    StatementLine,
    TenantBalance,
    UsageRow,
)
from billing.v1.command_pb2 import PriceBook
from serving.api.errors import ApiError
from serving.api.fields import from_time, page_size, to_time
from sinks import account_queries, queries
from sinks.completeness import completeness
from sinks.price_books import price_books
from sinks.queries import TIME_MS_MAX, Bucket
from sinks.rated_usage import payers
from sinks.statement import StatementError, statement

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from serving.api.calls import Call
    from sinks.engine import Reader
    from sinks.rows import Balance, Freshness
    from sinks.rows import UsageRow as Usage

__all__ = [
    "budget_entries",
    "find_balance",
    "get_balance",
    "get_pipeline",
    "get_price_book",
    "get_statement",
    "get_tenant",
    "list_tenants",
    "list_usage",
    "money",
    "page_of",
    "partition_states",
    "tenant_balance",
]

_MINUTE_MS: Final = 60_000
_DAY_MS: Final = 86_400_000
# Of a dimension of usage: the field of a row that holds it.
_ROW_FIELDS: Final = {
    "tenant": "tenant_id",
    "project": "project_id",
    "class": "service_class",
    "user": "user_id",
    "key": "key_id",
    "source": "count_source",
}
_TOKEN_FIELDS: Final = (
    "uncached_input_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "image_input_tokens",
    "audio_input_tokens",
    "output_tokens",
    "reasoning_tokens",
    "audio_output_tokens",
)

Row = TypeVar("Row")


def money(pico: int) -> str:
    """An amount as every answer has it: exact, no more decimals than it needs."""
    return decimal_text(pico)


def page_of(
    call: Call, request: Message, rows: Sequence[Row], key: Callable[[Row], str], name: str = "page_token"
) -> tuple[list[Row], str]:
    """The page that `request` asks for of rows whose order is fixed, and the token of the next one.

    A row's key is the row's alone; where the one that the page before ended with is gone, the question is asked anew.
    """
    place = call.tokens.open(call.principal, request, name, 1)
    begin = 0
    if place is not None:
        found = next((index for index, row in enumerate(rows) if key(row) == place[0]), None)
        if found is None:
            raise ApiError.unacceptable(f"{name}: its row is gone; begin without one")
        begin = found + 1
    size = page_size(cast("ListTenantsRequest", request).page_size)
    page = list(rows[begin : begin + size])
    more = begin + size < len(rows)
    return page, call.tokens.seal(call.principal, request, [key(page[-1])]) if more else ""


def find_balance(call: Call, tenant_id: str) -> Balance:
    """The account. Raises ApiError."""
    found = next(iter(queries.balances(call.reader, tenant_id)), None)
    if found is None:
        raise ApiError.unknown("tenant", tenant_id)
    return found


def tenant_balance(row: Balance) -> TenantBalance:
    """An account for an answer."""
    return TenantBalance(
        tenant_id=row.tenant_id,
        display_name=row.display_name,
        status=row.status,
        plan_id=row.plan_id,
        billing_mode=row.billing_mode,
        currency=row.currency,
        credit=money(row.credit_pico),
        spend=money(row.spend_pico),
        balance=money(row.balance_pico),
        credit_limit=money(row.credit_limit_pico),
        leased=money(row.leased_pico),
        free=money(row.free_pico),
        requests=row.events,
        duplicates=row.duplicates,
        conflicts=row.conflicts,
        unrated_requests=row.unrated_events,
        as_of=to_time(row.log_time_ms),
    )


def get_balance(call: Call, request: GetBalanceRequest) -> GetBalanceResponse:
    """What a tenant was granted, spent, and has left."""
    return GetBalanceResponse(balance=tenant_balance(find_balance(call, call.principal.tenant(request.tenant_id))))


def list_tenants(call: Call, request: ListTenantsRequest) -> ListTenantsResponse:
    """Every tenant that the caller may see, with its balance."""
    place = call.tokens.open(call.principal, request, "page_token", 1)
    size = page_size(request.page_size)
    after = None if place is None else place[0]
    rows = queries.balances(call.reader, call.principal.tenant_or_all(""), limit=size + 1, after=after)
    response = ListTenantsResponse(tenants=map(tenant_balance, rows[:size]))
    if len(rows) > size:
        response.next_page_token = call.tokens.seal(call.principal, request, [rows[size - 1].tenant_id])
    return response


def get_tenant(call: Call, request: GetTenantRequest) -> GetTenantResponse:
    """Who a tenant is: plan, months, projects, budgets."""
    tenant_id = call.principal.tenant(request.tenant_id)
    account = find_balance(call, tenant_id)
    return GetTenantResponse(
        balance=tenant_balance(account),
        time_zone=account.calendar.time_zone or "UTC",
        keys_in_force=account_queries.key_count(call.reader, tenant_id),
        projects=[
            ProjectEntry(project_id=name, display_name=display, closed=closed)
            for name, display, closed in account_queries.projects(call.reader, tenant_id)
        ],
        budgets=budget_entries(call.reader, account),
    )


def budget_entries(reader: Reader, account: Balance) -> list[BudgetEntry]:
    """The budgets of an account for an answer."""
    return [
        BudgetEntry(
            project_id=row.project_id,
            user_id=row.user_id,
            amount=money(row.amount_pico),
            spend=money(row.spend_pico),
            currency=account.currency,
            hard_stop=row.hard_stop,
            used_up=row.used_up,
            period_start=to_time(row.period_start_ms),
            period_end=to_time(row.period_end_ms),
        )
        for row in account_queries.budgets(reader, account.tenant_id)
    ]


def list_usage(call: Call, request: ListUsageRequest) -> ListUsageResponse:
    """Tokens and cost, grouped by dimensions and by spans of time."""
    tenant_id = call.principal.tenant_or_all(request.tenant_id)
    start_ms, end_ms = from_time(request, "start", 0), from_time(request, "end", TIME_MS_MAX)
    if start_ms % _MINUTE_MS or (request.HasField("end") and end_ms % _MINUTE_MS):
        raise ApiError.unacceptable("start, end: are within a minute; send whole minutes")
    if start_ms >= end_ms:
        raise ApiError.unacceptable("end: is not after start; send a later one")
    by = list(request.by)
    if len(set(by)) != len(by):
        raise ApiError.unacceptable("by: names a dimension twice; send each once")
    calendar = _calendar(call, tenant_id)
    bucket = _bucket(request.bucket, calendar, start_ms, min(end_ms, call.now_ms + _DAY_MS))
    width = len(by) + (bucket is not None)
    size = page_size(request.page_size)
    rows = queries.usage(
        call.reader,
        tenant_id,
        by,
        start_ms,
        end_ms,
        bucket=bucket,
        project_id=request.project_id,
        model=request.model,
        limit=size + 1,
        after=call.tokens.open(call.principal, request, "page_token", width + 1),
    )
    response = ListUsageResponse(time_zone=calendar.time_zone or "UTC", as_of=to_time(_as_of_ms(call, tenant_id)))
    for row in rows[:size]:
        response.rows.append(_usage_row(row, by, in_buckets=bucket is not None))
    if len(rows) > size:
        last = rows[size - 1]
        response.next_page_token = call.tokens.seal(call.principal, request, [*last.group, last.currency])
    return response


def _usage_row(row: Usage, by: list[str], *, in_buckets: bool) -> UsageRow:
    group = list(row.group)
    made = UsageRow(
        start=to_time(int(group.pop(0)) * 1_000) if in_buckets else None,
        requests=row.events,
        refused_requests=row.refused_events,
        unrated_requests=row.unrated_events,
        input_tokens_all=row.quantities.input_tokens,
        output_tokens_all=row.quantities.all_output_tokens,
        units=row.quantities.units,
        cost=money(row.cost_pico),
        currency=row.currency,
    )
    for name in _TOKEN_FIELDS:
        setattr(made, name, getattr(row.quantities, name))
    for name, value in zip(by, group, strict=True):
        setattr(made, _ROW_FIELDS.get(name, name), value)
    return made


def _calendar(call: Call, tenant_id: str | None) -> Calendar:
    """The months of a tenant; UTC's for all of them together. Raises ApiError for a tenant that nobody knows."""
    if tenant_id is None:
        return Calendar()
    known = payers(call.reader, tenant_id)
    if not known:
        raise ApiError.unknown("tenant", tenant_id)
    return known[0].calendar


def _bucket(unit: str, calendar: Calendar, start_ms: int, end_ms: int) -> Bucket | None:
    if not unit:
        return None
    zone = calendar.time_zone or "UTC"
    if unit != "month":
        return Bucket(unit, zone)  # type: ignore[arg-type]  # the table of fields has checked it
    # The ledger's own months: what a zone's rules say here may differ.
    first, last = month_of(period_at(calendar, start_ms).start_ms), month_of(max(start_ms, end_ms)) + 1
    starts = (period_start_ms(calendar, month) for month in range(first, last + 1))
    return Bucket("month", zone, tuple(sorted({max(0, at_ms) // 1_000 for at_ms in starts})))


def _as_of_ms(call: Call, tenant_id: str | None) -> int:
    """Up to when the database knows everything about the tenant, or about all of them; 0: nothing yet."""
    known = {row.partition: row.log_time_ms for row in queries.freshness(call.reader)}
    if tenant_id is None:
        return min(known.values(), default=0)
    return known.get(partition_of(tenant_id, call.partitions), 0)


def get_statement(call: Call, request: GetStatementRequest) -> GetStatementResponse:
    """One tenant's charges line by line, and the balance before and after."""
    tenant_id = call.principal.tenant(request.tenant_id)
    start_ms, end_ms = from_time(request, "start", 0), from_time(request, "end", 0)
    try:
        found = statement(call.reader, tenant_id, start_ms, end_ms)
    except StatementError as error:
        raise ApiError(grpc.StatusCode.INTERNAL, str(error)) from error
    if found is None:
        raise ApiError.unknown("tenant", tenant_id)
    return GetStatementResponse(
        tenant_id=tenant_id,
        display_name=found.display_name,
        currency=found.currency,
        start=to_time(start_ms),
        end=to_time(end_ms),
        opening=money(found.opening_pico),
        credited=money(found.credited_pico),
        expired=money(found.expired_pico),
        charged=money(found.charged_pico),
        at_close=money(found.at_close_pico),
        corrected=money(found.corrected_pico),
        closing=money(found.closing_pico),
        requests=found.events,
        free_requests=found.free_events,
        unrated_requests=found.unrated_events,
        lines=[
            StatementLine(
                project_id=line.project_id,
                model=line.model,
                operation=line.operation,
                service_class=line.service_class,
                quantity_of=line.quantity_of,
                terms=line.terms,
                quantity=str(line.quantity),
                unit_price=money(line.price_pico),
                amount=money(line.amount_pico),
                price_version=line.price_version,
            )
            for line in found.lines
        ],
        credits=[
            StatementEntry(
                time=to_time(line.log_time_ms),
                id=line.command_id,
                issuer=line.issuer,
                reason=line.reason,
                amount=money(line.amount_pico),
            )
            for line in found.credits
        ],
        corrections=[
            StatementEntry(
                time=to_time(line.log_time_ms),
                id=line.adjustment_id,
                kind=line.kind,
                issuer=line.issuer,
                reason=line.reason,
                amount=money(line.amount_pico),
            )
            for line in found.corrections
        ],
    )


def get_price_book(call: Call, request: GetPriceBookRequest) -> GetPriceBookResponse:
    """The price book in effect; a tenant sees what concerns it."""
    books = price_books(call.reader)
    currencies = sorted({book.currency for book in books.all()})
    currency = request.currency or (currencies[0] if len(currencies) == 1 else "")
    if not currency:
        named = f"there are books of {', '.join(currencies)}" if currencies else "there is no price book yet"
        raise ApiError.unacceptable(f"currency: is empty, and {named}; name one")
    known = books.book_at(currency, from_time(request, "effective_at", call.now_ms))
    if known is None:
        raise ApiError.unknown("price book of", currency)
    book = PriceBook()
    book.CopyFrom(known)
    if not call.principal.is_operator:
        visible = ("", call.principal.tenant_id)
        for lines in (book.prices, book.commitments):
            for index in reversed(range(len(lines))):
                if lines[index].tenant_id not in visible:
                    del lines[index]
    return GetPriceBookResponse(book=book)


def get_pipeline(call: Call, _: GetPipelineRequest) -> GetPipelineResponse:
    """How far the database is, and what producers numbered that has not come."""
    report = completeness(call.reader)
    return GetPipelineResponse(
        partitions=partition_states(queries.freshness(call.reader)),
        missing_events=sum(state.missing for state in report.incomplete),
        under_way_events=report.under_way,
        producers=report.producers,
        silent_producers=len({state.producer_id for state in report.silent}),
    )


def partition_states(rows: Sequence[Freshness]) -> list[PartitionState]:
    """How far the database is, for an answer."""
    return [
        PartitionState(
            partition=row.partition,
            sequence=row.sequence,
            log_time=to_time(row.log_time_ms),
            written=to_time(row.written_ms),
        )
        for row in rows
    ]
