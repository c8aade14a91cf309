"""Corrections from the database to the ledger and back: what a draft says is what the ledger does, and twice is once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from billing.founding import LedgerSettings
from billing.line_parts import PartKey, Sum
from billing.period_lines import LineKey
from billing.periods import Period, month_of, period_at
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import ADJUSTMENT_KIND_CREDIT_NOTE, ADJUSTMENT_KIND_VOID, Price, PriceBook, TenantUpsert
from sinks import queries
from sinks.audit import audit
from sinks.corrections import CorrectionError, Draft, amend, credit_note, rate_unrated, rerate, unrated_periods, void
from sinks.follow import feed
from sinks.price_books import price_books
from sinks.rated_usage import Payer, payers
from sinks.rerating import month_of_payer
from sinks.statement import statement
from tests.billing.ledgers import KEYS, Ledger, batch, usage
from tests.billing.test_rating_property import APRIL, CURRENCIES, MARCH, ZONES, own_month, own_total
from tests.sinks.test_rated_usage import EVENTS, book, stream

if TYPE_CHECKING:
    from billing.v1.usage_pb2 import UsageEvent
    from sinks.engines.chdb import ChdbEngine

LOG_MS = APRIL + 24 * 3_600_000
DAY_MS = 86_400_000


class Installation:
    """A ledger and the database behind it."""

    def __init__(self, engine: ChdbEngine) -> None:
        self.engine = engine
        self.ledger = Ledger(0, LedgerSettings(partitions=1, dedupe_key=b"k" * 32))
        self.events = stream(11)
        for currency in ("CNY", "USD"):
            self.ledger.command(LOG_MS, price_book=book(currency, 1))
        for tenant_id, calendar in ZONES.items():
            upsert = TenantUpsert(tenant_id=tenant_id, currency=CURRENCIES[tenant_id], calendar=calendar)
            self.ledger.command(LOG_MS, tenant_upsert=upsert)
        for begin in range(0, EVENTS, 40):
            self.ledger.usage(batch(self.events[begin : begin + 40]), LOG_MS)
        self.feed()

    def feed(self) -> None:
        feed(self.engine, self.ledger.stored, KEYS.seal_key)

    def apply(self, draft: Draft) -> list[str]:
        """Give it to the ledger; returns what that says, or why it refused."""
        said = []
        for command_id, adjustment in draft.adjustments():
            record = self.ledger.command(
                LOG_MS, command_id=command_id, adjustment=adjustment, issuer="ann", reason="tested"
            ).record
            said.append(record.command.refusal or record.command.outcome)
        self.feed()
        return said

    def spend(self, tenant_id: str) -> int:
        """As account, database, and windows and lines say it."""
        lines = sum(line.cost_pico for line in self.ledger.state.lines.of(tenant_id))
        windows = sum(w.cost_pico for w in self.ledger.state.windows.values() if w.key.tenant_id == tenant_id)
        [account] = queries.balances(self.engine, tenant_id)
        assert lines + windows == self.ledger.state.accounts[tenant_id].spend_pico == account.spend_pico
        return account.spend_pico

    def costs(self, tenant_id: str) -> dict[str, int]:
        """What each event was charged."""
        return {row.request_id: row.cost_pico for row in queries.events(self.engine, tenant_id)}


@pytest.fixture
def made(engine: ChdbEngine) -> Installation:
    return Installation(engine)


def of(made: Installation, tenant_id: str, month: int) -> list[UsageEvent]:
    return [event for event in made.events if event.tenant_id == tenant_id and own_month(event) == month]


def test_voided_events_cost_nothing_stay_and_are_not_voided_again(made: Installation) -> None:
    books = price_books(made.engine)
    for payer in payers(made.engine):
        costs, before = made.costs(payer.tenant_id), made.spend(payer.tenant_id)
        mine = [event for event in made.events if event.tenant_id == payer.tenant_id]
        chosen = [event.request_id for event in mine if event.outcome != 6][:20]
        draft = void(made.engine, payer, books, chosen, 0)
        assert draft.difference_pico == -sum(costs[request_id] for request_id in chosen) < 0
        assert draft.notes == []
        # A dry run: nothing has changed.
        assert made.spend(payer.tenant_id) == before
        [outcome] = made.apply(draft)
        assert "line(s)" in outcome
        assert made.spend(payer.tenant_id) == before + draft.difference_pico
        assert made.costs(payer.tenant_id) == costs
        with pytest.raises(CorrectionError, match=r"was corrected by void-[0-9a-f]{24} before"):
            void(made.engine, payer, books, [mine[-1].request_id, chosen[0]], 0)
        # The ledger knows by itself.
        assert "was applied before" in made.apply(draft)[0]
        found = statement(made.engine, payer.tenant_id, 0, LOG_MS + DAY_MS)
        assert found is not None
        assert found.corrected_pico == draft.difference_pico
        assert found.closing_pico == -made.spend(payer.tenant_id)
        assert [(line.kind, line.issuer, line.reason) for line in found.corrections] == [("void", "ann", "tested")]
    assert audit(made.engine, KEYS.seal_key).findings == []
    made.engine.execute(
        "ALTER TABLE adjustments UPDATE amount = amount - 1 WHERE tenant_id = 'UTC' SETTINGS mutations_sync = 2"
    )
    assert {finding.kind for finding in audit(made.engine, KEYS.seal_key).findings} == {"adjustments_differ"}


def test_what_one_command_does_not_hold_is_not_begun() -> None:
    """The first of several notes all events as corrected; the ledger refuses the next ones, and what they give back is lost."""
    payer, period = Payer("t", "USD", Calendar()), Period(MARCH, APRIL)
    draft = Draft(payer, ADJUSTMENT_KIND_VOID, request_ids=("r1", "r2"))
    keys = [LineKey("t", period, "USD", f"project-{number}", "m", 1, 1, 1) for number in range(401)]
    for key in keys:
        draft.add(key, {PartKey("output_tokens", "", 1): Sum(1, 1)}, -1)
    with pytest.raises(CorrectionError, match=r"2 request IDs: what is corrected stands in 401 lines, .* name fewer at once"):
        draft.adjustments()
    last = draft.lines.pop(keys[-1])
    [(_, said)] = draft.adjustments()
    assert (len(said.lines), list(said.corrected_request_ids)) == (400, ["r1", "r2"])
    # What corrects no events may come in parts.
    note = Draft(payer, ADJUSTMENT_KIND_CREDIT_NOTE, lines={**draft.lines, keys[-1]: last})
    assert [len(said.lines) for _, said in note.adjustments()] == [400, 1]


def test_what_cannot_be_voided_is_named(made: Installation) -> None:
    books = price_books(made.engine)
    [payer] = payers(made.engine, "UTC")
    free = next(event.request_id for event in made.events if event.tenant_id == "UTC" and event.outcome == 6)
    other = next(event.request_id for event in made.events if event.tenant_id != "UTC")
    with pytest.raises(CorrectionError, match=f"{other} is not known, {free} was free"):
        void(made.engine, payer, books, [free, other], 0)
    with pytest.raises(CorrectionError, match="name 1 to 1000, each once"):
        void(made.engine, payer, books, [free, free], 0)
    charged = next(event.request_id for event in made.events if event.tenant_id == "UTC" and event.outcome == 1)
    [note] = void(made.engine, payer, books, [charged], LOG_MS + 1).notes
    assert note.startswith("1 of 1 events are beyond the ledger's memory")


def test_an_amended_event_costs_what_it_should_have(made: Installation) -> None:
    books = price_books(made.engine)
    [payer] = payers(made.engine, "Asia/Shanghai")
    long = next(e for e in made.events if e.tenant_id == payer.tenant_id and e.outcome == 1 and e.model == "long")
    before, cost = made.spend(payer.tenant_id), made.costs(payer.tenant_id)[long.request_id]
    draft = amend(
        made.engine, payer, books, long.request_id, {"output_tokens": 3, "uncached_input_tokens": 90, "requests": 2}, 0
    )
    context = sum((90, long.cache_read_tokens))
    factor = 2 if long.service_class == 3 else 1
    assert draft.difference_pico == (90 * (40 if context > 100 else 10) + 3 * 20) // factor - cost
    made.apply(draft)
    assert made.spend(payer.tenant_id) == before + draft.difference_pico
    with pytest.raises(CorrectionError, match="was corrected by amend-"):
        void(made.engine, payer, books, [long.request_id], 0)
    tiered = next(e for e in made.events if e.tenant_id == payer.tenant_id and e.outcome == 1 and e.model == "cheap-2")
    with pytest.raises(CorrectionError, match="void it, and import it again"):
        amend(made.engine, payer, books, tiered.request_id, {"output_tokens": 3}, 0)


def test_a_credit_note_gives_back(made: Installation) -> None:
    [payer] = payers(made.engine, "UTC")
    before = made.spend("UTC")
    draft = credit_note(made.engine, payer, 5_000, period_at(payer.calendar, LOG_MS), "INV-0000-7")
    assert made.apply(draft) == ["-0.000000005 USD in 1 line(s)"]
    assert made.spend("UTC") == before - 5_000
    # The same again is another one: it was seen that one was applied.
    made.apply(credit_note(made.engine, payer, 5_000, period_at(payer.calendar, LOG_MS), "INV-0000-7"))
    assert made.spend("UTC") == before - 10_000
    rows = made.engine.query("SELECT DISTINCT kind, invoice, issuer, reason FROM adjustments").rows
    assert rows == [("credit_note", "INV-0000-7", "ann", "tested")]


def test_a_month_rated_again_costs_what_the_other_book_says_and_again_nothing(made: Installation) -> None:
    books = price_books(made.engine)
    for tenant_id in ("UTC", "Asia/Shanghai"):
        [payer] = payers(made.engine, tenant_id)
        period = month_of_payer(payer, month_of(MARCH))
        mine = of(made, payer.tenant_id, 3)
        other = book(payer.currency, 2)
        old, new = (
            own_total({payer.currency: offered}, mine, closed=True)[payer.tenant_id]
            for offered in (book(payer.currency, 1), other)
        )
        before = made.spend(payer.tenant_id)
        draft = rerate(made.engine, payer, period, books, other)
        assert draft.difference_pico == new - old != 0
        made.apply(draft)
        assert made.spend(payer.tenant_id) == before + new - old
        assert rerate(made.engine, payer, period, books, other).adjustments() == []
        # Back again, and it is as it was.
        made.apply(rerate(made.engine, payer, period, books, 1))
        assert made.spend(payer.tenant_id) == before
        # One that was voided since is left as it is, and what re-rating changed of it is taken back with the next.
        made.apply(rerate(made.engine, payer, period, books, other))
        gone = next(event.request_id for event in mine if event.outcome == 1 and event.model == "other")
        draft = void(made.engine, payer, books, [gone], 0)
        assert "was rated again by rerate-" in draft.notes[0]
        made.apply(draft)
        made.apply(rerate(made.engine, payer, period, books, other))
        rest = own_total({payer.currency: other}, [event for event in mine if event.request_id != gone], closed=True)
        assert made.spend(payer.tenant_id) == before - old + rest[payer.tenant_id]
    assert audit(made.engine, KEYS.seal_key).findings == []


def test_what_had_no_price_is_rated_when_the_price_comes(engine: ChdbEngine) -> None:
    ledger = Ledger(0, LedgerSettings(partitions=1, dedupe_key=b"k" * 32))
    ledger.command(LOG_MS, price_book=PriceBook(version=1, currency="USD", prices=[Price(model="old", output_pico=1)]))
    ledger.command(LOG_MS, tenant_upsert=TenantUpsert(tenant_id="t", currency="USD"))
    fields = {"started_ms": LOG_MS - 1_000, "ended_ms": LOG_MS - 1_000}
    events = [usage(f"r{n}", "t", model="new" if n < 3 else "old", output_tokens=10 * n + 1, **fields) for n in range(5)]
    ledger.usage(batch(events), LOG_MS)
    second = PriceBook(
        version=2, currency="USD", effective_ms=APRIL, prices=[Price(model="new", output_pico=7, minimum_pico=10)]
    )
    ledger.command(LOG_MS, price_book=second)
    feed(engine, ledger.stored, KEYS.seal_key)
    [payer] = payers(engine)
    [period] = unrated_periods(engine, payer)
    books = price_books(engine)
    draft = rate_unrated(engine, payer, period, books)
    # 1, 11 and 21 tokens at 7; the first lacks 3 of the least price.
    assert draft.difference_pico == 33 * 7 + 3
    [(command_id, said)] = draft.adjustments()
    assert command_id.startswith("rate-unrated-")
    assert [line.key.price_version for line in said.lines] == [2]
    before = ledger.state.accounts["t"].spend_pico
    assert ledger.command(LOG_MS, command_id=command_id, adjustment=said, issuer="a", reason="b").record.command.applied
    assert ledger.state.accounts["t"].spend_pico == before + 33 * 7 + 3
    feed(engine, ledger.stored, KEYS.seal_key)
    assert rate_unrated(engine, payer, period, books).adjustments() == []
    # Unrated usage that is voided is not rated; what was charged for it is taken back.
    [(void_id, void_said)] = void(engine, payer, books, ["r2"], 0).adjustments()
    assert ledger.command(LOG_MS, command_id=void_id, adjustment=void_said, issuer="a", reason="b").record.command.applied
    feed(engine, ledger.stored, KEYS.seal_key)
    assert rate_unrated(engine, payer, period, books).difference_pico == -21 * 7
    assert audit(engine, KEYS.seal_key).findings == []
