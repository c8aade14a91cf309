"""Documents of invoices: the same bytes wherever they are made, every figure in each, and nothing that a name can do."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path

import pypdf
import pytest

from billing.amounts import from_amount, set_amount
from serving.documents import DocumentError, DocumentFormat, render
from serving.documents.content import content_of, document_number
from tests.billing.invoice_sheets import Priced, Sheet, american, chained, chinese, japanese, long
from tests.billing.invoice_volume import invoices as drawn_invoices
from tests.billing.invoice_volume import volume

ROOT = Path(__file__).parents[3]
SHEETS = (american, chinese, japanese)
each_sheet = pytest.mark.parametrize("sheet", SHEETS, ids=lambda sheet: sheet.__name__)


class _Text(HTMLParser):
    """The words of a page, its elements, and every attribute that could load or run something."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.suspect: list[str] = []
        self.feed(page.decode())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.suspect += [name for name, _ in attrs if name in {"src", "href", "style", "action"} or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def _pdf(stored: bytes) -> pypdf.PdfReader:
    return pypdf.PdfReader(io.BytesIO(render(stored, DocumentFormat.PDF)))


def _pages(stored: bytes) -> list[str]:
    return [page.extract_text() for page in _pdf(stored).pages]


def test_documents_are_the_same_bytes_wherever_and_whenever_they_are_made(tmp_path: Path) -> None:
    stored = chinese().stored()
    (tmp_path / "invoice").write_bytes(stored)
    program = (
        "import hashlib, pathlib, sys\n"
        "from serving.documents import DocumentFormat, render\n"
        "stored = pathlib.Path(sys.argv[1]).read_bytes()\n"
        "print(*(hashlib.sha256(render(stored, one)).hexdigest() for one in DocumentFormat))\n"
    )
    here = [hashlib.sha256(render(stored, one)).hexdigest() for one in DocumentFormat]
    assert here == [hashlib.sha256(render(stored, one)).hexdigest() for one in DocumentFormat]
    environment = os.environ | {
        "TZ": "Pacific/Kiritimati",
        "LC_ALL": "de_DE.UTF-8",
        "PYTHONHASHSEED": "7",
        "SOURCE_DATE_EPOCH": "1",
    }
    elsewhere = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "invoice")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert elsewhere.stdout.split() == here


@pytest.mark.parametrize(
    ("document", "digest"),
    [
        (DocumentFormat.JSON, "e58c110a7212a5f97995ccaf05896f52b369bb422e54f075576e307b954b424f"),
        (DocumentFormat.CSV, "db2a040fb96e07e9eb436c3fa7d2eadb8a005b9fe5d13698dadd76b9dab2216d"),
        (DocumentFormat.HTML, "d20bab0d7919f3e7a9f0e10d87ff76f95efd89603b18f37b7b49877c83261e0c"),
    ],
)
def test_documents_of_an_old_invoice_stay_as_they_were(document: DocumentFormat, digest: str) -> None:
    """Whoever changes one of these changes every document that was ever sent: name it in the changelog."""
    assert hashlib.sha256(render(american().stored(), document)).hexdigest() == digest


@each_sheet
def test_every_line_stands_in_every_document(sheet: Callable[[], Sheet]) -> None:
    stored = sheet().stored()
    content = content_of(stored)
    amounts = [line.amount.text for group in (*content.projects, *content.adjustments) for line in group.lines]
    sums = [total.amount.head for total in content.totals]
    assert len(amounts) == len(sheet().lines)
    page = _Text(render(stored, DocumentFormat.HTML)).text.replace(" ", "")
    pdf = "".join("".join(_pages(stored)).split())
    for text in amounts + sums:
        assert text in page
        assert text in pdf


@each_sheet
def test_json_and_csv_add_up_to_the_exact_net(sheet: Callable[[], Sheet]) -> None:
    stored = sheet().stored()
    values = json.loads(render(stored, DocumentFormat.JSON))
    rows = list(csv.DictReader(io.StringIO(render(stored, DocumentFormat.CSV).decode(), newline="")))
    for lines in (values["lines"], rows):
        assert sum(Decimal(line["amount"]) for line in lines) == Decimal(values["net_exact"])
        for line in lines:
            if Decimal(line["unit_price"]):
                assert int(line["units"]) * Decimal(line["unit_price"]) == Decimal(line["amount"])
                assert Decimal(line["price_per_million"]) == Decimal(line["unit_price"]) * 1_000_000
    assert Decimal(values["net"]) + sum(Decimal(tax["amount"]) for tax in values["taxes"]) == Decimal(values["total"])


def test_quantity_times_price_is_the_amount_as_people_read_them() -> None:
    for sheet in SHEETS:
        content = content_of(sheet().stored())
        for line in (line for group in (*content.projects, *content.adjustments) for line in group.lines if line.price):
            per = {"1M": 1_000_000, "minute": 60_000, "request": 1, "step": 1}[line.price_per]
            units, price, amount = (_read(text) for text in (line.units, line.price, line.amount.text))
            assert units * price / per == amount


def _read(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("\N{MINUS SIGN}", "-"))


def test_the_form_of_the_json_document() -> None:
    """A changed name or place is another format: bump it, and docs/invoices.md."""
    values = json.loads(render(american().stored(), DocumentFormat.JSON))
    assert values["format"] == "taximeter.invoice/1"
    assert (values["number"], values["status"]) == ("INV-0001-1", "final")
    assert values["period"] == {
        "start": "2026-11-01T07:00:00Z",
        "end": "2026-12-01T08:00:00Z",
        "time_zone": "America/Los_Angeles",
    }
    assert values["lines"][3] == {
        "line": 4,
        "kind": "usage",
        "period_start": "2026-11-01T07:00:00Z",
        "period_end": "2026-12-01T08:00:00Z",
        "project_id": "assistant",
        "model": "deepseek-v3",
        "operation": "chat",
        "service_class": "standard",
        "price_version": 3,
        "adjustment_id": None,
        "events": 88120,
        "quantity_of": "cache_read_tokens",
        "terms": "",
        "units": "1310220904",
        "unit_price": "0.000000027",
        "price_per_million": "0.027",
        "amount": "35.375964408",
    }
    assert values["taxes"][0] == {"name": "State sales tax", "rate_millionths": 62500, "base": "1813.86", "amount": "113.37"}
    assert values["credits"][0] == {"grant_id": "welcome-2026", "kind": "promotional", "amount": "50.00"}
    assert values["due"] == "693.10"


def test_each_invoice_names_the_one_before_by_the_hash_of_its_bytes() -> None:
    first, second = chained(american(), chinese())
    digest = hashlib.sha256(first).hexdigest()
    assert json.loads(render(second, DocumentFormat.JSON))["previous_sha256"] == digest
    assert digest in _Text(render(second, DocumentFormat.HTML)).text
    assert digest in "".join(_pages(second)).replace("\n", "")


def test_what_the_ledgers_step_draws_becomes_documents_in_a_chain() -> None:
    previous = None
    for stored in drawn_invoices(volume()):
        values = json.loads(render(stored, DocumentFormat.JSON))
        assert values["previous_sha256"] == previous
        previous = values["sha256"]
        content = content_of(stored)
        pdf = "".join("".join(_pages(stored)).split())
        page = _Text(render(stored, DocumentFormat.HTML)).text.replace(" ", "")
        for line in (line for group in (*content.projects, *content.adjustments) for line in group.lines):
            assert line.amount.text in pdf
            assert line.amount.text in page
        assert content.totals[-1].amount.head in pdf
    # November's, of which 20 requests came: 18 on lines, one was refused, one has no price.
    remarks = content_of(drawn_invoices(volume())[0]).remarks
    assert any(text.startswith("1 request of the period had no price yet") for text in remarks)
    assert "1 request delivered nothing and is on no line." in remarks


def test_a_pdf_carries_its_own_proof() -> None:
    stored = american().stored()
    reader = _pdf(stored)
    assert reader.attachments["invoice.binpb"] == [stored]
    assert reader.attachments["invoice.json"] == [render(stored, DocumentFormat.JSON)]
    for number, text in enumerate(_pages(stored), 1):
        assert f"Page {number} of {len(reader.pages)}" in text
        assert hashlib.sha256(stored).hexdigest() in text
    made = render(stored, DocumentFormat.PDF)
    assert b"<pdfaid:part>3</pdfaid:part>" in made
    assert b"<pdfuaid:part>1</pdfuaid:part>" in made


def test_a_long_invoice_has_its_head_on_every_page() -> None:
    pages = _pages(long(40).stored())
    assert len(pages) > 2
    for text in pages[:-1]:
        assert "Charged for" in text


def test_a_draft_says_so_everywhere_and_stands_in_no_chain() -> None:
    sheet = american()
    sheet.number = 0
    stored = sheet.stored()
    assert json.loads(render(stored, DocumentFormat.JSON))["status"] == "draft"
    assert {row["status"] for row in csv.DictReader(io.StringIO(render(stored, DocumentFormat.CSV).decode()))} == {"draft"}
    page = _Text(render(stored, DocumentFormat.HTML))
    assert "DRAFT: not an invoice" in page.text
    for text in _pages(stored):
        assert "DRAFT" in text
    assert "DRAFT" not in "".join(_pages(american().stored()))
    assert content_of(stored).proof[1].value == "a draft stands in no chain"


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "=HYPERLINK(1)",
    "#panic()",
    "{{ 7 * 7 }}",
    "*b* $x$ @y\\",
)


def test_names_are_texts_and_never_code() -> None:
    sheet = Sheet(
        lines=[Priced(name, name, "output_tokens", 1, "1", terms=name) for name in HOSTILE],
        seller=HOSTILE,
        buyer=HOSTILE,
        note="\n".join(HOSTILE),
        taxes=[(HOSTILE[0], 1)],
        tenant_id=HOSTILE[2],
    )
    stored = sheet.stored()
    page = _Text(render(stored, DocumentFormat.HTML))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.suspect == []
    pdf = "".join("".join(_pages(stored)).split())
    for name in HOSTILE:
        assert name in page.text
        assert name.replace(" ", "") in pdf
    row = next(csv.DictReader(io.StringIO(render(stored, DocumentFormat.CSV).decode())))
    assert row["tenant_id"] == "'=HYPERLINK(1)"


def test_what_would_turn_a_text_around_is_shown_and_not_obeyed() -> None:
    name = "invoice\u202e0.00 DSU\x07\n"
    stored = Sheet(lines=[Priced(name, "m", "output_tokens", 1, "1")]).stored()
    assert content_of(stored).projects[0].title == "Project invoice\\u202e0.00 DSU\\u0007\\u000a"
    assert "\u202e" not in render(stored, DocumentFormat.HTML).decode()
    assert json.loads(render(stored, DocumentFormat.JSON))["lines"][0]["project_id"] == name


def test_a_script_without_a_font_still_gives_a_document() -> None:
    stored = Sheet(lines=[Priced("😀 हिन्दी", "m", "output_tokens", 1, "1")]).stored()
    assert render(stored, DocumentFormat.PDF) == render(stored, DocumentFormat.PDF)
    assert len(_pdf(stored).pages) == 1


def test_nothing_used_is_an_invoice_too() -> None:
    stored = Sheet(lines=[]).stored()
    assert "No usage in this period." in _Text(render(stored, DocumentFormat.HTML)).text
    assert "No usage in this period." in _pages(stored)[0]


def test_a_page_needs_nothing_beside_it() -> None:
    page = render(american().stored(), DocumentFormat.HTML).decode()
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page
    assert "<script" not in page


def test_figures_that_contradict_one_another_get_no_document() -> None:
    invoice = american().invoice()
    set_amount(invoice.total, from_amount(invoice.total) + 10_000_000_000)
    for one in DocumentFormat:
        with pytest.raises(
            DocumentError, match=r"invoice INV-0001-1 of tenant 'acme': total: 1943110000000000 pico stands there"
        ):
            render(invoice.SerializeToString(), one)


def test_bytes_that_are_no_invoice_are_refused() -> None:
    with pytest.raises(DocumentError, match="7 bytes that are no invoice"):
        render(b"\xff" * 7, DocumentFormat.JSON)


def test_a_period_is_named_as_its_time_zone_does() -> None:
    facts = {row.label: row.value for row in content_of(american().stored()).facts}
    assert facts["Period"] == "November 2026"
    assert facts["Time zone"] == "America/Los_Angeles (UTC-07:00 then UTC-08:00)"
    assert facts["Period in UTC"] == "2026-11-01 07:00 until 2026-12-01 08:00"
    facts = {row.label: row.value for row in content_of(chinese().stored()).facts}
    assert facts["Period"] == "November 2026"
    assert facts["Time zone"] == "Asia/Shanghai (UTC+08:00)"
    assert facts["Period in UTC"] == "2026-10-31 16:00 until 2026-11-30 16:00"
    assert content_of(chinese().stored()).adjustments[0].title == "October 2026"


def test_a_number_is_the_series_and_the_place_in_it() -> None:
    assert document_number(american().invoice()) == "INV-0001-1"
