"""The part of the audit that is about invoices: their bytes, the lines that they took, and that nothing is on none or on two.

Promise: for each tenant, the exact amounts of its invoices, the lines that no invoice has taken and the windows that are open
add up to what was charged. (What an invoice below zero gives back is credit, and spend that the ledger adds beside it.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Protocol, cast

from billing.amounts import PICO, from_amount
from billing.line_parts import from_units
from billing.v1.invoice_pb2 import Invoice, PeriodLine
from sinks.engine import decimal_to_pico
from sinks.invoice_columns import line_id
from sinks.recompute import Finding
from sinks.recompute_lines import ExpectedInvoice

__all__ = ["InvoiceRows", "Query"]

_KEYS_PER_QUERY = 500


class Query(Protocol):
    """Asks the database; `{partition:UInt32}` is bound."""

    def __call__(self, sql: str, parameters: dict[str, int | str | Sequence[str]]) -> list[tuple[object, ...]]: ...


class InvoiceRows:
    """The rows of one partition's lines and invoices."""

    def __init__(self, query: Query, partition: int) -> None:
        self._query = query
        self._partition = partition

    def compare_lines(self, lines: Sequence[PeriodLine], end: int) -> list[Finding]:
        """Each line as `period_lines` has it; rows newer than version `end` are left for the next audit."""
        findings: list[Finding] = []
        for start in range(0, len(lines), _KEYS_PER_QUERY):
            part = {line_id(line.key): line for line in lines[start : start + _KEYS_PER_QUERY]}
            found: dict[str, dict[tuple[object, ...], tuple[object, ...]]] = {name: {} for name in part}
            newer: set[str] = set()
            rows = self._query(
                "SELECT line_id, quantity_of, terms, unit_price, units, amount, events, refused_events, unrated_events, "
                "version FROM period_lines FINAL WHERE tenant_id IN {tenants:Array(String)} "
                "AND line_id IN {lines:Array(String)} AND ledger_partition = {partition:UInt32}",
                {"tenants": sorted({line.key.tenant_id for line in part.values()}), "lines": list(part)},
            )
            for name, quantity_of, terms, unit_price, units, amount, *counts, version in rows:
                found[str(name)][quantity_of, terms, _pico(unit_price)] = (_pico(units) // PICO, _pico(amount), *counts)
                if cast("int", version) > end:
                    newer.add(str(name))
            for name, line in part.items():
                expected = _line_values(line)
                if name not in newer and found[name] != expected:
                    subject = f"line of tenant {line.key.tenant_id}, period {line.key.period_start_ms}, model {line.key.model}"
                    findings.append(self._finding("line_differs", subject, str(expected), str(found[name])))
        return findings

    def compare_invoices(self, invoices: Iterable[ExpectedInvoice]) -> list[Finding]:
        """The bytes of each as `invoices` has them, and its lines."""
        findings: list[Finding] = []
        for invoice in invoices:
            name: dict[str, int | str | Sequence[str]] = {
                "tenant": invoice.tenant_id,
                "series": invoice.series,
                "number": invoice.number,
            }
            subject = f"invoice {invoice.series}-{invoice.number}"
            rows = self._query(
                "SELECT lower(hex(invoice)) FROM invoices FINAL WHERE tenant_id = {tenant:String} AND series = {series:String} "
                "AND number = {number:UInt64} AND ledger_partition = {partition:UInt32}",
                name,
            )
            if rows != [(invoice.stored.hex(),)]:
                found = str(rows[0][0]) if rows else "no row in invoices"
                findings.append(self._finding("invoice_differs", subject, invoice.stored.hex(), found))
            expected = from_amount(Invoice.FromString(invoice.stored).net_exact)
            [[lines]] = self._query(
                "SELECT sum(amount) FROM invoice_lines FINAL WHERE tenant_id = {tenant:String} AND series = {series:String} "
                "AND number = {number:UInt64} AND ledger_partition = {partition:UInt32}",
                name,
            )
            if _pico(lines) != expected:
                findings.append(self._finding("invoice_lines_differ", subject, f"{expected} pico", f"{_pico(lines)} pico"))
        return findings

    def compare_sums(self, spend_pico: Mapping[str, int], open_pico: Mapping[str, int], end: int) -> list[Finding]:
        """Of each tenant: invoices, lines that no invoice has, and open windows are its spend."""
        invoiced = self._sums("SELECT tenant_id, sum(greatest(net_exact, 0)), max(version) FROM invoices FINAL")
        waiting = self._sums(
            "SELECT tenant_id, sum(amount), max(version) FROM period_lines FINAL",
            "AND (tenant_id, line_id) NOT IN (SELECT tenant_id, line_id FROM invoiced_lines)",
        )
        findings = []
        for tenant_id, spend in sorted(spend_pico.items()):
            (invoiced_pico, newest), (waiting_pico, newer) = invoiced.get(tenant_id, (0, 0)), waiting.get(tenant_id, (0, 0))
            if max(newest, newer) > end:
                # The sink has gone on meanwhile.
                continue
            billed = invoiced_pico + waiting_pico + open_pico.get(tenant_id, 0)
            if billed != spend:
                found = f"{billed} pico on invoices, in lines to come and in open windows"
                findings.append(self._finding("bill_differs", f"tenant {tenant_id}", f"{spend} pico charged", found))
        return findings

    def _sums(self, select: str, more: str = "") -> dict[str, tuple[int, int]]:
        rows = self._query(f"{select} WHERE ledger_partition = {{partition:UInt32}} {more} GROUP BY tenant_id", {})
        return {str(tenant_id): (_pico(amount), cast("int", version)) for tenant_id, amount, version in rows}

    def _finding(self, kind: str, subject: str, expected: str, found: str) -> Finding:
        return Finding(kind, self._partition, subject, expected, found)


def _line_values(line: PeriodLine) -> dict[tuple[object, ...], tuple[object, ...]]:
    counts = (0, 0, line.events, line.refused_events, line.unrated_events)
    values: dict[tuple[object, ...], tuple[object, ...]] = {("", "", 0): counts}
    for part in line.parts:
        amounts = from_units(part.units), from_amount(part.amount), 0, 0, 0
        values[part.quantity_of, part.terms, part.unit_pico] = amounts
    return values


def _pico(value: object) -> int:
    assert isinstance(value, Decimal), value
    return decimal_to_pico(value)
