"""Invoices that the real step drew, from their lines down to the requests, and up to a FOCUS export: every sum is exact."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import secrets
from collections import Counter
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from billing.amounts import PICO, from_amount
from billing.v1.invoice_pb2 import CREDIT_KIND_PROMOTIONAL, Invoice
from serving.documents import DocumentFormat, render
from sinks import queries
from sinks.embedded import LoopbackServer
from sinks.engine import Reader
from sinks.engines.chdb import ChdbEngine
from sinks.errors import ParameterError
from sinks.explain import Explanation, explain_line
from sinks.focus import focus_rows
from sinks.focus_rows import COLUMNS
from sinks.follow import feed
from sinks.invoices import invoice_by_number, invoices_of, is_of_requests
from taximeter.cli import application
from tests.billing.invoice_volume import DAY_MS, DOLLARS, FOREIGN, JANUARY_MS, NOVEMBER_MS, YUAN, invoices, volume
from tests.billing.ledgers import KEYS, Ledger
from tests.sinks.focus_rules import focus_problems


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return volume()


@pytest.fixture
def reader(engine: ChdbEngine, ledger: Ledger) -> Reader:
    feed(engine, ledger.stored, KEYS.seal_key)
    return engine


def _explained(reader: Reader) -> list[Explanation]:
    return [
        explain_line(reader, issued, line.number, limit=1_000)
        for tenant_id in (DOLLARS, YUAN)
        for issued in invoices_of(reader, tenant_id)
        for line in issued.invoice.lines
    ]


def test_the_stored_bytes_are_read_back_and_found_by_number(reader: Reader, ledger: Ledger) -> None:
    drawn = invoices(ledger)
    assert len(drawn) == 4
    found = sorted((*invoices_of(reader, DOLLARS), *invoices_of(reader, YUAN)), key=lambda issued: issued.invoice.number)
    assert [issued.stored for issued in found] == drawn
    assert [issued.number for issued in found] == [f"INV-0001-{number}" for number in range(1, 5)]
    for issued in found:
        assert invoice_by_number(reader, issued.number) == issued
    assert invoice_by_number(reader, "INV-0001-5") is None
    for before, after in pairwise(drawn):
        assert Invoice.FromString(after).previous_hash == hashlib.sha256(before).digest()


def test_every_line_is_the_sum_of_its_requests_and_no_request_is_on_two_invoices(reader: Reader, ledger: Ledger) -> None:
    explained = _explained(reader)
    assert [found.difference for found in explained if found.difference] == []
    of_requests = [found for found in explained if not found.note]
    assert len(of_requests) > 20
    assert {found.note for found in explained if found.note} == {
        "it came with the close of the period: no request was charged it",
        "a correction (void) that ann@example.com asked for: answered with another tenant's text",
        "a correction (credit note) that ann@example.com asked for: promised by the contract",
    }
    invoice_of: dict[tuple[str, str], str] = {}
    for found in of_requests:
        assert found.requests == len(found.page) > 0
        for request in found.page:
            key = (found.issued.invoice.tenant_id, request.request_id)
            assert invoice_of.setdefault(key, found.issued.number) == found.issued.number
    assert invoice_of[DOLLARS, "late-1"] == "INV-0001-3"
    assert invoice_of[YUAN, "late-2"] == "INV-0001-4"
    assert (YUAN, "later") not in invoice_of
    # A request is on as many lines of its invoice as it has prices, and on each once.
    counted = Counter(
        (request.request_id, found.line.number)
        for found in of_requests
        for request in found.page
        if found.issued.invoice.number == 1
    )
    assert set(counted.values()) == {1}


def test_a_correction_says_who_why_and_which_requests(reader: Reader, engine: ChdbEngine) -> None:
    issued = invoices_of(reader, DOLLARS)[1]
    of_void = [line.number for line in issued.invoice.lines if line.key.adjustment_id == "void-november-f3"]
    assert len(of_void) == 2
    for number in of_void:
        found = explain_line(reader, issued, number)
        assert (found.requests, [request.request_id for request in found.page]) == (1, ["november-f3"])
        assert found.amount_pico == from_amount(found.line.part.amount) < 0
    engine.execute("ALTER TABLE adjustments DELETE WHERE part = 1 SETTINGS mutations_sync = 1")
    differences = [explain_line(reader, issued, number).difference for number in of_void]
    assert any("units, its correction 0; the line has -" in text for text in differences)


def test_a_page_shows_some_and_sums_all(reader: Reader) -> None:
    [issued, _] = invoices_of(reader, DOLLARS)
    [number] = [line.number for line in issued.invoice.lines if line.part.quantity_of == "cache_read_tokens"]
    whole = explain_line(reader, issued, number)
    assert whole.requests == 9
    some = explain_line(reader, issued, whole.line.number, offset=2, limit=3)
    assert some.page == whole.page[2:5]
    assert (some.requests, some.units, some.amount_pico) == (whole.requests, whole.units, whole.amount_pico)
    with pytest.raises(ParameterError, match=f"line 0: invoice INV-0001-1 has lines 1 to {len(issued.invoice.lines)}"):
        explain_line(reader, issued, 0)


def test_a_request_that_is_gone_from_the_database_is_a_difference(reader: Reader, engine: ChdbEngine) -> None:
    engine.execute("ALTER TABLE usage_events DELETE WHERE request_id = 'november-f3' SETTINGS mutations_sync = 1")
    [issued, _] = invoices_of(reader, DOLLARS)
    found = {line.number: explain_line(reader, issued, line.number).difference for line in issued.invoice.lines}
    broken = [text for text in found.values() if text]
    assert len(broken) == 2
    assert any("units, its requests" in text and "USD, its requests" in text for text in broken)


def test_focus_rows_of_an_invoice_come_to_its_total_less_given_credit(reader: Reader) -> None:
    rows = [dict(row) for row in focus_rows(reader, NOVEMBER_MS - DAY_MS, JANUARY_MS + DAY_MS, "Example Inference")]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(rows)
    assert focus_problems(text.getvalue()) == []
    billed: dict[str, Decimal] = {}
    for row in rows:
        billed[row["InvoiceId"]] = billed.get(row["InvoiceId"], Decimal(0)) + Decimal(row["BilledCost"])
    for tenant_id in (DOLLARS, YUAN):
        for issued in invoices_of(reader, tenant_id):
            invoice = issued.invoice
            given = sum(from_amount(credit.amount) for credit in invoice.credits if credit.kind == CREDIT_KIND_PROMOTIONAL)
            assert billed.pop(issued.number) * PICO == from_amount(invoice.total) - given
    assert list(billed) == [""]
    assert {row["ChargeCategory"] for row in rows} == {"Usage", "Adjustment", "Credit", "Tax"}
    late = [row for row in rows if row["ChargeClass"] == "Correction" and row["BillingAccountId"] == DOLLARS]
    assert {(row["InvoiceId"], row["BillingPeriodStart"], row["ChargePeriodStart"][:7]) for row in late} == {
        ("INV-0001-3", "2025-12-01T00:00:00Z", "2025-11"),
        ("", "2026-01-01T00:00:00Z", "2025-11"),
    }
    waiting = [row for row in late if not row["InvoiceId"]]
    assert {row["ChargeDescription"] for row in waiting} == {
        "Output tokens flat, correction void-november-f4",
        "Uncached input tokens flat, correction void-november-f4",
    }


def test_all_that_was_spent_is_billed_once(reader: Reader) -> None:
    """What requests were charged and what the close added is the account's spend, invoiced or not."""
    spent = {balance.tenant_id: balance.spend_pico for balance in queries.balances(reader)}
    billed = dict.fromkeys(spent, Decimal(0))
    for row in focus_rows(reader, NOVEMBER_MS - DAY_MS, JANUARY_MS + DAY_MS, "Example Inference"):
        if row["ChargeCategory"] not in {"Tax", "Credit"} and not row["ChargeDescription"].startswith("Rounding"):
            billed[row["BillingAccountId"]] += Decimal(row["BilledCost"])
    assert {tenant_id: amount * PICO for tenant_id, amount in billed.items()} == spent
    assert spent[FOREIGN] > 0


def test_the_close_is_no_request(reader: Reader) -> None:
    [issued, _] = invoices_of(reader, YUAN)
    closing = [line for line in issued.invoice.lines if not is_of_requests(line)]
    assert [(line.key.model, from_amount(line.part.amount)) for line in closing] == [("volume", -300 * 10_000_000)]
    assert (
        explain_line(reader, issued, closing[0].number).note
        == "it came with the close of the period: no request was charged it"
    )


def test_the_commands_write_a_document_and_show_a_lines_requests(reader: Reader, engine: ChdbEngine, tmp_path: Path) -> None:
    token = secrets.token_urlsafe(32)
    server = LoopbackServer(engine, token).start()
    where = [
        "--set",
        f"clickhouse.loopback_port={server.url.rpartition(':')[2]}",
        "--set",
        f"clickhouse.loopback_token={token}",
    ]

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(application(arguments[0]), [*arguments, *where])

    try:
        issued = invoices_of(reader, YUAN)[0]
        for document in DocumentFormat:
            path = tmp_path / f"invoice.{document}"
            result = run("invoice", "export", issued.number, "--format", document, "--output", str(path))
            assert result.exit_code == 0, result.output
            assert path.read_bytes() == render(issued.stored, document)
        assert "'INV-0001-9' is not known" in run("invoice", "export", "INV-0001-9").output
        result = run("invoice", "explain", issued.number, "1", "--json")
        assert result.exit_code == 0, result.output
        values = json.loads(result.stdout)
        assert (values["units"], values["amount"]) == (values["requests_units"], values["requests_amount"])
        assert "sum of all" in run("invoice", "explain", issued.number, "1").output
        assert run("invoice", "explain", issued.number, "99").exit_code == 2
        engine.execute("ALTER TABLE usage_events DELETE WHERE tenant_id = '" + YUAN + "' SETTINGS mutations_sync = 1")
        result = run("invoice", "explain", issued.number, "1")
        assert result.exit_code == 1
        assert "its requests 0; " in " ".join(result.output.split())
        path = tmp_path / "focus.csv"
        result = run(
            "export", "focus", "--from", "2025-11-01", "--to", "2026-01-01", "--tenant", DOLLARS, "--output", str(path)
        )
        assert result.exit_code == 0, result.output
        assert focus_problems(path.read_text()) == []
    finally:
        server.close()
