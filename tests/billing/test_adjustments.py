"""Adjustments: new entries that say who and why, applied whole or refused; the original stays, no event is corrected twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from billing.amounts import PICO, from_amount, to_amount
from billing.invoice_checks import invoice_problems
from billing.limits import ADJUSTMENT_EVENTS_MAX, ADJUSTMENT_LINES_MAX, BATCH_BYTES_MAX, RECORD_BYTES_MAX
from billing.line_parts import PartKey, Sum, to_line_parts
from billing.periods import month_of, month_start_ms, period_at
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import (
    ADJUSTMENT_KIND_AMEND,
    ADJUSTMENT_KIND_CREDIT_NOTE,
    ADJUSTMENT_KIND_RERATE,
    ADJUSTMENT_KIND_VOID,
    Adjustment,
    CreditGrant,
    InvoiceFinalization,
    TenantUpsert,
)
from billing.v1.invoice_pb2 import CREDIT_KIND_PROMOTIONAL, ROUNDING_RULE_HALF_UP, Invoice, PeriodLine, PeriodLineKey
from sinks.recompute import Recomputed
from stream_processors.local_store import Acknowledged, LocalStore
from tests.billing.agreement import agreed
from tests.billing.ledgers import NOW_MS, Ledger, batch, tenants_in, usage

if TYPE_CHECKING:
    from pathlib import Path

    from billing.step import StepResult
    from billing.v1.ledger_pb2 import CommandApplied

ONE, TWO = tenants_in(1, 2)
DAY_MS = 86_400_000
PERIOD = period_at(Calendar(), NOW_MS)
# What `usage` uses: 100 tokens in at 10,000 pico, 10 out at 40,000.
COST = 1_400_000
FAR, LONG_AGO = period_at(Calendar(), NOW_MS + 40 * DAY_MS), period_at(Calendar(), -(10**15))
HUGE = {PartKey("output_tokens", "", 0): Sum(-1, -(10**30)), PartKey("uncached_input_tokens", "", 0): Sum(-1, -(10**30))}
WHO: dict[str, Any] = {"issuer": "ann@example.com", "reason": "metered twice"}


def line(adjustment_id: str, parts: dict[PartKey, Sum], tenant_id: str = ONE, **fields: Any) -> PeriodLine:
    values: dict[str, Any] = {
        "tenant_id": tenant_id,
        "period_start_ms": PERIOD.start_ms,
        "period_end_ms": PERIOD.end_ms,
        "currency": "USD",
        "project_id": "default",
        "model": "smollm2",
        "operation": 1,
        "service_class": 1,
        "price_version": 1,
        "adjustment_id": adjustment_id,
    }
    cost = to_amount(sum(part.amount_pico for part in parts.values()))
    return PeriodLine(key=PeriodLineKey(**(values | fields)), parts=to_line_parts(parts), cost=cost)


BACK = {
    PartKey("uncached_input_tokens", "", 10_000): Sum(-100, -1_000_000),
    PartKey("output_tokens", "", 40_000): Sum(-10, -400_000),
}


def void(request_id: str, adjustment_id: str = "void-1", **fields: Any) -> Adjustment:
    values: dict[str, Any] = {
        "tenant_id": ONE,
        "kind": ADJUSTMENT_KIND_VOID,
        "currency": "USD",
        "lines": [line(adjustment_id, BACK)],
        "corrected_request_ids": [request_id],
    }
    return Adjustment(**(values | fields))


def made() -> Ledger:
    ledger = Ledger()
    ledger.price()
    for tenant_id in (ONE, TWO):
        ledger.tenant(tenant_id)
        ledger.command(credit_grant=CreditGrant(tenant_id=tenant_id, amount=to_amount(10 * PICO), currency="USD"))
    ledger.usage(batch([usage("r1", ONE), usage("r2", ONE), usage("r3", TWO)]))
    return ledger


def adjusted(ledger: Ledger, said: Adjustment, command_id: str = "void-1", log_time_ms: int = NOW_MS) -> StepResult:
    return ledger.command(log_time_ms, command_id=command_id, adjustment=said, **WHO)


def applied(result: StepResult) -> CommandApplied:
    return result.record.command


def spend(ledger: Ledger, tenant_id: str = ONE) -> int:
    """By account; and by open windows and lines, which must say the same."""
    windows = sum(w.cost_pico for w in ledger.state.windows.values() if w.key.tenant_id == tenant_id)
    lines = sum(found.cost_pico for found in ledger.state.lines.of(tenant_id))
    assert windows + lines == ledger.state.accounts[tenant_id].spend_pico
    return ledger.state.accounts[tenant_id].spend_pico


def test_a_void_gives_back_what_was_charged_and_the_original_stays() -> None:
    ledger = made()
    windows = {key: window.cost_pico for key, window in ledger.state.windows.items()}
    result = adjusted(ledger, void("r1"))
    assert applied(result).applied, applied(result).refusal
    assert applied(result).outcome == "-0.0000014 USD in 1 line(s)"
    assert spend(ledger) == COST
    assert {key: window.cost_pico for key, window in ledger.state.windows.items()} == windows
    [stated] = result.record.lines
    assert (stated.key.adjustment_id, from_amount(stated.cost)) == ("void-1", -COST)
    assert from_amount(result.record.accounts[0].spend) == COST
    assert [entry.adjustment_id for entry in result.record.corrected] == ["void-1"]
    # The same event again comes as a duplicate: nothing that was voided is charged anew.
    ledger.usage(batch([usage("r1", ONE)]))
    assert spend(ledger) == COST
    assert ledger.replayed().digest() == ledger.state.digest()


def test_a_second_void_of_an_event_is_refused_and_nothing_of_it_is_done() -> None:
    ledger = made()
    adjusted(ledger, void("r1"))
    digest = {**ledger.state.corrected}
    for kind in (ADJUSTMENT_KIND_VOID, ADJUSTMENT_KIND_AMEND):
        again = void("r2", "void-2", kind=kind, lines=[line("void-2", BACK)], corrected_request_ids=["r2", "r1"])
        refusal = applied(adjusted(ledger, again, "void-2")).refusal
        assert "r1 was corrected by void-1 before; an event is corrected once" in refusal
        assert spend(ledger) == COST
        assert ledger.state.corrected == digest
    # The same command again, as Kafka may bring it.
    assert "was applied before" in applied(adjusted(ledger, void("r1"))).refusal
    assert applied(adjusted(ledger, void("r2", "void-2"), "void-2")).applied
    assert spend(ledger) == 0


def test_an_amendment_charges_what_should_have_been() -> None:
    ledger = made()
    parts = BACK | {PartKey("output_tokens", "", 40_000): Sum(90, 3_600_000)}
    said = void("r1", "amend-1", kind=ADJUSTMENT_KIND_AMEND, lines=[line("amend-1", parts)])
    assert applied(adjusted(ledger, said, "amend-1")).applied
    assert spend(ledger) == 2 * COST - 1_000_000 + 3_600_000


def test_it_is_remembered_for_400_days_on_every_disk(tmp_path: Path) -> None:
    ledger = made()
    adjusted(ledger, void("r1"))
    store = LocalStore(tmp_path, ledger.state.partition)
    records = zip(ledger.records(), ledger.stored, strict=True)
    store.apply([Acknowledged(record, stored, offset) for offset, (record, stored) in enumerate(records)])
    loaded = store.load()
    assert loaded is not None
    assert loaded.digest(with_memory=False) == ledger.state.digest(with_memory=False)
    assert list(loaded.corrected.values()) == [("void-1", NOW_MS)]
    ledger.tick(NOW_MS + 399 * DAY_MS)
    again = void("r1", "void-2", lines=[line("void-2", BACK)])
    assert "before; an event is corrected once" in applied(adjusted(ledger, again, "void-2", NOW_MS + 399 * DAY_MS)).refusal
    ledger.tick(NOW_MS + 402 * DAY_MS)
    assert ledger.state.corrected == {}
    store.apply([Acknowledged(r, s, 99) for r, s in list(zip(ledger.records(), ledger.stored, strict=True))[-3:]])
    forgotten = store.load()
    assert forgotten is not None
    assert forgotten.corrected == {}
    store.close()
    # What the ledger does not know any more, the database vouches for, and the outcome says so.
    result = adjusted(ledger, again, "void-2", NOW_MS + 402 * DAY_MS)
    assert "1 of 1 event(s) are beyond the ledger's memory" in applied(result).outcome
    # The audit remembers as long as the ledger does, and no longer.
    recomputed = Recomputed(ledger.state.partition)
    for record in ledger.records():
        recomputed.take(record)
    assert recomputed.findings == []


def test_what_was_corrected_after_an_invoice_stands_on_the_next() -> None:
    ledger = made()
    after_ms = PERIOD.end_ms + DAY_MS
    terms: dict[str, Any] = {"series_prefix": "INV", "rounding_rule": ROUNDING_RULE_HALF_UP, "currency_decimals": 12}
    first = InvoiceFinalization(tenant_id=ONE, period_start_ms=PERIOD.start_ms, **terms)
    drawn = Invoice.FromString(applied(ledger.command(after_ms, invoice_finalization=first)).invoice)
    assert from_amount(drawn.net_exact) == 2 * COST
    assert applied(adjusted(ledger, void("r1"), log_time_ms=after_ms)).applied
    later = month_start_ms(month_of(PERIOD.end_ms) + 1) + DAY_MS
    second = InvoiceFinalization(tenant_id=ONE, period_start_ms=PERIOD.end_ms, **terms)
    result = applied(ledger.command(later, invoice_finalization=second))
    drawn = Invoice.FromString(result.invoice)
    assert (from_amount(drawn.net_exact), from_amount(drawn.adjustments), from_amount(drawn.usage)) == (-COST, -COST, 0)
    assert {(each.key.adjustment_id, each.key.period_start_ms, each.adjustment) for each in drawn.lines} == {
        ("void-1", PERIOD.start_ms, True)
    }
    for each in drawn.lines:
        assert each.part.unit_pico
    assert ledger.state.lines.of(ONE) == []
    # Given back as credit: the balance is what it was.
    account = ledger.state.accounts[ONE]
    assert account.credit_pico - account.spend_pico == 10 * PICO - COST
    assert ledger.replayed().digest() == ledger.state.digest()


def test_the_audit_adds_it_up_and_names_one_that_was_changed() -> None:
    ledger = made()
    changed = adjusted(ledger, void("r1")).record
    for wrong in (False, True):
        recomputed = Recomputed(ledger.state.partition)
        for record in ledger.records()[:-1]:
            recomputed.take(record)
        if wrong:
            changed.accounts[0].spend.low += 1
        recomputed.take(changed)
        assert [finding.kind for finding in recomputed.findings] == (["account_differs"] if wrong else [])
        assert recomputed.adjusted_by_tenant[ONE] == -COST


def test_what_a_void_gives_back_returns_to_the_grant_that_paid(tmp_path: Path) -> None:
    """And where that has expired meanwhile, it expires too: the balance does not rise by credit that is no more."""
    ledger = made()
    [paid] = adjusted(ledger, void("r1")).record.credits[0].grants
    assert from_amount(paid.used) == COST
    trial = CreditGrant(tenant_id=ONE, amount=to_amount(COST), currency="USD", kind=CREDIT_KIND_PROMOTIONAL)
    trial.expires_ms = NOW_MS + 1
    ledger.command(credit_grant=trial)
    ledger.usage(batch([usage("r4", ONE)]))
    ledger.tick(NOW_MS + 1)
    balance_pico = ledger.state.accounts[ONE].balance_pico
    [state] = adjusted(ledger, void("r4", "void-2"), "void-2", NOW_MS + 2).record.credits
    [gone] = state.grants
    assert (from_amount(gone.used), from_amount(gone.expired)) == (0, COST)
    assert ledger.state.accounts[ONE].balance_pico == balance_pico
    agreed(ledger, tmp_path)


def note(amount_pico: int, **fields: Any) -> Adjustment:
    parts = {PartKey("credit note", "", 0): Sum(1, amount_pico)}
    empty: dict[str, Any] = {"project_id": "", "model": "", "operation": 0, "service_class": 0, "price_version": 0}
    return Adjustment(
        tenant_id=ONE, kind=ADJUSTMENT_KIND_CREDIT_NOTE, currency="USD", lines=[line("void-1", parts, **(empty | fields))]
    )


def test_a_credit_note_has_an_amount_alone() -> None:
    ledger = made()
    assert applied(adjusted(ledger, note(-5))).applied
    assert spend(ledger) == 2 * COST - 5


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (void("r1", kind=0), "kind: 0 is not known here"),
        (void("r1", currency="EUR"), "currency: 'EUR'; tenant"),
        (void("r1", tenant_id="nobody"), "tenant_id: nobody"),
        (void("r1", lines=[]), "lines: 0 entries"),
        (void("r1", lines=[line("void-1", BACK)] * 2), "lines: a line stands twice"),
        (void("r1", lines=[line("other", BACK)]), "lines[1].key: names another tenant, currency or adjustment"),
        (void("r1", lines=[line("void-1", BACK, tenant_id=TWO)]), "lines[1].key: names another tenant"),
        (void("r1", lines=[line("void-1", BACK, opened_sequence=1)]), "lines[1]: an adjustment adds amounts alone"),
        (void("r1", lines=[line("void-1", BACK, period_start_ms=NOW_MS)]), "is no period of the tenant; the one around it is"),
        (void("r1", lines=[line("void-1", BACK, price_version=2)]), "price_version: 2 is not known here"),
        (void("r1", lines=[line("void-1", {})]), "lines[1].parts: 0 entries"),
        (
            void("r1", lines=[line("void-1", {PartKey("output_tokens", "", 3): Sum(-2, -7)})]),
            "parts[1].amount: -7 pico is not -2 times 3",
        ),
        (
            void("r1", lines=[PeriodLine(key=line("void-1", BACK).key, parts=to_line_parts(BACK), cost=to_amount(-1))]),
            "lines[1].cost: -1 pico, and the parts sum up to -1400000",
        ),
        (void("r1", lines=[line("void-1", {PartKey("output_tokens", "", 1): Sum(1, 1)})]), "what gives back is not above zero"),
        (void("r1", corrected_request_ids=[]), "corrected_request_ids: 0 entries"),
        (void("r1", corrected_request_ids=["r1", "r1"]), "name 1 to 1000 events, each once"),
        (void("r1", kind=ADJUSTMENT_KIND_RERATE), "only a void and an amendment correct events"),
        (note(-(10**31)), "check the unit"),
        (void("r1", lines=[line("void-1", dict(HUGE))]), "lines: sum up to -2"),
        (note(-1, period_start_ms=FAR.start_ms, period_end_ms=FAR.end_ms), "is a period without usage"),
        (note(-1, period_start_ms=LONG_AGO.start_ms, period_end_ms=LONG_AGO.end_ms), "is a period without usage"),
        (note(1), "what gives back is not above zero"),
    ],
)
def test_what_does_not_hold_is_refused_whole(said: Adjustment, names: str) -> None:
    ledger = made()
    result = adjusted(ledger, said)
    assert names in applied(result).refusal
    assert spend(ledger) == 2 * COST
    assert ledger.state.corrected == {}
    assert not result.record.lines
    assert ledger.replayed().digest() == ledger.state.digest()


def test_a_note_on_an_old_month_waits_for_its_invoice(tmp_path: Path) -> None:
    """It was let go with the month's usage a day later, and no invoice ever had it."""
    ledger = made()
    old = period_at(Calendar(), NOW_MS - 500 * DAY_MS)
    said = note(-5, period_start_ms=old.start_ms, period_end_ms=old.end_ms)
    assert applied(adjusted(ledger, said)).applied
    ledger.tick(NOW_MS + DAY_MS)
    ledger.tick(NOW_MS + 2 * DAY_MS)
    assert spend(ledger) == 2 * COST - 5
    agreed(ledger, tmp_path)


def test_adjustments_do_not_crowd_usage_out_of_its_lines() -> None:
    ledger = made()
    lines = [line("void-1", {PartKey("credit note", "", 0): Sum(1, -1)}, project_id=f"p{n}") for n in range(3)]
    assert applied(adjusted(ledger, void("r1", lines=lines))).applied
    with mock.patch("billing.period_lines.LINES_MAX", 3):
        ledger.tick(NOW_MS + DAY_MS)
    assert "(other)" not in {kept.key.project_id for kept in ledger.state.lines.of(ONE)}


def test_an_invoice_of_very_many_adjustments_stays_in_its_bound() -> None:
    ledger = made()
    parts = {PartKey(f"part-{n}", "", 0): Sum(1, -1) for n in range(63)}
    for name in [f"note-{n}" for n in range(10)]:
        said = note(-1)
        said.lines[0].key.adjustment_id = name
        del said.lines[0].parts[:]
        said.lines[0].parts.extend(to_line_parts(parts))
        said.lines[0].cost.CopyFrom(to_amount(-63))
        assert applied(adjusted(ledger, said, name)).applied
    with mock.patch("billing.invoices.INVOICE_BYTES_MAX", 15_000):
        terms = InvoiceFinalization(
            tenant_id=ONE, period_start_ms=PERIOD.start_ms, series_prefix="INV", rounding_rule=ROUNDING_RULE_HALF_UP
        )
        drawn = Invoice.FromString(applied(ledger.command(PERIOD.end_ms, invoice_finalization=terms)).invoice)
    assert drawn.ByteSize() <= 15_000
    assert from_amount(drawn.adjustments) == -630
    assert invoice_problems(drawn) == []
    assert not ledger.state.lines.of(ONE)


def test_names_of_adjustments_are_bounded_for_the_record_that_invoices_them() -> None:
    ledger = made()
    said = note(-1)
    with mock.patch("billing.adjustments.ADJUSTMENT_NAMES_BYTES_MAX", 20):
        assert applied(adjusted(ledger, said)).applied
        again = note(-1)
        again.lines[0].key.adjustment_id = "void-2"
        assert "has 1 lines of adjustments on no invoice yet" in applied(adjusted(ledger, again, "void-2")).refusal


def test_a_tenant_whose_usage_was_voided_keeps_its_currency() -> None:
    """Its spend is nothing, but a line of each is on its way to an invoice."""
    ledger = Ledger()
    ledger.price()
    ledger.tenant(ONE)
    ledger.usage(batch([usage("r1", ONE)]))
    assert applied(adjusted(ledger, void("r1"))).applied
    assert ledger.state.accounts[ONE].spend_pico == 0
    refused = applied(ledger.command(tenant_upsert=TenantUpsert(tenant_id=ONE, currency="EUR")))
    assert "has amounts in USD" in refused.refusal


@pytest.mark.parametrize("missing", ["issuer", "reason"])
def test_it_says_who_and_why(missing: str) -> None:
    ledger = made()
    result = ledger.command(command_id="void-1", adjustment=void("r1"), **{**WHO, missing: ""})
    assert "says who asks for it and why" in applied(result).refusal


def test_the_largest_adjustment_stays_in_its_bounds() -> None:
    """As many lines as one may have, with names as long as they may be, and as many corrected events."""
    ledger = made()
    wide = {PartKey(f"{n:064}", "t" * 64, 10**15 + n): Sum(-(10**5), -(10**20 + n * 10**5)) for n in range(3)}
    names = [{"project_id": f"{n:0256}", "model": "m" * 256} for n in range(ADJUSTMENT_LINES_MAX)]
    said = void("r1", lines=[line("void-1", wide, **name) for name in names])
    del said.corrected_request_ids[:]
    said.corrected_request_ids.extend(f"{n:0200}" for n in range(ADJUSTMENT_EVENTS_MAX))
    result = adjusted(ledger, said)
    assert applied(result).applied, applied(result).refusal
    assert 700_000 < said.ByteSize() < BATCH_BYTES_MAX
    assert len(result.stored) < RECORD_BYTES_MAX // 2
    assert "1000 of 1000 event(s) are beyond the ledger's memory" in applied(result).outcome
    more = void("r2", "void-2", lines=[line("void-2", wide, **name) for name in (*names, {"project_id": "more"})])
    assert "lines: 501 entries; write 1 to 500" in applied(adjusted(ledger, more, "void-2")).refusal
    with mock.patch("billing.adjustments.CORRECTED_EVENTS_MAX", 1_000):
        assert "write a credit note" in applied(adjusted(ledger, void("r2", "v", lines=[line("v", BACK)]), "v")).refusal
    with mock.patch("billing.adjustments.ADJUSTMENT_LINES_KEPT_MAX", 500):
        assert "draw the invoice first" in applied(adjusted(ledger, void("r2", "v", lines=[line("v", BACK)]), "v")).refusal


def test_periods_are_the_tenants_own() -> None:
    ledger = made()
    shanghai = Calendar(time_zone="Asia/Shanghai", from_month=[0], offset_minutes=[480])
    three = tenants_in(1, 3)[2]
    ledger.command(tenant_upsert=TenantUpsert(tenant_id=three, currency="USD", calendar=shanghai))
    ledger.usage(batch([usage("r9", three)]))
    period = period_at(shanghai, NOW_MS)
    own: dict[str, Any] = {"tenant_id": three, "period_start_ms": period.start_ms, "period_end_ms": period.end_ms}
    said = void("r9", tenant_id=three, lines=[line("void-1", BACK, **own)])
    assert applied(adjusted(ledger, said)).applied
    assert spend(ledger, three) == 0
