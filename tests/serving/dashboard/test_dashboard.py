"""The dashboard in Chromium, on a real API over chDB: its figures are the command line's, it is live, and it is safe."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from billing.amounts import decimal_text, to_amount
from billing.amounts import parse_decimal_to_pico as pico
from billing.v1.command_pb2 import CreditGrant, InvoiceFinalization, TenantUpsert
from billing.v1.invoice_pb2 import ROUNDING_RULE_HALF_UP
from billing.v1.usage_pb2 import OUTCOME_REJECTED
from sinks import queries
from sinks.embedded import LoopbackServer
from sinks.engines.chdb import ChdbEngine
from sinks.migrate import migrate
from taximeter import compose
from tests.billing.ledgers import NOW_MS, Ledger, batch, tenants_in, usage
from tests.services.browser import chromium
from tests.serving.api.worlds import World
from tests.serving.dashboard.served import Served
from tests.sinks.emptying import empty_tables
from tests.taximeter.support import said

A, B = tenants_in(1, 2)
HOSTILE = "<img src=x onerror=\"window.hit='yes'\"><script>window.hit='yes'</script>"
WAIT_MS = 120_000
TOKEN = "t" * 32
pytestmark = pytest.mark.timeout(600)
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def engine(chdb_folder: Path) -> Iterator[ChdbEngine]:
    made = ChdbEngine(chdb_folder, "dashboard", threads=1)
    migrate(made)
    yield made
    made.close()


@pytest.fixture
def world(engine: ChdbEngine) -> Iterator[Callable[[Ledger], World]]:
    """A function that makes a world of a ledger in a database that had nothing."""
    made: list[World] = []

    def make(ledger: Ledger) -> World:
        empty_tables(engine)
        made.append(World(engine, ledger))
        return made[-1]

    yield make
    for each in made:
        each.calls.close()


class Opened:
    """A page that is signed in, what it asked for, and what it complained of."""

    def __init__(self, browser: Browser, url: str, secret: str, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.goto(f"{url}/dashboard/")
        self.sign_in(secret)

    def sign_in(self, secret: str) -> None:
        self.page.get_by_label("API key").fill(secret)
        self.page.keyboard.press("Enter")

    def close(self) -> None:
        self.context.close()

    def tile(self, name: str) -> str:
        """The exact figure of a tile."""
        value = self.page.locator(".tile", has=self.page.get_by_text(name, exact=True)).locator("data").first
        return value.get_attribute("value") or ""

    def table(self, name: str) -> dict[str, list[str]]:
        """The exact figures of a table by the first cell of each row."""
        table = self.page.get_by_role("table", name=name, exact=True)
        # What is further down is filled when the first figures have been painted.
        expect(table).to_be_visible()
        cells: list[list[str]] = table.locator("tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.children].map(cell => cell.firstElementChild.value ?? cell.innerText))"
        )
        return {name: figures for name, *figures in cells}


def open_page(browser: Browser, world: World, *key: str, **options: Any) -> Iterator[Opened]:
    with closing(Served(world.app)) as served, closing(Opened(browser, served.url, world.key(*key), **options)) as opened:
        yield opened


def busy_ledger() -> Ledger:
    """Two tenants that use things now; one has a name that would like to be markup."""
    ledger = Ledger()
    ledger.price()
    ledger.command(tenant_upsert=TenantUpsert(tenant_id=A, display_name=HOSTILE, currency="USD"))
    ledger.tenant(B)
    for tenant_id in (A, B):
        grant = CreditGrant(tenant_id=tenant_id, amount=to_amount(5 * 10**12), currency="USD", grant_id="first")
        ledger.command(credit_grant=grant)
    events = [usage(f"a{n}", A, user_id=HOSTILE, project_id=HOSTILE, uncached_input_tokens=10**6 + n) for n in range(5)]
    events += [usage("no", A, outcome=OUTCOME_REJECTED), usage("b", B), usage("odd", B, model=HOSTILE)]
    ledger.usage(batch(events, "p", 1, len(events)))
    return ledger


def invoice(ledger: Ledger, tenant_id: str) -> None:
    """That of November, when it is over."""
    said = InvoiceFinalization(
        tenant_id=tenant_id,
        period_start_ms=1_761_955_200_000,
        series_prefix="INV",
        rounding_rule=ROUNDING_RULE_HALF_UP,
        currency_decimals=2,
    )
    assert ledger.command(NOW_MS + 10 * 86_400_000, invoice_finalization=said).record.command.applied


def test_the_figures_are_the_command_lines(browser: Browser, world: Callable[[Ledger], World], engine: ChdbEngine) -> None:
    made = world(busy_ledger())
    server = LoopbackServer(compose.as_json_reader(engine), TOKEN).start()
    with closing(server):
        port = server.url.rpartition(":")[2]
        asks = ("--json", "--set", f"clickhouse.loopback_port={port}", "--set", f"clickhouse.loopback_token={TOKEN}")

        def usage_by(*arguments: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = json.loads(said("usage", *arguments, *asks))
            return found

        balances = {row["tenant_id"]: row for row in json.loads(said("balance", *asks))}
        for opened in open_page(browser, made, "", "read"):
            expect(opened.page.get_by_role("heading", name="All tenants")).to_be_visible()
            [total] = usage_by("--by", "")
            assert pico(opened.tile("Spend today")) == pico(opened.tile("Spend, last 60 minutes")) == pico(total["cost"])
            assert opened.tile("Requests today") == str(total["requests"])
            assert opened.tile("Tokens today") == str(total["uncached_input_tokens"] + total["output_tokens"])
            for name, by in (("Top consumers", "tenant"), ("Models", "model")):
                shown = opened.table(name)
                listed = {row[by]: row for row in usage_by("--by", by)}
                assert {key: (row[0], pico(row[-1])) for key, row in shown.items()} == {
                    key: (str(row["requests"]), pico(row["cost"])) for key, row in listed.items()
                }
            assert opened.complaints == []
        for opened in open_page(browser, made, A, "read"):
            expect(opened.page.get_by_role("table", name="Users", exact=True)).to_be_visible()
            assert pico(opened.tile("Balance")) == pico(balances[A]["balance"])
            [mine] = usage_by(A, "--by", "")
            assert pico(opened.tile("Spend this period")) == pico(mine["cost"])
            for name, by in (("Projects", "project"), ("Models", "model"), ("Users", "user")):
                shown = opened.table(name)
                listed = {row[by] or "(none)": row for row in usage_by(A, "--by", by)}
                assert {key: pico(row[-1]) for key, row in shown.items()} == {
                    key: pico(row["cost"]) for key, row in listed.items()
                }
            # Another tenant's name is nowhere, and nothing says how much there is of it.
            assert B not in opened.page.content()
            assert opened.complaints == []


def test_names_are_text_and_the_key_is_in_no_address(browser: Browser, world: Callable[[Ledger], World]) -> None:
    made = world(busy_ledger())
    for key in (("", "read"), (A, "read")):
        for opened in open_page(browser, made, *key):
            page = opened.page
            expect(page.get_by_text(HOSTILE, exact=True).first).to_be_visible()
            assert page.evaluate("window.hit ?? null") is None
            assert page.locator("main img, main script").count() == 0
            secret = page.evaluate("sessionStorage.getItem('taximeter.key')")
            assert secret.startswith("tm-")
            hosts = {httpx.URL(url).host for url in opened.asked}
            assert hosts == {"127.0.0.1"}
            assert not [url for url in [*opened.asked, page.url] if secret in url]
            assert page.evaluate("document.cookie + JSON.stringify(localStorage)") == "{}"
            # What somebody smuggles in as markup or script does not run, and nothing goes elsewhere.
            assert opened.complaints == []
            markup = "document.body.innerHTML = '<img src=x onerror=\"window.hit=1\">'"
            page.evaluate(f"try {{ {markup} }} catch (error) {{ window.told = 1 }}")
            assert page.evaluate("[window.told ?? null, window.hit ?? null]") == [1, None]
            assert page.evaluate("fetch('http://localhost:9/').then(() => 'went', () => 'stayed')") == "stayed"


def test_it_is_live_without_reload_and_ends_with_its_key(browser: Browser, world: Callable[[Ledger], World]) -> None:
    made = world(busy_ledger())
    for opened in open_page(browser, made, A, "read"):
        page = opened.page
        expect(page.locator("#status")).to_contain_text("Live")
        page.evaluate("window.same = 'page'")
        row = page.get_by_role("table", name="Models", exact=True).locator("tbody tr").first
        row.evaluate("row => row.dataset.mine = 'kept'")
        before = opened.tile("Balance")
        for number in range(2):
            made.ledger.usage(batch([usage(f"new{number}", A, uncached_input_tokens=50_000_000)]), NOW_MS + number)
            made.publish()
            [account] = queries.balances(made.engine, A)
            now = decimal_text(account.balance_pico)
            assert now != before
            expect(page.locator(f'.tile data[value="{now}"]')).to_be_visible()
            before = now
        assert page.evaluate("window.same") == "page"
        # What was there is changed in place: a focus or a selection in it stays.
        assert row.get_attribute("data-mine") == "kept"
        # Its key opens nothing any more.
        made.revoke(page.evaluate("sessionStorage.getItem('taximeter.key')"))
        expect(page.get_by_role("alert")).to_contain_text("revoked")
        assert page.evaluate("sessionStorage.length") <= 1
        # An operator's key in the same tab: another view.
        opened.sign_in(made.key("", "read"))
        expect(page.get_by_role("heading", name="All tenants")).to_be_visible()


def test_a_lost_connection_is_said_and_comes_back(browser: Browser, world: Callable[[Ledger], World]) -> None:
    made = world(busy_ledger())
    for opened in open_page(browser, made, "", "read"):
        page, status = opened.page, opened.page.locator("#status")
        expect(status).to_contain_text("Live")
        opened.context.set_offline(True)
        page.evaluate("dispatchEvent(new Event('hashchange'))")
        expect(status).to_contain_text("Not up to date")
        opened.context.set_offline(False)
        expect(status).to_contain_text("Live")
        expect(page.get_by_role("heading", name="All tenants")).to_be_visible()


def test_it_can_be_used_by_keyboard(browser: Browser, world: Callable[[Ledger], World]) -> None:
    made = world(busy_ledger())
    for opened in open_page(browser, made, "", "read"):
        page = opened.page
        expect(page.get_by_role("heading", name="All tenants")).to_be_visible()
        page.reload()
        expect(page.get_by_role("heading", name="Alerts", exact=True)).to_be_visible()
        page.keyboard.press("Tab")
        order = []
        for _ in range(40):
            focused = page.locator(":focus")
            order.append(focused.evaluate("node => node.textContent.trim().slice(0, 20) || node.value"))
            shown = focused.evaluate(
                "node => { const style = getComputedStyle(node.matches('input') ? node.nextElementSibling : node);"
                " return style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2; }"
            )
            assert shown, f"{order[-1]} shows no focus"
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement === document.body"):
                break
        assert order[0] == "Skip to content"
        for name in ("Taximeter", "Overview", "Tenants", "Theme: system", "Sign out", "spend", "As a table"):
            assert name in order
        assert order.index("Tenants") < order.index("spend") < order.index("As a table")
        page.locator("#skip").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        # Arrows choose what is drawn; the drawing says it in words and as a table.
        page.locator("input[name=metric]").first.focus()
        page.keyboard.press("ArrowRight")
        drawing = page.get_by_role("img", name=re.compile(r"^Tokens by day \(UTC\): highest 5\.\d M"))
        expect(drawing).to_be_visible()
        page.locator("summary").first.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("table", name="By day", exact=True)).to_be_visible()
        # To one tenant and back.
        page.get_by_role("table", name="Top consumers", exact=True).get_by_role("link", name=A, exact=True).focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("table", name="Projects", exact=True)).to_be_visible()
        page.go_back()
        expect(page.get_by_role("heading", name="All tenants")).to_be_visible()


def test_an_invoice_is_saved_as_pdf(browser: Browser, world: Callable[[Ledger], World]) -> None:
    ledger = busy_ledger()
    invoice(ledger, A)
    made = world(ledger)
    for opened in open_page(browser, made, A, "read"):
        with opened.page.expect_download() as begun:
            opened.page.get_by_role("button", name="INV-0001-1").click()
        assert begun.value.suggested_filename == "INV-0001-1.pdf"
        assert Path(begun.value.path()).read_bytes().startswith(b"%PDF-")


_CONTRAST = Path(__file__).with_name("contrast.js").read_text()


def test_it_fits_a_phone_in_light_and_dark(browser: Browser, world: Callable[[Ledger], World]) -> None:
    made = world(busy_ledger())
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
    for key, heading in ((("", "read"), "All tenants"), ((A, "read"), HOSTILE)):
        for opened in open_page(browser, made, *key, **phone, color_scheme="light"):
            page = opened.page
            expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
            expect(page.get_by_role("heading", name="Alerts", exact=True)).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            grounds = []
            for _ in range(3):
                ground, faint = page.evaluate(_CONTRAST)
                assert faint == []
                grounds.append(ground)
                page.locator("#theme").press("Enter")
            # The system's, which is light; light; dark; and, after another press, the system's again.
            assert grounds[0] == grounds[1] != grounds[2]
            page.emulate_media(color_scheme="dark")
            assert page.evaluate(_CONTRAST) == [grounds[2], []]


def test_no_tenant_and_a_thousand(browser: Browser, world: Callable[[Ledger], World], engine: ChdbEngine) -> None:
    made = world(Ledger())
    for opened in open_page(browser, made, "", "read"):
        page = opened.page
        expect(page.get_by_text("No tenant has used anything yet.")).to_be_visible()
        assert (opened.tile("Tenants"), opened.tile("Requests today")) == ("0", "0")
        page.get_by_role("link", name="Tenants").click()
        expect(page.get_by_text("There is no tenant yet")).to_be_visible()
        assert opened.complaints == []
    engine.execute(
        "INSERT INTO accounts (tenant_id, display_name, status, currency, credit, version) SELECT "
        "concat('tenant-', leftPad(toString(number), 4, '0')), concat('Customer ', toString(number)), 'active', 'USD', "
        "CAST(number AS Decimal(38, 12)), 1 FROM numbers(1234)"
    )
    for opened in open_page(browser, made, "", "read"):
        page = opened.page
        expect(page.locator('.tile data[value="1234"]')).to_be_visible()
        page.get_by_role("link", name="Tenants").click()
        expect(page.get_by_text("1,234 of 1,234 tenants")).to_be_visible()
        assert list(opened.table("Tenants"))[::49] == ["tenant-0000", "tenant-0049"]
        page.get_by_role("button", name="Next").click()
        expect(page.get_by_text("Page 2 of 25")).to_be_visible()
        assert next(iter(opened.table("Tenants"))) == "tenant-0050"
        page.get_by_label("Search by ID or name").fill("customer 123")
        expect(page.get_by_text("5 of 1,234 tenants")).to_be_visible()
        assert list(opened.table("Tenants")) == ["tenant-0123", *(f"tenant-123{number}" for number in range(4))]


def test_a_key_that_opens_nothing_is_told_so(browser: Browser, world: Callable[[Ledger], World]) -> None:
    made = world(Ledger())
    for opened in open_page(browser, made, B, "meter"):
        expect(opened.page.get_by_role("alert")).to_contain_text("read")
        opened.sign_in("nobody-knows-this")
        expect(opened.page.get_by_role("alert")).not_to_be_empty()
        opened.sign_in("käse")
        expect(opened.page.get_by_role("alert")).to_contain_text("no API key")


def test_the_page_says_what_it_may_do(world: Callable[[Ledger], World]) -> None:
    with closing(Served(world(Ledger()).app)) as served, httpx.Client(base_url=served.url) as client:
        assert client.get("/").headers["location"] == "/dashboard/"
        page = client.get("/dashboard/")
        policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
        # Its own scripts and its own style, each by its hash, and nothing else.
        for kind, tag, count in (("script-src", "script", 2), ("style-src", "style", 1)):
            texts = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page.text, re.DOTALL)
            hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
            assert policy[kind].split() == [f"'sha256-{digest}'" for digest in hashes]
            assert len(texts) == count
        assert (policy["default-src"], policy["connect-src"], policy["trusted-types"]) == ("'none'", "'self'", "'none'")
        for path in ("/dashboard/", "/dashboard/icon.svg"):
            file = client.get(path)
            assert file.status_code == 200, path
            assert file.headers["content-security-policy"] == page.headers["content-security-policy"]
            assert file.headers["x-content-type-options"] == "nosniff"
            assert client.get(path, headers={"if-none-match": file.headers["etag"]}).status_code == 304
        for name in ("app.js", "index.html", "nothing.js", "..%2f__init__.py", "%2e%2e/__init__.py", "icon.svg/x"):
            assert client.get(f"/dashboard/{name}").status_code == 404, name


def test_it_comes_compressed(world: Callable[[Ledger], World]) -> None:
    with closing(Served(world(Ledger()).app)) as served, httpx.Client(base_url=f"{served.url}/dashboard/") as client:
        for name in ("", "icon.svg"):
            plain = client.get(name, headers={"accept-encoding": "gzip;q=0, identity"})
            packed = client.get(name, headers={"accept-encoding": "br, gzip"})
            assert (plain.headers.get("content-encoding"), packed.headers["content-encoding"]) == (None, "gzip")
            assert plain.content == packed.content
            assert plain.headers["vary"] == packed.headers["vary"] == "accept-encoding"
            assert plain.headers["etag"] != packed.headers["etag"]


def test_the_first_view_takes_the_page_and_one_question(browser: Browser, world: Callable[[Ledger], World]) -> None:
    """Whatever else was asked for before the first figure would cost a round trip, or the time of who answers."""
    made = world(busy_ledger())
    for opened in open_page(browser, made, "", "read"):
        page = opened.page
        expect(page.locator(".tile data").first).to_be_visible()
        opened.asked.clear()
        page.reload()
        expect(page.locator(".tile data").first).to_be_visible()
        paths = [httpx.URL(url).path for url in opened.asked]
        assert [path for path in paths if path != "/dashboard/icon.svg"] == ["/dashboard/", "/v1/overview/watch"]
