"""What an operator sees of all tenants at once: usage by day, minute, tenant and model, accounts, alerts, what was rejected.

Promise: usage is the sum of all minutes, as `queries.usage` without a tenant gives it, and costs the reading of what is new,
however the engine merges its rows. `InstallationUsage` keeps the sums of what is over: days as they were summed, corrected by
those in which a minute was stated since, and of today what lies some minutes back, until a minute of it is stated anew. Minutes
of all tenants come from where they lie in the order of time (`usage_by_minute`). No event is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import NamedTuple, cast

from sinks.day_totals import COUNTS, DAY_S, summed_until
from sinks.engine import Reader, decimal_to_pico
from sinks.queries import CHARGED
from sinks.rows import UsageRow

__all__ = [
    "GPU_UNIT",
    "SUMMED",
    "AccountSum",
    "InstallationUsage",
    "Stated",
    "Sums",
    "UsageSums",
    "account_sums",
    "minutes_of",
    "rejected_sums",
    "stated_until",
    "sums_of",
    "top",
    "top_users",
    "totals_of",
]

# In which producers may state the time of GPUs that a request took.
GPU_UNIT = "gpu_ms"
# Of today, what is so many minutes old is kept; when that is so far back, more is.
_SETTLED_S = 10 * 60
_KEPT_S = 30 * 60
_TIMEOUT_S = 30.0
_INPUT = ("uncached_input_tokens", "cache_read_tokens", "cache_write_tokens", "image_input_tokens", "audio_input_tokens")
_OUTPUT = ("output_tokens", "reasoning_tokens", "audio_output_tokens")
SUMMED = ("events", "refused_events", "unrated_events", "input", "output", "gpu_ms", "cost")
# Beyond the array, for units that are not there: 0.
_GPU_MS = f"unit_quantities[indexOf(unit_names, '{GPU_UNIT}')] AS gpu_ms"
_COUNTED = {name: f"counts[{place}]" for place, name in enumerate(COUNTS, 1)}
_OF_COUNTS = (
    f"{', '.join(f'{_COUNTED[name]} AS {name}' for name in SUMMED[:3])}, "
    f"{' + '.join(_COUNTED[name] for name in _INPUT)} AS input, "
    f"{' + '.join(_COUNTED[name] for name in _OUTPUT)} AS output, {_GPU_MS}"
)


class _Key(NamedTuple):
    """Whose sum it is: "span", "tenant" or "model"; a span's name is the second in which its minute or its day begins."""

    kind: str
    name: str
    currency: str


# In the order of `SUMMED`; the last one in pico.
_Counts = tuple[int, ...]
_Found = dict[_Key, _Counts]


@dataclass(frozen=True, slots=True)
class AccountSum:
    """All accounts of one status and currency."""

    status: str
    currency: str
    tenants: int
    credit_pico: int
    spend_pico: int
    leased_pico: int
    duplicates: int
    conflicts: int


@dataclass(frozen=True, slots=True)
class Sums:
    """Usage of one name, or of the span that begins in the second that `name` says, in one currency."""

    name: str
    currency: str
    events: int
    refused_events: int
    unrated_events: int
    input_tokens: int
    output_tokens: int
    gpu_ms: int
    cost_pico: int


@dataclass(frozen=True, slots=True)
class UsageSums:
    """Each by name."""

    minutes: list[Sums]
    days: list[Sums]
    tenants: list[Sums]
    models: list[Sums]


# By partition: the highest version of some rows.
_Versions = list[tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """Sums of the rows of a table that are `where`, up to these versions: right while none of them has a later one."""

    where: str = ""
    versions: _Versions = field(default_factory=list)
    sums: _Found = field(default_factory=dict)

    def holds(self, reader: Reader, table: str, where: str) -> bool:
        # Asked so that an index answers it.
        return self.where == where and not _versions(reader, table, where + "".join(_later(*of) for of in self.versions))


class InstallationUsage:
    """Asked again and again, by one thread at a time."""

    def __init__(self) -> None:
        # How far days were summed; only in a database that was made anew does that go back.
        self._summed: dict[int, tuple[int, int]] = {}
        self._forget()

    def _forget(self) -> None:
        self._days, self._corrections, self._today = _Kept(), _Kept(), _Kept()
        # Which days the corrections are of; None: of none for long.
        self._corrected: _Kept | None = None
        # Of `_days`: what a round of sums had written that was not over then.
        self._under_way: list[tuple[int, int, int]] = []
        self._settled_s = 0
        # From when to when `_today` is; nothing is yet.
        self._today_s = -1, -1

    def since(self, reader: Reader, start_s: int, latest_s: int, minutes: int = 60) -> UsageSums:
        """Everything that ended at `start_s`, when a day of UTC begins, or later; and the last `minutes` before `latest_s`."""
        assert start_s % DAY_S == 0, "days are whole"
        minutes_from_s = max(latest_s // 60 * 60 - (minutes - 1) * 60, start_s)
        summed = summed_until(reader)
        if any(summed.get(partition, (0, 0))[1] < version for partition, (_, version) in self._summed.items()):
            self._forget()
        self._summed = summed
        before_s = max([start_s, *(until_s for until_s, _ in summed.values())])
        if not before_s <= self._settled_s <= latest_s - _SETTLED_S or latest_s - self._settled_s > _KEPT_S:
            self._settled_s = max(before_s, latest_s // 60 * 60 - _SETTLED_S)
        sums: _Found = {}
        if before_s > start_s:
            self._over(reader, start_s, before_s, summed)
            _add(sums, self._days.sums)
            _add(sums, self._corrections.sums)
        if self._settled_s > before_s:
            self._keep_today(reader, before_s, minutes_from_s)
            _add(sums, self._today.sums)
        _add(sums, _ask(reader, _in_time(f"minute >= {_time(self._settled_s)}"), minutes_from_s))
        if minutes_from_s < before_s:
            # In a day's first hour.
            recent = _in_time(_minutes(minutes_from_s, before_s))
            found = _ask(reader, recent, minutes_from_s)
            _add(sums, {key: of for key, of in found.items() if key.kind == "minute"})
        return UsageSums(
            [row for row in _rows(sums, "minute") if int(row.name) >= minutes_from_s],
            *(_rows(sums, kind) for kind in ("day", "tenant", "model")),
        )

    def _over(self, reader: Reader, start_s: int, before_s: int, summed: Mapping[int, tuple[int, int]]) -> None:
        """Keep the days from `start_s` to before `before_s`."""
        between = f"day >= {_time(start_s)} AND day < {_time(before_s)}"
        under_way = _under_way(reader, between, summed)
        if under_way != self._under_way or not self._days.holds(reader, "usage_days", between):
            # Looked at before the sums are made, here and below: what is stated meanwhile is found the next time.
            versions = _versions(reader, "usage_days", between)
            self._days = _Kept(between, versions, _ask(reader, _days(between), before_s))
            self._under_way = under_way
        stale = between + "".join(_stated_after(partition, *of, before_s) for partition, of in sorted(summed.items()))
        # Whoever states a minute late states it of the tenant's day first; when a position says so, it is in the minutes.
        late = _versions(reader, "usage_days_stated", stale)
        if (self._corrected, self._corrections.where, self._corrections.versions) == (self._days, stale, late):
            return
        written = dict(_versions(reader, "sink_positions", "1"))
        pairs = f"(SELECT DISTINCT tenant_id, day FROM usage_days_stated WHERE {stale})"  # noqa: S608
        tenants = f"(SELECT DISTINCT tenant_id FROM usage_days_stated WHERE {stale})"  # noqa: S608
        of_minutes = minutes_of(
            f"{_minutes(start_s, before_s)} AND tenant_id IN {tenants} AND (tenant_id, toStartOfDay(minute)) IN {pairs}"
        )
        corrections = _ask(reader, of_minutes, before_s)
        # Instead of what was summed for those days.
        replaced = _ask(reader, _days(f"{between} AND (tenant_id, day) IN {pairs}"), before_s)
        _add(corrections, {key: tuple(-count for count in counts) for key, counts in replaced.items()})
        self._corrections = _Kept(stale, late, corrections)
        self._corrected = self._days if all(written.get(partition, 0) >= version for partition, version in late) else None
        is_as_it_was = self._days.holds(reader, "usage_days", between) and under_way == _under_way(reader, between, summed)
        if not is_as_it_was or late != _versions(reader, "usage_days_stated", stale):
            # Something came between one question and the other, as it does now and then.
            self._over(reader, start_s, before_s, summed_until(reader))

    def _keep_today(self, reader: Reader, before_s: int, minutes_from_s: int) -> None:
        """Keep what ended from `before_s` on and is settled; read of it what has settled since, if nothing was stated anew."""
        settled = _minutes(before_s, self._settled_s)
        if self._today.holds(reader, "usage_by_minute", settled):
            return
        versions = _versions(reader, "usage_by_minute", settled)
        begins_s, ends_s = self._today_s
        goes_on = begins_s == before_s and ends_s <= self._settled_s
        sums: _Found = {}
        if goes_on and self._today.holds(reader, "usage_by_minute", self._today.where):
            sums, begins_s = dict(self._today.sums), ends_s
        else:
            begins_s = before_s
        _add(sums, _ask(reader, _in_time(_minutes(begins_s, self._settled_s)), minutes_from_s))
        self._today, self._today_s = _Kept(settled, versions, sums), (before_s, self._settled_s)


def _time(at_s: int) -> str:
    return f"toDateTime({int(at_s)}, 'UTC')"


def _later(partition: int, version: int) -> str:
    """And not of the partition, or stated later than that."""
    return f" AND (ledger_partition != {int(partition)} OR version > {int(version)})"


def _minutes(from_s: int, until_s: int) -> str:
    return f"minute >= {_time(from_s)} AND minute < {_time(until_s)}"


def _stated_after(partition: int, until_s: int, version: int, before_s: int) -> str:
    """And not of the partition, stated later, or of a day that was not summed."""
    if until_s >= before_s:
        return _later(partition, version)
    return f" AND (ledger_partition != {int(partition)} OR version > {int(version)} OR day >= {_time(until_s)})"


def _versions(reader: Reader, table: str, where: str) -> _Versions:
    rows = reader.query(
        f"SELECT ledger_partition, max(version) FROM {table} WHERE {where} GROUP BY 1 ORDER BY 1"  # noqa: S608
    ).rows
    return cast("_Versions", rows)


def _under_way(reader: Reader, between: str, summed: Mapping[int, tuple[int, int]]) -> list[tuple[int, int, int]]:
    """By partition: the version of sums later than those that are said to be over, and how many rows; they come in several
    parts of one version, so the version does not say whether more came."""
    later = between + "".join(_later(partition, version) for partition, (_, version) in sorted(summed.items()))
    rows = reader.query(
        f"SELECT ledger_partition, max(version), count() FROM usage_days WHERE {later} GROUP BY 1 ORDER BY 1"  # noqa: S608
    ).rows
    return cast("list[tuple[int, int, int]]", rows)


# The minute and the tenant are in both tables' keys, so they may be looked at before rows of one key are made one.


def _in_time(where: str) -> str:
    """Minutes of all tenants, `where` says when."""
    return (
        "SELECT tenant_id, model, currency, minute, events, refused_events, unrated_events, input_tokens_all AS input, "  # noqa: S608
        f"output_tokens_all AS output, gpu_ms, cost FROM usage_by_minute FINAL PREWHERE {where}"
    )


def minutes_of(where: str) -> str:
    """Minutes of some tenants, as a table of what is summed."""
    return (
        f"SELECT tenant_id, project_id, model, currency, minute, events, refused_events, unrated_events, "  # noqa: S608
        f"{' + '.join(_INPUT)} AS input, "
        f"{' + '.join(_OUTPUT)} AS output, {_GPU_MS}, cost FROM usage_totals FINAL PREWHERE {where}"
    )


def totals_of(source: str) -> str:
    """What is summed of a table as `queries.totals_between` gives it."""
    return f"SELECT tenant_id, project_id, model, currency, minute, {_OF_COUNTS}, cost FROM {source}"  # noqa: S608


def _days(where: str) -> str:
    return f"SELECT tenant_id, model, currency, day AS minute, {_OF_COUNTS}, cost FROM usage_days FINAL WHERE {where}"  # noqa: S608


def _ask(reader: Reader, source: str, minutes_from_s: int) -> _Found:
    """The sums of `source` by day, by minute from `minutes_from_s` on, by tenant and by model; read once."""
    sums = ", ".join(f"sum({name}) AS {name}" for name in SUMMED)
    spans = f"if(minute >= {_time(minutes_from_s)}, minute, toStartOfDay(minute))"
    rows = reader.query(
        "SELECT grouping(tenant_id), grouping(model), toString(tenant_id), toString(model), toUnixTimestamp(span), currency, "  # noqa: S608
        f"{sums} FROM (SELECT tenant_id, model, currency, {spans} AS span, {sums} FROM ({source}) "
        "GROUP BY tenant_id, model, currency, span) GROUP BY GROUPING SETS ((tenant_id, currency), (model, currency), "
        "(span, currency))",
        timeout_s=_TIMEOUT_S,
    ).rows
    found: _Found = {}
    for of_others, of_no_model, tenant_id, model, span_s, currency, *summed in rows:
        counts = (*cast("list[int]", summed[:-1]), _pico(summed[-1]))
        # ClickHouse: 0 where a column is one of the set's.
        if not of_others:
            found[_Key("tenant", str(tenant_id), str(currency))] = counts
        elif not of_no_model:
            found[_Key("model", str(model), str(currency))] = counts
        else:
            begins_s = cast("int", span_s)
            of_day = {_Key("day", f"{begins_s // DAY_S * DAY_S}", str(currency)): counts}
            _add(found, of_day)
            if begins_s >= minutes_from_s:
                found[_Key("minute", f"{begins_s}", str(currency))] = counts
    return found


def _add(sums: _Found, more: Mapping[_Key, _Counts]) -> None:
    for key, counts in more.items():
        known = sums.get(key)
        sums[key] = counts if known is None else tuple(a + b for a, b in zip(known, counts, strict=True))


def _rows(sums: Mapping[_Key, _Counts], kind: str) -> list[Sums]:
    """Those of a kind by name; what corrections left nothing of is nothing."""
    return [Sums(key.name, key.currency, *counts) for key, counts in sorted(sums.items()) if key.kind == kind and any(counts)]


def sums_of(row: UsageRow, name: str) -> Sums:
    """A row of usage as one of sums."""
    used = row.quantities
    return Sums(
        name,
        row.currency,
        row.events,
        row.refused_events,
        row.unrated_events,
        used.input_tokens,
        used.all_output_tokens,
        used.units.get(GPU_UNIT, 0),
        row.cost_pico,
    )


def top(rows: Iterable[Sums], count: int) -> list[Sums]:
    """Those with the highest cost, then the most tokens; equal ones by name."""
    return sorted(rows, key=lambda row: (-row.cost_pico, -row.input_tokens - row.output_tokens, -row.events, row.name))[:count]


def top_users(reader: Reader, tenant_id: str, start_ms: int, end_ms: int, count: int) -> tuple[list[Sums], int]:
    """A tenant's users as `top` has them, of its events that ended in [start_ms, end_ms); and how many there are in all."""
    used, made = (f"sumIf({' + '.join(names)}, {CHARGED})" for names in (_INPUT, _OUTPUT))
    rows = reader.query(
        "SELECT *, count() OVER () FROM (SELECT user_id, currency, count() AS requests, "  # noqa: S608
        f"countIf(NOT ({CHARGED})), countIf(price_version = 0 AND {CHARGED}), {used} AS used, {made} AS made, "
        f"sumIf(unit_quantities[indexOf(unit_names, '{GPU_UNIT}')], {CHARGED}), sum(cost) AS cost_sum FROM usage_events FINAL "
        "WHERE tenant_id = {tenant:String} AND ended >= fromUnixTimestamp64Milli({start:Int64}) "
        "AND ended < fromUnixTimestamp64Milli({end:Int64}) GROUP BY user_id, currency) "
        "ORDER BY cost_sum DESC, used + made DESC, requests DESC, user_id LIMIT {count:UInt32}",
        {"tenant": tenant_id, "start": start_ms, "end": end_ms, "count": count},
        timeout_s=_TIMEOUT_S,
    ).rows
    sums = []
    for row in rows:
        events, refused, unrated, read, made_of_it, gpu_ms = cast("list[int]", row[2:8])
        sums.append(Sums(str(row[0]), str(row[1]), events, refused, unrated, read, made_of_it, gpu_ms, _pico(row[8])))
    return sums, cast("int", rows[0][9]) if rows else 0


def account_sums(reader: Reader) -> list[AccountSum]:
    """The sums of all accounts, by status and currency."""
    rows = reader.query(
        "SELECT status, currency, count(), sum(credit), sum(spend), sum(leased), sum(duplicates), sum(conflicts) "
        "FROM accounts FINAL GROUP BY status, currency ORDER BY status, currency"
    ).rows
    return [
        AccountSum(
            str(row[0]),
            str(row[1]),
            cast("int", row[2]),
            _pico(row[3]),
            _pico(row[4]),
            _pico(row[5]),
            cast("int", row[6]),
            cast("int", row[7]),
        )
        for row in rows
    ]


def rejected_sums(reader: Reader, since_ms: int) -> dict[str, int]:
    """How many were rejected since then, by reason."""
    rows = reader.query(
        "SELECT reason, uniqExact(ledger_partition, generation, sequence, record_index) FROM rejected "
        "WHERE rejected >= fromUnixTimestamp64Milli({since:Int64}) GROUP BY reason ORDER BY reason",
        {"since": since_ms},
    ).rows
    return {str(reason): cast("int", count) for reason, count in rows}


class Stated(NamedTuple):
    """How far a partition is: the highest version of its position, and of its accounts, which may be shown before everything
    else of the same record; and the log time up to which everything is there."""

    position: int
    account: int
    log_time_ms: int


def stated_until(reader: Reader) -> dict[int, Stated]:
    """By partition. While it is the same, so is every answer."""
    rows = reader.query(
        "SELECT ledger_partition, max(position), max(account), toUnixTimestamp64Milli(argMax(log_time, position)) FROM ("
        "SELECT ledger_partition, version AS position, toUInt64(0) AS account, log_time FROM sink_positions "
        "UNION ALL SELECT ledger_partition, toUInt64(0), version, toDateTime64(0, 3, 'UTC') FROM accounts) "
        "GROUP BY ledger_partition ORDER BY ledger_partition"
    ).rows
    return {partition: Stated(*of) for partition, *of in cast("list[tuple[int, int, int, int]]", rows)}


def _pico(value: object) -> int:
    assert isinstance(value, Decimal), value
    return decimal_to_pico(value)
