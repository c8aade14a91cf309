"""The part of the audit that is about copies and sums of minutes, which dashboards read: `usage_by_minute` and `usage_days`.

Promise: each minute in the order of time says what its events add up to, as `usage_totals` must; each day that readers trust to
be summed (`sinks.day_totals`) says what its minutes add up to, and no other is there. What nobody trusts is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import cast

from sinks.audit_invoices import Query
from sinks.day_totals import COUNTS
from sinks.engine import decimal_to_pico
from sinks.event_columns import OPERATIONS, SERVICE_CLASSES
from sinks.recompute import ExpectedWindow, Finding, WindowId
from sinks.tables import TOKEN_COLUMNS

__all__ = ["SumRows", "window_row_key"]

_OUTPUT = frozenset({"output_tokens", "reasoning_tokens", "audio_output_tokens"})
# Days that differ, one side or both: more say nothing that these do not.
_DAYS_MAX = 1_000
_SUMMED_OF_DAY = "tenant_id, day, project_id, model, operation, service_class, currency, counts, units, quantities, cost"
_DAY_KEY = "tenant_id, day, project_id, model, operation, service_class, currency"


class SumRows:
    """The rows of one partition's minutes in time, and of its days."""

    def __init__(self, query: Query, partition: int) -> None:
        self._query = query
        self._partition = partition

    def compare_minutes(self, windows: Mapping[WindowId, ExpectedWindow], until: int) -> list[Finding]:
        """Each as `usage_by_minute` has it; rows newer than version `until` are left for the next audit."""
        minutes = [window_id.key.minute for window_id in windows]
        rows = self._query(
            "SELECT tenant_id, project_id, model, operation, service_class, toInt64(intDiv(toUnixTimestamp(minute), 60)), "
            "generation, opened_sequence, price_version, events, refused_events, unrated_events, input_tokens_all, "
            "output_tokens_all, gpu_ms, currency, cost, version FROM usage_by_minute FINAL "
            "WHERE minute >= toDateTime({first:Int64}, 'UTC') AND minute <= toDateTime({last:Int64}, 'UTC') "
            "AND tenant_id IN {tenants:Array(String)} AND ledger_partition = {partition:UInt32}",
            {
                "tenants": sorted({window_id.key.tenant_id for window_id in windows}),
                "first": min(minutes) * 60,
                "last": max(minutes) * 60,
            },
        )
        found = {row[:9]: row for row in rows}
        findings: list[Finding] = []
        for window_id, window in windows.items():
            row = found.get(window_row_key(window_id))
            if row is None:
                expected = f"{window.events} events"
                findings.append(self._finding("minute_missing", str(window_id), expected, "no row in usage_by_minute"))
                continue
            if cast("int", row[17]) > until:
                continue
            for (name, value), have in zip(_minute_values(window).items(), (*row[9:16], _pico(row[16])), strict=True):
                if value != have:
                    findings.append(self._finding("minute_differs", f"{window_id}: {name}", str(value), str(have)))
        return findings

    def compare_days(self) -> list[Finding]:
        """Sums by day beside the sums of their minutes, where nothing was stated of that day since it was summed."""
        mark = self._query(
            "SELECT toUInt32(before_day), version FROM usage_days_summed FINAL WHERE ledger_partition = {partition:UInt32}", {}
        )
        if not mark:
            return []
        [(before_s, version)] = cast("list[tuple[int, int]]", mark)
        stated = "FROM usage_days_stated WHERE ledger_partition = {partition:UInt32} AND version > {version:UInt64}"
        counts = ", ".join(f"sum({name})" for name in COUNTS)
        # What both have cancels out, so what is left is what one of them has alone.
        rows = self._query(
            f"SELECT sum(side), toUInt32(day), {_SUMMED_OF_DAY} FROM ("  # noqa: S608 - names of ours
            f"SELECT toInt8(1) AS side, {_DAY_KEY}, counts, summed.1 AS units, summed.2 AS quantities, cost FROM ("
            "SELECT tenant_id, toStartOfDay(minute) AS day, project_id, model, operation, service_class, currency, "
            f"[{counts}] AS counts, sumMap(unit_names, unit_quantities) AS summed, sum(cost) AS cost FROM usage_totals FINAL "
            "WHERE ledger_partition = {partition:UInt32} AND minute < toDateTime({before:Int64}, 'UTC') "
            f"GROUP BY {_DAY_KEY}) UNION ALL "
            f"SELECT toInt8(-1) AS side, {_DAY_KEY}, counts, unit_names AS units, unit_quantities AS quantities, cost "
            "FROM usage_days FINAL WHERE ledger_partition = {partition:UInt32} AND day < toDateTime({before:Int64}, 'UTC')"
            f") WHERE (tenant_id, day) NOT IN (SELECT tenant_id, day {stated}) GROUP BY {_SUMMED_OF_DAY} HAVING sum(side) != 0 "
            f"ORDER BY {_DAY_KEY}, sum(side) LIMIT {{limit:UInt32}}",
            {"before": before_s, "version": version, "limit": _DAYS_MAX},
        )
        if not rows:
            return []
        # The sink goes on meanwhile; it states of a day that a minute of it comes before it writes the minute.
        newer = set(self._query(f"SELECT DISTINCT tenant_id, toUInt32(day) {stated}", {"version": version}))
        findings: list[Finding] = []
        for side, day_s, tenant_id, _, project_id, model, operation, service_class, currency, *sums in rows:
            if (tenant_id, day_s) in newer:
                continue
            subject = f"day {day_s} of {tenant_id}/{project_id}/{model}/{operation}/{service_class} in {currency}"
            told = str([*sums[:-1], f"{_pico(sums[-1])} pico"])
            if cast("int", side) > 0:
                findings.append(self._finding("day_differs", subject, told, "not so in usage_days"))
            else:
                findings.append(self._finding("day_differs", subject, "not so by its minutes", told))
        return findings

    def _finding(self, kind: str, subject: str, expected: str, found: str) -> Finding:
        return Finding(kind, self._partition, subject, expected, found)


def window_row_key(window_id: WindowId) -> tuple[object, ...]:
    """As rows of minutes begin: who, what, when, and which window of that minute."""
    key = window_id.key
    return (
        key.tenant_id,
        key.project_id,
        key.model,
        OPERATIONS[key.operation],
        SERVICE_CLASSES[key.service_class],
        key.minute,
        window_id.generation.hex(),
        window_id.opened_sequence,
        key.price_version,
    )


def _minute_values(window: ExpectedWindow) -> dict[str, object]:
    tokens = dict(zip(TOKEN_COLUMNS, window.tokens, strict=True))
    return {
        "events": window.events,
        "refused_events": window.refused_events,
        "unrated_events": window.unrated_events,
        "input_tokens_all": sum(count for name, count in tokens.items() if name not in _OUTPUT),
        "output_tokens_all": sum(count for name, count in tokens.items() if name in _OUTPUT),
        "gpu_ms": window.units["gpu_ms"],
        "currency": window.currency,
        "cost_pico": window.cost_pico,
    }


def _pico(value: object) -> int:
    assert isinstance(value, Decimal), value
    return decimal_to_pico(value)
