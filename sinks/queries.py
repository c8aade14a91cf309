"""What people and programs ask: balances, usage, statements, alerts, events. Typed rows, money in whole pico.

Promise: balances and usage read accounts and totals, never raw events; events and statements read one tenant's. Every value
goes in as a parameter. An answer is what the database holds; `freshness` says up to which log time that is, and balances
may be newer than the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, cast

from billing.v1.account_pb2 import Calendar
from sinks.day_totals import COUNTS, DAY_S, TrustedDays, trusted_days
from sinks.engine import Parameter, Reader, decimal_to_pico
from sinks.errors import ParameterError
from sinks.rows import AlertRow, Balance, EventRow, Freshness, Quantities, RejectedRow, Totals, UsageRow
from sinks.tables import TOKEN_COLUMNS

__all__ = [
    "CHARGED",
    "ROWS_MAX",
    "TIME_MS_MAX",
    "USAGE_BY",
    "AlertRow",
    "Balance",
    "Bucket",
    "EventRow",
    "Freshness",
    "Quantities",
    "RejectedRow",
    "Totals",
    "UsageRow",
    "active_alerts",
    "alerts",
    "all_alerts",
    "all_usage",
    "balances",
    "events",
    "freshness",
    "positions",
    "rejected",
    "totals",
    "totals_between",
    "usage",
]

ROWS_MAX = 10_000
TIME_MS_MAX = 9_999_999_999_999
# So that texts of seconds sort as the seconds do.
_SECONDS_DIGITS = 10


# Name in `by` -> expression over usage_totals. A user is not in the totals: `usage` then reads the tenant's events.
_GROUPS = {
    "tenant": "tenant_id",
    "project": "project_id",
    "model": "model",
    "operation": "operation",
    "class": "service_class",
    "day": "toString(toDate({time}, 'UTC'))",
    "hour": "formatDateTime({time}, '%Y-%m-%dT%H:00Z', 'UTC')",
    "minute": "formatDateTime({time}, '%Y-%m-%dT%H:%M:00Z', 'UTC')",
}
_EVENT_GROUPS = {"user": "user_id", "key": "api_key_id", "outcome": "outcome", "region": "region", "source": "count_source"}
# Every name that `usage(by=...)` knows.
USAGE_BY = (*_GROUPS, *_EVENT_GROUPS)

_SUMMED = "tenant_id, project_id, model, operation, service_class, currency, unit_names, unit_quantities, cost"
# The counts as one column: what takes most of such a query's time is the number of its columns.
_BY_MINUTE = f"SELECT minute, {_SUMMED}, [{', '.join(COUNTS)}] AS counts FROM usage_totals FINAL"  # noqa: S608
_BY_DAY = f"SELECT day AS minute, {_SUMMED}, counts FROM usage_days FINAL"  # noqa: S608
_UNIT_SUMS = "sumMap(unit_names, unit_quantities) AS unit_sums"


@dataclass(frozen=True, slots=True)
class Bucket:
    """Spans of time by which usage is summed: minutes, hours and days of a time zone, or a tenant's months, whose beginnings
    (Unix seconds, rising, the first before everything that is asked for) are given, because the ledger knows them exactly."""

    unit: Literal["minute", "hour", "day", "month"]
    time_zone: str = "UTC"
    month_starts_s: tuple[int, ...] = ()

    @property
    def is_of_days(self) -> bool:
        """Whether each span is made of whole days of UTC, which are summed already."""
        return self.unit in ("day", "month") and self.time_zone == "UTC"

    def expression(self, time: str) -> str:
        """The beginning of the span in which a column's time lies. The zone is the parameter `zone`."""
        match self.unit:
            case "minute":
                return f"toStartOfMinute({time})"
            case "month":
                assert all(type(second) is int for second in self.month_starts_s), "they stand in the query as they are"
                return f"toDateTime(roundDown(toUnixTimestamp({time}), [{', '.join(map(str, self.month_starts_s))}]))"
        return f"toStartOf{self.unit.capitalize()}({time}, {{zone:String}})"


def balances(
    reader: Reader, tenant_id: str | None = None, *, limit: int | None = None, after: str | None = None
) -> list[Balance]:
    """Each account by its tenant's ID, or that of `tenant_id` (no row: nobody knows it); at most `limit` behind `after`."""
    where, parameters = _tenant(tenant_id)
    if after is not None:
        where.append("tenant_id > {after:String}")
        parameters["after"] = after
    limited = ""
    if limit is not None:
        limited = " LIMIT {limit:UInt32}"
        parameters["limit"] = limit
    rows = reader.query(
        "SELECT tenant_id, display_name, status, currency, credit, spend, events, duplicates, conflicts, unrated_events, "  # noqa: S608
        f"plan_id, billing_mode, {_ms('log_time')}, credit_limit, leased, time_zone, "
        f"calendar_from_months, calendar_offset_minutes FROM accounts FINAL{_where(where)} ORDER BY tenant_id{limited}",
        parameters,
    ).rows
    return [
        Balance(
            tenant_id=_text(row[0]),
            display_name=_text(row[1]),
            status=_text(row[2]),
            currency=_text(row[3]),
            credit_pico=_pico(row[4]),
            spend_pico=_pico(row[5]),
            events=_int(row[6]),
            duplicates=_int(row[7]),
            conflicts=_int(row[8]),
            unrated_events=_int(row[9]),
            plan_id=_text(row[10]),
            billing_mode=_text(row[11]),
            log_time_ms=_int(row[12]),
            credit_limit_pico=_pico(row[13]),
            leased_pico=_pico(row[14]),
            calendar=Calendar(
                time_zone=_text(row[15]),
                from_month=cast("list[int]", row[16]),
                offset_minutes=cast("list[int]", row[17]),
            ),
        )
        for row in rows
    ]


def usage(
    reader: Reader,
    tenant_id: str | None = None,
    by: Sequence[str] = ("project", "model"),
    start_ms: int = 0,
    end_ms: int = TIME_MS_MAX,
    *,
    bucket: Bucket | None = None,
    project_id: str = "",
    model: str = "",
    limit: int = ROWS_MAX,
    offset: int = 0,
    after: Sequence[str] | None = None,
) -> list[UsageRow]:
    """Usage that ended in [start_ms, end_ms), grouped by names of USAGE_BY; groups of another currency are rows of their own.

    With a `bucket`, each row's group begins with the Unix second at which its span of time begins. `after`: the group and the
    currency of the last row that the caller has; only rows behind it are given.

    Read from the totals, of days where they are summed, so the bounds must be whole minutes; unless `by` names what only
    events have (user, key, outcome, region, source): that needs a tenant, and reads its events.
    """
    unknown = [name for name in by if name not in USAGE_BY]
    if unknown or len(set(by)) != len(by):
        raise ParameterError(f"by: {', '.join(unknown or by)}; choose each at most once from {', '.join(USAGE_BY)}")
    from_events = any(name in _EVENT_GROUPS for name in by)
    conditions, parameters = _tenant(tenant_id)
    for name, value in (("project_id", project_id), ("model", model)):
        if value:
            conditions.append(f"{name} = {{{name}:String}}")
            parameters[name] = value
    if from_events:
        if tenant_id is None:
            raise ParameterError(f"by {', '.join(by)}: that stands in the events only; name the tenant")
        source, time = "usage_events FINAL", "ended"
        # What was refused or never delivered is kept out of the totals of quantities, here as there.
        token_sums = ", ".join(f"sumIf({name}, {CHARGED})" for name in TOKEN_COLUMNS)
        counts = f"[count(), countIf(NOT ({CHARGED})), countIf(price_version = 0 AND {CHARGED}), {token_sums}]"
        unit_sums = f"sumMapIf(unit_names, unit_quantities, {CHARGED}) AS unit_sums"
        conditions += ["ended >= fromUnixTimestamp64Milli({start:Int64})", "ended < fromUnixTimestamp64Milli({end:Int64})"]
        parameters |= {"start": start_ms, "end": end_ms}
    else:
        if start_ms % 60_000 or (end_ms % 60_000 and end_ms != TIME_MS_MAX):
            raise ParameterError(f"start {start_ms} ms, end {end_ms} ms: totals are kept by the minute; give whole minutes")
        start_s, end_s = min(start_ms // 1000, 2**32 - 1), min(-(-end_ms // 1000), 2**32 - 1)
        by_day = tenant_id is not None and not {"hour", "minute"} & set(by) and (bucket is None or bucket.is_of_days)
        days = trusted_days(reader, tenant_id, start_s) if by_day and tenant_id is not None else TrustedDays()
        source, time = totals_between(start_s, end_s, days, _where(conditions)), "minute"
        conditions = []
        counts, unit_sums = "sumForEach(counts)", _UNIT_SUMS
    groups = [(_GROUPS | _EVENT_GROUPS)[name].replace("{time}", time) for name in by]
    if bucket is not None:
        groups.insert(0, f"leftPad(toString(toUnixTimestamp({bucket.expression(time)})), {_SECONDS_DIGITS}, '0')")
        if bucket.unit in ("hour", "day"):
            parameters["zone"] = bucket.time_zone
    group_columns = "".join(f"{expression} AS group_{index}, " for index, expression in enumerate(groups))
    group_names = "".join(f"group_{index}, " for index in range(len(groups)))
    having = ""
    if after is not None:
        if len(after) != len(groups) + 1:
            raise ParameterError(f"after: {len(after)} texts; give one for each of {len(groups)} groups, and the currency")
        places = ", ".join(f"{{after{index}:String}}" for index in range(len(after)))
        having = f" HAVING ({group_names}currency) > ({places})" if groups else f" HAVING currency > {places}"
        parameters |= {f"after{index}": text for index, text in enumerate(after)}
    rows = reader.query(
        f"SELECT {group_columns}currency, {counts}, {unit_sums}, sum(cost) AS cost_sum FROM {source}"  # noqa: S608
        f"{_where(conditions)} GROUP BY {group_names}currency{having} ORDER BY {group_names}currency "
        "LIMIT {limit:UInt32} OFFSET {offset:UInt64}",
        parameters | {"limit": limit, "offset": offset},
    ).rows
    width = len(groups)
    return [_usage_row(row[:width], *row[width:]) for row in rows]


def all_usage(
    reader: Reader, tenant_id: str | None, by: Sequence[str], start_ms: int, end_ms: int, *, at_once: int = ROWS_MAX
) -> list[UsageRow]:
    """As `usage`, and every row of it."""
    rows = usage(reader, tenant_id, by, start_ms, end_ms, limit=at_once)
    more = len(rows) == at_once
    while more:
        page = usage(reader, tenant_id, by, start_ms, end_ms, limit=at_once, after=[*rows[-1].group, rows[-1].currency])
        rows += page
        more = len(page) == at_once
    return rows


def _usage_row(group: Sequence[object], currency: object, counts: object, units: object, cost: object) -> UsageRow:
    events, refused_events, unrated_events, *tokens = cast("Sequence[int]", counts)
    return UsageRow(
        group=tuple(_text(value) for value in group),
        currency=_text(currency),
        events=events,
        refused_events=refused_events,
        unrated_events=unrated_events,
        quantities=_quantities([*tokens, units]),
        cost_pico=_pico(cost),
    )


def totals_between(start_s: int, end_s: int, days: TrustedDays, where: str) -> str:
    """The totals of [start_s, end_s) and `where`, as a table: days that are trusted as one row for each name, the rest by the
    minute. Columns: minute, tenant, names, currency, units, cost, and `counts` in the order of `COUNTS`."""
    first_s, last_s = -(-start_s // DAY_S) * DAY_S, min(end_s // DAY_S * DAY_S, days.before_s)
    joined = f"{where} AND" if where else " WHERE"
    if first_s >= last_s:
        return f"({_BY_MINUTE}{joined} {_minutes([(start_s, end_s)])})"
    stale_s = [day_s for day_s in days.stale_s if first_s <= day_s < last_s]
    minutes = [(start_s, first_s), *((day_s, day_s + DAY_S) for day_s in stale_s), (last_s, end_s)]
    trusted = f" AND day NOT IN ({', '.join(map(str, stale_s))})" if stale_s else ""
    return (
        f"({_BY_DAY}{joined} {_minutes([(first_s, last_s)], 'day')}{trusted} "
        f"UNION ALL {_BY_MINUTE}{joined} {_minutes(minutes)})"
    )


def _minutes(ranges: Sequence[tuple[int, int]], column: str = "minute") -> str:
    """The condition of times that lie in one of `ranges`."""
    within = [
        f"({column} >= toDateTime({first}, 'UTC') AND {column} < toDateTime({end}, 'UTC'))"
        for first, end in ranges
        if first < end
    ]
    return f"({' OR '.join(within) or '0'})"


def totals(reader: Reader) -> Totals:
    """The sums over everything: what a replay of a trace is compared with."""
    rows = usage(reader, by=())
    accounts = reader.query(
        "SELECT currency, sum(duplicates), sum(conflicts), sum(credit), sum(spend) FROM accounts FINAL "
        "GROUP BY currency ORDER BY currency"
    ).rows
    units: dict[str, int] = {}
    for row in rows:
        for unit, quantity in row.quantities.units.items():
            units[unit] = units.get(unit, 0) + quantity
    return Totals(
        events=sum(row.events for row in rows),
        refused_events=sum(row.refused_events for row in rows),
        unrated_events=sum(row.unrated_events for row in rows),
        duplicates=sum(_int(row[1]) for row in accounts),
        conflicts=sum(_int(row[2]) for row in accounts),
        quantities=_quantities([*(sum(getattr(row.quantities, name) for row in rows) for name in TOKEN_COLUMNS), units]),
        cost_pico={row.currency: row.cost_pico for row in rows},
        credit_pico={_text(row[0]): _pico(row[3]) for row in accounts},
        spend_pico={_text(row[0]): _pico(row[4]) for row in accounts},
    )


def alerts(
    reader: Reader,
    tenant_id: str | None = None,
    since_ms: int = 0,
    after: Mapping[int, int] | None = None,
    *,
    filters: Mapping[str, str] | None = None,
    behind: tuple[int, int, int, str] | None = None,
    active: bool = False,
    limit: int = ROWS_MAX,
) -> list[AlertRow]:
    """Alerts of which something was told at or after `since_ms`, each as it is now, oldest first; `filters` by column.

    `active`: only those that are not resolved, and newest first.

    `behind`: of the last one of a page, when it was updated, its partition, version and ID; only those behind it are given.

    `after`: partition -> version of the last alert that the caller has seen there; those and older ones are left out. (Log
    times of partitions differ, so one time could not say what was seen.)
    """
    conditions, parameters = _tenant(tenant_id)
    conditions.append("updated >= fromUnixTimestamp64Milli({since:Int64})")
    parameters |= {"since": since_ms, "limit": limit}
    for column in ("severity", "rule", "state", "alert_id"):
        if (filters or {}).get(column):
            conditions.append(f"{column} = {{{column}:String}}")
            parameters[column] = (filters or {})[column]
    if active:
        conditions.append("state != 'resolved'")
    for index, (partition, version) in enumerate(sorted((after or {}).items())):
        conditions.append(f"NOT (ledger_partition = {{p{index}:UInt32}} AND version <= {{v{index}:UInt64}})")
        parameters |= {f"p{index}": partition, f"v{index}": version}
    if behind is not None:
        conditions.append(
            "(updated, ledger_partition, version, alert_id) > (fromUnixTimestamp64Milli({behind_ms:Int64}), "
            "{behind_partition:UInt32}, {behind_version:UInt64}, {behind_id:String})"
        )
        parameters |= dict(zip(("behind_ms", "behind_partition", "behind_version", "behind_id"), behind, strict=True))
    rows = reader.query(
        f"SELECT alert_id, tenant_id, rule, severity, {_ms('raised')}, summary, request_ids, figure_names, figure_values, "  # noqa: S608
        f"label_names, label_values, ledger_partition, version, subject, state, {_ms('updated')}, acknowledged_by, note, "
        f"action FROM alerts FINAL{_where(conditions)} "
        f"ORDER BY {'updated DESC' if active else 'updated'}, ledger_partition, version, alert_id LIMIT {{limit:UInt32}}",
        parameters,
    ).rows
    return [
        AlertRow(
            alert_id=_text(row[0]),
            tenant_id=_text(row[1]),
            rule=_text(row[2]),
            severity=_text(row[3]),
            raised_ms=_int(row[4]),
            summary=_text(row[5]),
            request_ids=tuple(cast("list[str]", row[6])),
            figures=dict(zip(cast("list[str]", row[7]), cast("list[int]", row[8]), strict=True)),
            labels=dict(zip(cast("list[str]", row[9]), cast("list[str]", row[10]), strict=True)),
            partition=_int(row[11]),
            version=_int(row[12]),
            subject=_text(row[13]),
            state=_text(row[14]),
            updated_ms=_int(row[15]),
            acknowledged_by=_text(row[16]),
            note=_text(row[17]),
            action=_text(row[18]),
        )
        for row in rows
    ]


def all_alerts(
    reader: Reader, tenant_id: str | None, since_ms: int, filters: Mapping[str, str], *, at_once: int = ROWS_MAX
) -> list[AlertRow]:
    """As `alerts`, and every row of it."""
    rows = alerts(reader, tenant_id, since_ms, filters=filters, limit=at_once)
    more = len(rows) == at_once
    while more:
        last = rows[-1]
        behind = last.updated_ms, last.partition, last.version, last.alert_id
        page = alerts(reader, tenant_id, since_ms, filters=filters, behind=behind, limit=at_once)
        rows += page
        more = len(page) == at_once
    return rows


def active_alerts(reader: Reader, tenant_id: str | None = None) -> int:
    """How many alerts are not resolved."""
    where, parameters = _tenant(tenant_id)
    where.append("state != 'resolved'")
    [[count]] = reader.query(f"SELECT count() FROM alerts FINAL{_where(where)}", parameters).rows  # noqa: S608
    return _int(count)


def events(
    reader: Reader,
    tenant_id: str,
    request_ids: Sequence[str] | None = None,
    start_ms: int = 0,
    end_ms: int = TIME_MS_MAX,
    *,
    limit: int = ROWS_MAX,
) -> list[EventRow]:
    """A tenant's accepted events, each once: those named (at most 1,000), or those that ended in [start_ms, end_ms)."""
    conditions, parameters = _tenant(tenant_id)
    if request_ids is not None:
        conditions.append("request_id IN {request_ids:Array(String)}")
        parameters["request_ids"] = request_ids
    conditions += ["ended >= fromUnixTimestamp64Milli({start:Int64})", "ended < fromUnixTimestamp64Milli({end:Int64})"]
    rows = reader.query(
        "SELECT tenant_id, request_id, project_id, user_id, api_key_id, model, operation, service_class, outcome, "  # noqa: S608
        f"count_source, {_ms('started')}, {_ms('ended')}, {', '.join(TOKEN_COLUMNS)}, (unit_names, unit_quantities), cost, "
        f"currency, price_version, context_tokens, latency_ms, client_request_id, refusal_reason, {_ms('accepted')}, "
        f"ledger_partition, generation, sequence, record_index FROM usage_events FINAL{_where(conditions)} "
        "ORDER BY ended, request_id LIMIT {limit:UInt32}",
        parameters | {"start": start_ms, "end": end_ms, "limit": limit},
    ).rows
    return [
        EventRow(
            tenant_id=_text(row[0]),
            request_id=_text(row[1]),
            project_id=_text(row[2]),
            user_id=_text(row[3]),
            api_key_id=_text(row[4]),
            model=_text(row[5]),
            operation=_text(row[6]),
            service_class=_text(row[7]),
            outcome=_text(row[8]),
            count_source=_text(row[9]),
            started_ms=_int(row[10]),
            ended_ms=_int(row[11]),
            quantities=_quantities(row[12:21]),
            cost_pico=_pico(row[21]),
            currency=_text(row[22]),
            price_version=_int(row[23]),
            context_tokens=_int(row[24]),
            latency_ms=_int(row[25]),
            client_request_id=_text(row[26]),
            refusal_reason=_text(row[27]),
            accepted_ms=_int(row[28]),
            partition=_int(row[29]),
            generation=_text(row[30]),
            sequence=_int(row[31]),
            record_index=_int(row[32]),
        )
        for row in rows
    ]


def rejected(reader: Reader, tenant_id: str | None = None, since_ms: int = 0, *, limit: int = ROWS_MAX) -> list[RejectedRow]:
    """What was not charged because it could not or must not be, newest first."""
    conditions, parameters = _tenant(tenant_id)
    conditions.append("rejected >= fromUnixTimestamp64Milli({since:Int64})")
    rows = reader.query(
        "SELECT ledger_partition, generation, sequence, record_index, tenant_id, request_id, reason, detail, would_have_cost, "  # noqa: S608
        f"hex(payload), payload_bytes, topic, offset, {_ms('rejected')} FROM rejected FINAL{_where(conditions)} "
        "ORDER BY rejected DESC, ledger_partition, sequence, record_index LIMIT {limit:UInt32}",
        parameters | {"since": since_ms, "limit": limit},
    ).rows
    return [
        RejectedRow(
            partition=_int(row[0]),
            generation=_text(row[1]),
            sequence=_int(row[2]),
            record_index=_int(row[3]),
            tenant_id=_text(row[4]),
            request_id=_text(row[5]),
            reason=_text(row[6]),
            detail=_text(row[7]),
            would_have_cost_pico=_pico(row[8]),
            payload=bytes.fromhex(_text(row[9])),
            payload_bytes=_int(row[10]),
            topic=_text(row[11]),
            offset=_int(row[12]),
            rejected_ms=_int(row[13]),
        )
        for row in rows
    ]


def positions(reader: Reader) -> dict[int, int]:
    """Of each partition: the version of the last record that the database has, as `alerts(after=...)` takes it."""
    rows = reader.query("SELECT ledger_partition, version FROM sink_positions FINAL ORDER BY ledger_partition").rows
    return {_int(partition): _int(version) for partition, version in rows}


def freshness(reader: Reader) -> list[Freshness]:
    """How far the database is, by partition. An answer given now knows everything up to those log times."""
    rows = reader.query(
        f"SELECT ledger_partition, generation, sequence, record_hash, ledger_offset, {_ms('log_time')}, {_ms('written')} "  # noqa: S608
        "FROM sink_positions FINAL ORDER BY ledger_partition"
    ).rows
    return [
        Freshness(
            partition=_int(row[0]),
            generation=_text(row[1]),
            sequence=_int(row[2]),
            record_hash=_text(row[3]),
            ledger_offset=_int(row[4]),
            log_time_ms=_int(row[5]),
            written_ms=_int(row[6]),
        )
        for row in rows
    ]


# Of an event: whether it counts as usage. What a gateway refused or a back end never delivered is recorded at price 0.
CHARGED = "outcome NOT IN ('rejected', 'backend_error')"


def _ms(column: str) -> str:
    return f"toUnixTimestamp64Milli({column})"


def _tenant(tenant_id: str | None) -> tuple[list[str], dict[str, Parameter]]:
    if tenant_id is None:
        return [], {}
    return ["tenant_id = {tenant:String}"], {"tenant": tenant_id}


def _where(conditions: Sequence[str]) -> str:
    return f" WHERE {' AND '.join(conditions)}" if conditions else ""


def _text(value: object) -> str:
    assert isinstance(value, str), value
    return value


def _int(value: object) -> int:
    assert isinstance(value, int), value
    return value


def _pico(value: object) -> int:
    assert isinstance(value, Decimal), value
    return decimal_to_pico(value)


def _quantities(values: Sequence[object]) -> Quantities:
    """Eight classes of tokens and the units: by name, or a pair of names and quantities."""
    tokens = [_int(value) for value in values[:8]]
    units = values[8]
    if not isinstance(units, dict):
        names, quantities = cast("tuple[list[str], list[int]]", units)
        units = dict(zip(names, quantities, strict=True))
    assert len(tokens) == len(TOKEN_COLUMNS)
    return Quantities(**dict(zip(TOKEN_COLUMNS, tokens, strict=True)), units=units)
