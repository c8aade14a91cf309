"""Invoices: every amount that was charged is on exactly one, in a chain without gaps; the figures follow from one another."""

from __future__ import annotations

import hashlib
import random
from fractions import Fraction
from typing import Any
from unittest import mock

import pytest

from billing import invoice_step, invoices, period_lines, replay
from billing.amounts import PICO, from_amount, to_amount
from billing.founding import found_again
from billing.invoice_checks import invoice_problems
from billing.limits import RECORD_BYTES_MAX
from billing.line_parts import PartKey, Sum, from_units
from billing.periods import period_at
from billing.release import line_key
from billing.state import LedgerState, MemorySeenKeys
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import (
    SCHEDULE_MODE_PACKAGE,
    SCHEDULE_MODE_VOLUME,
    Commitment,
    CreditGrant,
    InvoiceFinalization,
    Price,
    PriceBook,
    Schedule,
    TenantUpsert,
    Tier,
)
from billing.v1.invoice_pb2 import (
    CREDIT_KIND_CORRECTION,
    CREDIT_KIND_PROMOTIONAL,
    ROUNDING_RULE_HALF_EVEN,
    ROUNDING_RULE_HALF_UP,
    Invoice,
    TaxRate,
)
from billing.v1.usage_pb2 import OUTCOME_REJECTED, SERVICE_CLASS_STANDARD, SERVICE_CLASS_TEST
from tests.billing.ledgers import KEYS, PRICES, Ledger, batch, tenants_in, usage

ONE, TWO = tenants_in(1)[:2]
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
OCTOBER, NOVEMBER, DECEMBER, JANUARY = 1_759_276_800_000, 1_761_955_200_000, 1_764_547_200_000, 1_767_225_600_000


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.price()
    made.tenant(ONE)
    made.tenant(TWO)
    return made


def use(ledger: Ledger, request_id: str, at_ms: int, tenant_id: str = ONE, log_time_ms: int = 0, **fields: Any) -> None:
    event = usage(request_id, tenant_id, started_ms=at_ms, ended_ms=at_ms, **fields)
    ledger.usage(batch([event]), log_time_ms or at_ms)


def said(tenant_id: str = ONE, start_ms: int = NOVEMBER, **fields: Any) -> InvoiceFinalization:
    values: dict[str, Any] = {"series_prefix": "INV", "rounding_rule": ROUNDING_RULE_HALF_UP, "currency_decimals": 2}
    return InvoiceFinalization(tenant_id=tenant_id, period_start_ms=start_ms, **(values | fields))


def invoice(ledger: Ledger, at_ms: int, tenant_id: str = ONE, start_ms: int = NOVEMBER, **fields: Any) -> Invoice:
    """Draw it; its figures follow from one another, and a replay comes to the same state."""
    applied = ledger.command(log_time_ms=at_ms, invoice_finalization=said(tenant_id, start_ms, **fields)).record.command
    assert not applied.refusal
    drawn = Invoice.FromString(applied.invoice)
    assert invoice_problems(drawn) == []
    return drawn


def refusal(ledger: Ledger, at_ms: int, terms: InvoiceFinalization) -> str:
    """Why it is refused; nothing but the record of it changes."""

    def known() -> tuple[object, ...]:
        state = ledger.state
        accounts = [state.accounts[name].to_account(b"", 0, 0).SerializeToString(deterministic=True) for name in state.accounts]
        return accounts, [line.to_line() for line in state.lines], sorted(state.windows), dict(state.series)

    # What is due to be let go by then goes first.
    ledger.tick(at_ms)
    before = known()
    record = ledger.command(log_time_ms=at_ms, invoice_finalization=terms).record
    assert known() == before
    assert not record.command.invoice
    assert not record.invoiced
    return record.command.refusal


def owed(state: LedgerState, tenant_id: str) -> int:
    """What no invoice has."""
    return sum(line.cost_pico for line in state.lines.of(tenant_id)) + sum(
        window.cost_pico for key, window in state.windows.items() if key.tenant_id == tenant_id
    )


def test_an_invoice_takes_lines_and_open_windows_once(ledger: Ledger) -> None:
    use(ledger, "r1", NOVEMBER + DAY_MS)
    use(ledger, "r2", NOVEMBER + 2 * DAY_MS, model="unpriced")
    use(ledger, "r3", NOVEMBER + 3 * DAY_MS, outcome=OUTCOME_REJECTED)
    use(ledger, "open", DECEMBER - 1)
    use(ledger, "next month", DECEMBER)
    drawn = invoice(ledger, DECEMBER, seller=["Seller Ltd"], buyer=["Buyer"], note="30 days")
    assert (drawn.series, drawn.number, drawn.previous_hash) == ("INV-0001", 1, b"")
    assert (drawn.events, drawn.unrated_events) == (4, 1)
    assert [(line.number, line.part.quantity_of, from_units(line.part.units)) for line in drawn.lines] == [
        (1, "output_tokens", 20),
        (2, "uncached_input_tokens", 200),
    ]
    assert not any(line.adjustment for line in drawn.lines)
    assert from_amount(drawn.net_exact) == 2_800_000
    assert (drawn.period_start_ms, drawn.period_end_ms, drawn.time_zone) == (NOVEMBER, DECEMBER, "UTC")
    assert owed(ledger.state, ONE) == 1_400_000
    assert ledger.replayed().digest() == ledger.state.digest()


def test_what_a_test_key_used_is_metered_and_on_no_invoice(ledger: Ledger) -> None:
    use(ledger, "r1", NOVEMBER + DAY_MS)
    use(ledger, "tried", NOVEMBER + DAY_MS, service_class=SERVICE_CLASS_TEST)
    metered = [window for window in ledger.state.windows.values() if window.key.service_class == SERVICE_CLASS_TEST]
    assert [(window.events, window.cost_pico) for window in metered] == [(1, 0)]
    drawn = invoice(ledger, DECEMBER)
    assert [(line.key.service_class, from_units(line.part.units)) for line in drawn.lines] == [
        (SERVICE_CLASS_STANDARD, 10),
        (SERVICE_CLASS_STANDARD, 100),
    ]
    assert from_amount(drawn.net_exact) == 1_400_000
    assert owed(ledger.state, ONE) == 0


def test_what_test_keys_used_is_on_no_invoice_either_where_names_are_too_many_to_tell_apart(ledger: Ledger) -> None:
    with mock.patch.object(period_lines, "LINES_MAX", 1):
        for number in range(3):
            use(ledger, f"r{number}", NOVEMBER + DAY_MS, project_id=f"p{number}")
            use(ledger, f"tried{number}", NOVEMBER + DAY_MS, project_id=f"p{number}", service_class=SERVICE_CLASS_TEST)
        ledger.tick(DECEMBER)
        lines = {(line.key.project_id, line.key.service_class): line.events for line in ledger.state.lines.of(ONE)}
        assert lines == {("p0", SERVICE_CLASS_STANDARD): 1, ("(other)", 0): 2, ("(other)", SERVICE_CLASS_TEST): 3}
        drawn = invoice(ledger, DECEMBER)
    assert drawn.events == 3
    assert sum(from_units(line.part.units) for line in drawn.lines) == 3 * 110
    assert {line.key.service_class for line in drawn.lines} == {SERVICE_CLASS_STANDARD, 0}
    assert owed(ledger.state, ONE) == 0
    assert ledger.replayed().digest() == ledger.state.digest()


def test_a_draft_shows_the_same_and_changes_nothing(ledger: Ledger) -> None:
    use(ledger, "r1", NOVEMBER + DAY_MS)
    use(ledger, "r2", NOVEMBER + 2 * DAY_MS)
    ledger.command(credit_grant=CreditGrant(tenant_id=ONE, amount=to_amount(1_000_000), currency="USD"))
    windows, lines = dict(ledger.state.windows), [line.to_line() for line in ledger.state.lines]
    spend = ledger.state.accounts[ONE].spend_pico
    draft = invoice(ledger, NOVEMBER + 2 * DAY_MS, draft=True)
    assert (ledger.state.windows, [line.to_line() for line in ledger.state.lines]) == (windows, lines)
    assert (ledger.state.accounts[ONE].spend_pico, ledger.state.series) == (spend, {})
    final = invoice(ledger, DECEMBER)
    assert (draft.number, final.number) == (0, 1)
    for different in ("number", "issued_ms", "position", "lines"):
        draft.ClearField(different)
        final.ClearField(different)
    assert draft == final
    assert ledger.replayed().digest() == ledger.state.digest()


def test_numbers_have_no_gaps_and_each_names_the_one_before(ledger: Ledger) -> None:
    for tenant_id in (ONE, TWO):
        use(ledger, f"{tenant_id}-1", NOVEMBER, tenant_id)
        use(ledger, f"{tenant_id}-2", DECEMBER, tenant_id)
    drawn = [
        invoice(ledger, JANUARY, tenant_id, start_ms, series_prefix=prefix)
        for tenant_id, start_ms, prefix in (
            (ONE, NOVEMBER, "INV"),
            (TWO, NOVEMBER, "EU"),
            (ONE, DECEMBER, "INV"),
            (TWO, DECEMBER, "INV"),
        )
    ]
    assert [(each.series, each.number) for each in drawn] == [("INV-0001", 1), ("EU-0001", 1), ("INV-0001", 2), ("INV-0001", 3)]
    hashes = [hashlib.sha256(each.SerializeToString(deterministic=True)).digest() for each in drawn]
    assert [each.previous_hash for each in drawn] == [b"", b"", hashes[0], hashes[2]]
    # Founded again, the series goes on.
    record, stored = found_again(ledger.state, b"h" * 16, JANUARY, KEYS.seal_key, "test")
    assert len(record.invoice_series) == 2
    state = LedgerState(MemorySeenKeys())
    replay.apply(state, record, stored)
    assert (state.series, state.accounts[ONE].invoiced_through_ms) == (ledger.state.series, JANUARY)


def test_late_usage_is_an_adjustment_on_the_next_invoice(ledger: Ledger) -> None:
    use(ledger, "r1", NOVEMBER + DAY_MS)
    first = invoice(ledger, DECEMBER)
    use(ledger, "late", NOVEMBER + 2 * DAY_MS, log_time_ms=DECEMBER + DAY_MS)
    use(ledger, "r2", DECEMBER + DAY_MS)
    second = invoice(ledger, JANUARY, start_ms=DECEMBER)
    assert [(line.adjustment, line.key.period_start_ms) for line in second.lines] == [
        (False, DECEMBER),
        (False, DECEMBER),
        (True, NOVEMBER),
        (True, NOVEMBER),
    ]
    assert from_amount(second.usage) == from_amount(second.adjustments) == 1_400_000
    spend = ledger.state.accounts[ONE].spend_pico
    assert from_amount(first.net_exact) + from_amount(second.net_exact) == spend
    assert owed(ledger.state, ONE) == 0


def test_usage_that_comes_years_after_its_invoice_stands_on_the_next_one(ledger: Ledger) -> None:
    """Only periods that have no invoice are ever let go."""
    use(ledger, "r1", NOVEMBER + DAY_MS)
    use(ledger, "r1", NOVEMBER + DAY_MS, TWO)
    invoice(ledger, DECEMBER)
    much_later = JANUARY + 450 * DAY_MS
    use(ledger, "late", NOVEMBER + 2 * DAY_MS, log_time_ms=much_later, backfill=True)
    ledger.tick(much_later + DAY_MS)
    ledger.tick(much_later + 40 * DAY_MS)
    assert owed(ledger.state, ONE) == 1_400_000
    assert owed(ledger.state, TWO) == 0, "its November was never invoiced, and is in ClickHouse alone"
    second = invoice(ledger, much_later + 40 * DAY_MS, start_ms=DECEMBER)
    assert from_amount(second.adjustments) == from_amount(second.net_exact) == 1_400_000
    assert owed(ledger.state, ONE) == 0


def test_periods_are_invoiced_when_they_are_over_once_and_in_order(ledger: Ledger) -> None:
    use(ledger, "r1", OCTOBER + 25 * DAY_MS)
    use(ledger, "r2", NOVEMBER + DAY_MS)
    assert "log time is" in refusal(ledger, NOVEMBER + 2 * DAY_MS, said())
    assert f"begins at {OCTOBER} comes first" in refusal(ledger, DECEMBER, said())
    assert f"begins at {NOVEMBER};" in refusal(ledger, DECEMBER, said(start_ms=NOVEMBER + 1))
    invoice(ledger, DECEMBER, start_ms=OCTOBER)
    assert "stands on the next invoice" in refusal(ledger, DECEMBER, said(start_ms=OCTOBER))
    invoice(ledger, DECEMBER)
    assert "lives in partition" in refusal(ledger, DECEMBER, said(tenants_in(2)[0]))
    assert "create the tenant first" in refusal(ledger, DECEMBER, said(tenants_in(1)[2]))
    # A month without usage may be left out.
    invoice(ledger, JANUARY + 40 * DAY_MS, start_ms=JANUARY)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"series_prefix": ""}, "series_prefix"),
        ({"series_prefix": "a/b"}, "series_prefix"),
        ({"rounding_rule": 0}, "rounding_rule"),
        ({"currency_decimals": 13}, "currency_decimals"),
        ({"taxes": [TaxRate(name="", rate_millionths=1)]}, "taxes[1]"),
        ({"taxes": [TaxRate(name="VAT", rate_millionths=1)] * 9}, "taxes"),
        ({"seller": ["x" * 201]}, "seller"),
        ({"note": "x\n" * 41}, "note"),
    ],
)
def test_terms_that_cannot_be_kept_are_refused(ledger: Ledger, fields: dict[str, Any], named: str) -> None:
    use(ledger, "r1", NOVEMBER)
    assert refusal(ledger, DECEMBER, said(**fields)).startswith(f"{named}: ")


@pytest.mark.parametrize(
    ("cost", "decimals", "rule", "net"),
    [
        (Fraction("0.125"), 2, ROUNDING_RULE_HALF_UP, Fraction("0.13")),
        (Fraction("0.125"), 2, ROUNDING_RULE_HALF_EVEN, Fraction("0.12")),
        (Fraction("0.135"), 2, ROUNDING_RULE_HALF_EVEN, Fraction("0.14")),
        (Fraction("2.5"), 0, ROUNDING_RULE_HALF_UP, Fraction(3)),
        (Fraction("2.499999999999"), 0, ROUNDING_RULE_HALF_UP, Fraction(2)),
    ],
)
def test_the_net_is_rounded_once_to_the_smallest_unit(
    ledger: Ledger, cost: Fraction, decimals: int, rule: Any, net: Fraction
) -> None:
    pico = int(cost * PICO)
    ledger.price([Price(model="one", unit_pico={"requests": 1}, uncached_input_pico=1)], version=2, effective_ms=1)
    use(ledger, "r1", NOVEMBER, model="one", uncached_input_tokens=pico // 8, cache_read_tokens=1)
    ledger.price([Price(model="one", uncached_input_pico=1)], version=3, effective_ms=NOVEMBER + 1)
    left = pico - pico // 8
    events = []
    while left > 0:
        at_ms = NOVEMBER + DAY_MS
        tokens = min(left, 2**40)
        events.append(usage(f"e{left}", ONE, model="one", uncached_input_tokens=tokens, started_ms=at_ms, ended_ms=at_ms))
        left -= 2**40
    ledger.usage(batch(events), NOVEMBER + DAY_MS)
    taxes = [TaxRate(name="VAT", rate_millionths=190_000), TaxRate(name="reverse charge")]
    drawn = invoice(ledger, DECEMBER, currency_decimals=decimals, rounding_rule=rule, taxes=taxes)
    assert Fraction(from_amount(drawn.net_exact), PICO) == cost
    assert Fraction(from_amount(drawn.net), PICO) == net
    vat = net * Fraction(19, 100) * 10**decimals
    assert abs(Fraction(from_amount(drawn.taxes[0].amount), PICO) * 10**decimals - vat) <= Fraction(1, 2)
    assert [from_amount(tax.base) for tax in drawn.taxes] == [net * PICO] * 2
    assert from_amount(drawn.taxes[1].amount) == 0


def test_credit_pays_first_and_the_rest_is_due(ledger: Ledger) -> None:
    amounts = {"promo": (CREDIT_KIND_PROMOTIONAL, 2 * PICO), "paid": (0, 5 * PICO)}
    for name, (kind, pico) in amounts.items():
        grant = CreditGrant(tenant_id=ONE, amount=to_amount(pico), currency="USD", grant_id=name, kind=kind)  # type: ignore[arg-type]
        ledger.command(log_time_ms=NOVEMBER, credit_grant=grant)
    use(ledger, "r1", NOVEMBER + DAY_MS, uncached_input_tokens=1_000_000_000, output_tokens=0)
    drawn = invoice(ledger, DECEMBER, taxes=[TaxRate(name="VAT", rate_millionths=100_000)])
    assert from_amount(drawn.net) == 10 * PICO
    assert [(each.grant_id, from_amount(each.amount)) for each in drawn.credits] == [("promo", 2 * PICO), ("paid", 5 * PICO)]
    assert from_amount(drawn.due) == 4 * PICO
    account = ledger.state.accounts[ONE]
    assert account.balance_pico == -3 * PICO
    assert ledger.replayed().digest() == ledger.state.digest()


VOLUME = Price(
    model="volume",
    schedules=[
        Schedule(
            quantity="output_tokens",
            mode=SCHEDULE_MODE_VOLUME,
            tiers=[Tier(up_to_units=100, unit_pico=10_000_000), Tier(unit_pico=4_000_000)],
        )
    ],
)
PACKAGE = Price(
    model="package",
    schedules=[Schedule(quantity="output_tokens", mode=SCHEDULE_MODE_PACKAGE, package_units=1_000, package_pico=5_000_000_000)],
)


def with_terms(commitment_pico: int = 0) -> Ledger:
    ledger = Ledger()
    commitments = [Commitment(tenant_id=ONE, amount=to_amount(commitment_pico))] if commitment_pico else []
    book = PriceBook(version=1, currency="USD", prices=[VOLUME, PACKAGE, *PRICES], commitments=commitments)
    ledger.command(price_book=book)
    ledger.tenant(ONE)
    return ledger


def test_the_close_settles_volume_packages_and_commitment_once() -> None:
    ledger = with_terms(commitment_pico=PICO)
    use(ledger, "r1", NOVEMBER, model="volume", output_tokens=150, uncached_input_tokens=0)
    use(ledger, "r2", NOVEMBER, model="package", output_tokens=1_001, uncached_input_tokens=0)
    charged = ledger.state.accounts[ONE].spend_pico
    assert charged == 150 * 10_000_000 + 1_001 * 5_000_000
    drawn = invoice(ledger, DECEMBER)
    closed = {
        (line.key.model, line.part.quantity_of): from_amount(line.part.amount)
        for line in drawn.lines
        if line.part.terms == invoices.AT_THE_CLOSE
    }
    # 150 at the second tier's price, two whole packages, and a whole dollar in the end.
    at_close = 150 * 4_000_000 + 2 * 5_000_000_000
    assert closed == {
        ("volume", "output_tokens"): -150 * 6_000_000,
        ("package", "output_tokens"): 2 * 5_000_000_000 - 1_001 * 5_000_000,
        ("", "commitment"): PICO - at_close,
    }
    assert from_amount(drawn.net_exact) == PICO == ledger.state.accounts[ONE].spend_pico
    # What comes late is charged as it came.
    use(ledger, "late", NOVEMBER, model="volume", output_tokens=10, uncached_input_tokens=0, log_time_ms=DECEMBER)
    use(ledger, "r3", DECEMBER, model="volume", output_tokens=10, uncached_input_tokens=0)
    after = invoice(ledger, JANUARY, start_ms=DECEMBER)
    assert from_amount(after.adjustments) == 10 * 10_000_000
    assert from_amount(after.usage) == PICO
    assert ledger.state.accounts[ONE].spend_pico == from_amount(after.net_exact) + PICO
    assert ledger.replayed().digest() == ledger.state.digest()


def test_a_period_with_a_commitment_is_not_left_out() -> None:
    ledger = with_terms(commitment_pico=PICO)
    use(ledger, "r1", NOVEMBER)
    invoice(ledger, DECEMBER)
    assert f"begins at {DECEMBER} comes first" in refusal(ledger, JANUARY + 40 * DAY_MS, said(start_ms=JANUARY))
    assert from_amount(invoice(ledger, JANUARY + 40 * DAY_MS, start_ms=DECEMBER).net_exact) == PICO


def test_a_commitment_that_begins_in_a_month_without_usage_is_not_left_out(ledger: Ledger) -> None:
    use(ledger, "r1", OCTOBER)
    invoice(ledger, NOVEMBER, start_ms=OCTOBER)
    promised = [Commitment(tenant_id=ONE, amount=to_amount(PICO))]
    book = PriceBook(version=2, currency="USD", effective_ms=DECEMBER, prices=PRICES, commitments=promised)
    ledger.command(price_book=book)
    assert f"begins at {DECEMBER} comes first" in refusal(ledger, JANUARY + 40 * DAY_MS, said(start_ms=JANUARY))
    invoice(ledger, JANUARY, start_ms=NOVEMBER)
    assert from_amount(invoice(ledger, JANUARY, start_ms=DECEMBER).net_exact) == PICO


def test_a_draft_says_what_the_invoice_will(ledger: Ledger) -> None:
    ledger = with_terms(commitment_pico=PICO)
    ledger.command(credit_grant=CreditGrant(tenant_id=ONE, amount=to_amount(2 * PICO), currency="USD"), log_time_ms=NOVEMBER)
    use(ledger, "r1", NOVEMBER + DAY_MS, model="volume", output_tokens=150, uncached_input_tokens=0)
    ledger.tick(DECEMBER + HOUR_MS)
    before = ledger.state.accounts[ONE].spend_pico
    draft = invoice(ledger, DECEMBER + HOUR_MS, draft=True)
    assert ledger.state.accounts[ONE].spend_pico == before
    final = invoice(ledger, DECEMBER + HOUR_MS)
    assert [from_amount(each.amount) for each in draft.credits] == [PICO]
    for drawn in (draft, final):
        drawn.ClearField("number")
        drawn.ClearField("position")
        for line in drawn.lines:
            line.key.ClearField("opened_sequence")
    assert draft == final


@pytest.mark.parametrize("start_ms", [2**63 - 1, -(2**63), -(10**12), 2 * 10**13])
def test_a_month_that_no_calendar_has_is_refused(ledger: Ledger, start_ms: int) -> None:
    start_ms = max(period_at(Calendar(), start_ms).start_ms, -(2**63))
    assert "period_start_ms" in refusal(ledger, NOVEMBER, said(start_ms=start_ms, draft=True))


def test_the_credit_of_an_invoice_below_zero_takes_no_other_grants_name(ledger: Ledger) -> None:
    """It took its place: what was left of that grant was in the balance, and no grant had it."""
    taken = CreditGrant(tenant_id=ONE, amount=to_amount(2 * PICO), currency="USD", grant_id="INV-0001-1")
    ledger.command(credit_grant=taken, log_time_ms=NOVEMBER)
    use(ledger, "r1", NOVEMBER)
    key = line_key(ledger.state, ledger.state.windows[min(ledger.state.windows)])
    note = invoices.Closing(key, PartKey("credit note", "for delays", 0), Sum(0, -3 * PICO))
    with mock.patch.object(invoice_step, "closing", return_value=[note]):
        invoice(ledger, DECEMBER)
    [held] = ledger.state.credits.all()
    assert [grant.grant_id for grant in held.grants] == ["INV-0001-1", "INV-0001-1+"]
    left = sum(from_amount(g.amount) - from_amount(g.used) - from_amount(g.expired) for g in held.grants)
    assert left == ledger.state.accounts[ONE].balance_pico
    assert ledger.replayed().digest() == ledger.state.digest()


def test_an_invoice_below_zero_becomes_credit() -> None:
    ledger = with_terms()
    use(ledger, "r1", NOVEMBER, model="volume", output_tokens=60, uncached_input_tokens=0)
    use(ledger, "first", OCTOBER + 25 * DAY_MS, model="volume", output_tokens=150, uncached_input_tokens=0)
    # As it would be if a correction had taken back more than the month came to.
    key = line_key(ledger.state, ledger.state.windows[min(ledger.state.windows)])
    note = invoices.Closing(key, PartKey("credit note", "for delays", 0), Sum(0, -3 * PICO))
    balance = ledger.state.accounts[ONE].balance_pico
    with mock.patch.object(invoice_step, "closing", return_value=[note]):
        drawn = invoice(ledger, NOVEMBER + DAY_MS, start_ms=OCTOBER)
    assert from_amount(drawn.net_exact) == 150 * 10_000_000 - 3 * PICO
    assert ledger.state.accounts[ONE].balance_pico == balance + 3 * PICO
    assert ledger.replayed().digest() == ledger.state.digest()
    [held] = ledger.state.credits.all()
    assert [grant.kind for grant in held.grants] == [CREDIT_KIND_CORRECTION]


def test_too_many_open_windows_wait_for_another_record(ledger: Ledger) -> None:
    events = [usage(f"r{n}", ONE, model="smollm2", project_id=f"p{n}", ended_ms=DECEMBER - 1) for n in range(900)]
    ledger.usage(batch(events), DECEMBER)
    assert "900 windows of the period are open still" in refusal(ledger, DECEMBER, said())
    invoice(ledger, DECEMBER, draft=True)
    while ledger.state.windows:
        ledger.tick(DECEMBER + HOUR_MS)
    drawn = invoice(ledger, DECEMBER + HOUR_MS)
    assert drawn.events == 900
    assert len(drawn.lines) == 1_800
    assert max(map(len, ledger.stored)) < RECORD_BYTES_MAX
    assert ledger.replayed().digest() == ledger.state.digest()


def test_an_invoice_that_nobody_could_read_is_summed(ledger: Ledger) -> None:
    for number in range(30):
        use(ledger, f"r{number}", NOVEMBER + number * HOUR_MS, project_id=f"p{number}")
    with mock.patch.object(invoices, "INVOICE_BYTES_MAX", 3_000):
        drawn = invoice(ledger, DECEMBER)
    assert [line.key.project_id for line in drawn.lines] == ["(other)"] * 2
    assert from_amount(drawn.net_exact) == 30 * 1_400_000 == ledger.state.accounts[ONE].spend_pico
    assert not ledger.state.lines.of(ONE)


SHANGHAI = Calendar(time_zone="Asia/Shanghai", from_month=[0], offset_minutes=[480])
# Daylight saving time begins within March 2026.
LOS_ANGELES = Calendar(time_zone="America/Los_Angeles", from_month=[0, 675], offset_minutes=[-480, -420])
MARCH, APRIL = 1_772_323_200_000, 1_775_001_600_000


@pytest.mark.parametrize("seed", range(4))
def test_what_was_charged_is_on_one_invoice_or_still_to_come(seed: int) -> None:
    chance = random.Random(seed)
    ledger = with_terms(commitment_pico=PICO // 1_000)
    yuan = PriceBook(version=1, currency="CNY", prices=[Price(model="*", uncached_input_pico=20_000_000, output_pico=7)])
    ledger.command(price_book=yuan)
    for tenant_id, currency, calendar in ((ONE, "USD", LOS_ANGELES), (TWO, "CNY", SHANGHAI)):
        ledger.command(tenant_upsert=TenantUpsert(tenant_id=tenant_id, currency=currency, calendar=calendar))
    starts = {ONE: [MARCH + 8 * HOUR_MS, APRIL + 7 * HOUR_MS], TWO: [MARCH - 8 * HOUR_MS, APRIL - 8 * HOUR_MS]}
    invoiced = dict.fromkeys(starts, 0)
    now_ms = MARCH + 2 * DAY_MS
    for number in range(110):
        now_ms += chance.choice((HOUR_MS, DAY_MS, 2 * DAY_MS))
        for index in range(chance.randrange(1, 5)):
            at_ms = max(MARCH + DAY_MS, now_ms - chance.choice((0, 0, HOUR_MS, 20 * DAY_MS)))
            tenant_id, model = chance.choice((ONE, TWO)), chance.choice(("volume", "package", "smollm2", "none"))
            use(ledger, f"{number}-{index}", at_ms, tenant_id, now_ms, model=model, output_tokens=chance.randrange(90))
        for tenant_id, due in starts.items():
            if due and now_ms > due[0] + 35 * DAY_MS and chance.random() < 0.5:
                drawn = invoice(ledger, now_ms, tenant_id, due.pop(0))
                assert drawn.currency == ledger.state.accounts[tenant_id].currency
                invoiced[tenant_id] += from_amount(drawn.net_exact)
            assert invoiced[tenant_id] + owed(ledger.state, tenant_id) == ledger.state.accounts[tenant_id].spend_pico
    assert not any(starts.values())
    assert ledger.replayed().digest() == ledger.state.digest()


def test_a_line_that_is_invoiced_twice_would_be_seen() -> None:
    with mock.patch("billing.period_lines.PeriodLines.remove"), pytest.raises(AssertionError):
        test_what_was_charged_is_on_one_invoice_or_still_to_come(0)
