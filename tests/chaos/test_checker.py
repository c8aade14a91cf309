"""The judge itself: made-up histories that are good, and for each way to be bad one that must turn it red."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.checker import Charge, Sums, Verdict, check, sums_of
from tests.chaos.history import Attempt, History, Outcome, Receipt, read

PRICES = {"uncached_input_tokens": 3, "output_tokens": 7, "cache_read_tokens": 1}


def tokens(number: int) -> dict[str, int]:
    return {"uncached_input_tokens": 100 + number, "output_tokens": 10 * number}


def attempt(number: int, *, exact: bool = True) -> Attempt:
    return Attempt(f"r{number}", f"tenant-{number % 2}", tokens(number), PRICES, exact)


def charge(number: int, **changes: object) -> Charge:
    counts = changes.pop("tokens", tokens(number))
    assert isinstance(counts, dict)
    cost_pico = sum(count * PRICES[name] for name, count in counts.items())
    return Charge(
        **{"request_id": f"r{number}", "tenant_id": f"tenant-{number % 2}", "cost_pico": cost_pico, **changes}, tokens=counts
    )


class Case:
    """A good history of six requests: four ok, one refused, one unknown that was charged. Tests spoil it."""

    def __init__(self) -> None:
        self.attempts = [attempt(number) for number in range(6)]
        self.receipts = [Receipt(f"r{number}", Outcome.OK) for number in range(4)]
        self.receipts += [Receipt("r4", Outcome.FAILED, reason="full"), Receipt("r5", Outcome.UNKNOWN)]
        self.ledger = [charge(number) for number in (0, 1, 2, 3, 5)]
        self.rows = list(self.ledger)
        self.totals: dict[str, Sums] | None = None
        self.accounts: dict[str, Sums] | None = None
        self.settled = {"r5"}
        self.healed = True

    def verdict(self) -> Verdict:
        totals = sums_of(self.ledger) if self.totals is None else self.totals
        accounts = sums_of(self.ledger) if self.accounts is None else self.accounts
        return check(self.attempts, self.receipts, self.ledger, self.rows, totals, accounts, self.settled, healed=self.healed)


@pytest.fixture
def case() -> Case:
    return Case()


def kinds(verdict: Verdict) -> dict[str, int]:
    assert verdict.good == (not verdict.findings())
    return dict(Counter(finding.partition(":")[0] for finding in verdict.findings()))


def test_a_good_history_is_good(case: Case) -> None:
    verdict = case.verdict()
    assert verdict.good, verdict.findings()
    assert (verdict.attempts, verdict.ok, verdict.failed, verdict.unknown, verdict.unknown_charged) == (6, 4, 1, 1, 1)


def test_an_unknown_one_may_be_missing(case: Case) -> None:
    del case.ledger[-1], case.rows[-1]
    assert case.verdict().good


def test_an_acknowledged_one_that_is_missing_is_lost(case: Case) -> None:
    del case.ledger[1], case.rows[1]
    assert kinds(case.verdict()) == {"lost": 1}


def test_before_healing_what_is_missing_is_not_lost_yet(case: Case) -> None:
    del case.ledger[1], case.rows[:2]
    case.settled, case.healed = set(), False
    assert case.verdict().good
    case.ledger.append(charge(0))
    assert kinds(case.verdict()) == {"doubled": 1}


def test_one_that_is_in_the_ledger_only_is_lost(case: Case) -> None:
    del case.rows[2]
    assert kinds(case.verdict()) == {"lost": 1}


def test_one_that_is_charged_twice_is_doubled(case: Case) -> None:
    case.ledger.append(charge(2))
    case.rows.append(charge(2))
    assert kinds(case.verdict()) == {"doubled": 1}


def test_an_unknown_one_that_is_charged_twice_is_doubled(case: Case) -> None:
    case.ledger.append(charge(5))
    case.rows.append(charge(5))
    assert kinds(case.verdict()) == {"doubled": 1}


def test_one_that_has_two_rows_is_doubled(case: Case) -> None:
    case.rows.append(charge(0))
    assert kinds(case.verdict()) == {"doubled": 1}


def test_a_row_without_a_charge_is_wrong(case: Case) -> None:
    case.rows.append(charge(4))
    assert kinds(case.verdict()) == {"wrong": 1}


def test_a_charge_that_nobody_attempted_is_wrong(case: Case) -> None:
    case.ledger.append(charge(77))
    case.rows.append(charge(77))
    assert kinds(case.verdict()) == {"wrong": 1}


def test_a_refused_one_that_is_charged_is_wrong(case: Case) -> None:
    case.ledger.append(charge(4))
    case.rows.append(charge(4))
    assert kinds(case.verdict()) == {"wrong": 1}


def test_a_refused_one_may_be_recorded_at_no_price(case: Case) -> None:
    case.ledger.append(charge(4, tokens={}))
    case.rows.append(charge(4, tokens={}))
    assert case.verdict().good


def test_another_tenant_is_wrong_although_the_total_is_right(case: Case) -> None:
    case.ledger[0] = case.rows[0] = charge(0, tenant_id="tenant-1")
    assert kinds(case.verdict()) == {"wrong": 1}


def test_two_swapped_counts_are_wrong_although_every_sum_is_right(case: Case) -> None:
    case.ledger[0] = case.rows[0] = charge(0, tokens=tokens(2))
    case.ledger[2] = case.rows[2] = charge(2, tokens=tokens(0))
    assert sums_of(case.ledger) == sums_of(Case().ledger)
    assert kinds(case.verdict()) == {"wrong": 4}


def test_one_dropped_token_is_wrong(case: Case) -> None:
    fewer = {**tokens(3), "output_tokens": tokens(3)["output_tokens"] - 1}
    case.ledger[3] = case.rows[3] = charge(3, tokens=fewer)
    assert kinds(case.verdict()) == {"wrong": 1}


def test_tokens_of_another_class_are_wrong(case: Case) -> None:
    moved = {"uncached_input_tokens": 100, "cache_read_tokens": 3, "output_tokens": 30}
    case.ledger[3] = case.rows[3] = charge(3, tokens=moved)
    assert kinds(case.verdict()) == {"wrong": 2}


def test_a_wrong_cost_is_wrong(case: Case) -> None:
    case.ledger[3] = case.rows[3] = charge(3, cost_pico=1)
    assert kinds(case.verdict()) == {"wrong": 1}


def test_a_row_that_differs_from_the_ledger_is_wrong(case: Case) -> None:
    case.rows[3] = charge(3, tokens=tokens(2))
    assert kinds(case.verdict()) == {"wrong": 1}


@pytest.mark.parametrize("name", ["totals", "accounts"])
def test_sums_that_are_not_those_of_the_requests_are_wrong(case: Case, name: str) -> None:
    sums = sums_of(case.ledger)
    sums["tenant-0"].events += 1
    setattr(case, name, sums)
    assert kinds(case.verdict()) == {"wrong": 1}
    setattr(case, name, sums_of([*case.ledger, charge(3, tenant_id="nobody")]))
    assert kinds(case.verdict()) == {"wrong": 1 if name == "accounts" else 3}


def test_totals_of_a_class_are_compared(case: Case) -> None:
    case.totals = sums_of(case.ledger)
    case.totals["tenant-1"].tokens["output_tokens"] -= 1
    assert kinds(case.verdict()) == {"wrong": 1}


def test_an_unknown_one_that_nobody_looked_up_is_unsettled(case: Case) -> None:
    case.settled = set()
    assert kinds(case.verdict()) == {"unsettled": 1}


def test_what_was_attempted_and_never_answered_is_unknown(case: Case) -> None:
    del case.receipts[-1]
    assert case.verdict().unknown == 1
    case.settled = set()
    assert kinds(case.verdict()) == {"unsettled": 1}


def test_a_receipt_for_nothing_is_wrong(case: Case) -> None:
    case.receipts.append(Receipt("r99", Outcome.FAILED))
    assert kinds(case.verdict()) == {"wrong": 1}


def test_ok_once_is_ok_whatever_came_after(case: Case) -> None:
    case.receipts.append(Receipt("r1", Outcome.UNKNOWN))
    case.receipts.append(Receipt("r2", Outcome.FAILED))
    assert case.verdict().good
    del case.ledger[1], case.rows[1]
    assert kinds(case.verdict()) == {"lost": 1}


@pytest.mark.parametrize(
    ("billed", "found"),
    [
        ({"uncached_input_tokens": 101, "output_tokens": 4}, {}),
        ({"uncached_input_tokens": 101, "output_tokens": 10}, {}),
        ({"uncached_input_tokens": 101, "output_tokens": 3}, {"wrong": 1}),
        ({"uncached_input_tokens": 101, "output_tokens": 11}, {"wrong": 1}),
        ({"uncached_input_tokens": 100, "output_tokens": 5}, {"wrong": 1}),
        (None, {"lost": 1}),
    ],
)
def test_a_stream_that_was_cut_is_charged_what_was_delivered_or_more(
    billed: dict[str, int] | None, found: dict[str, int]
) -> None:
    delivered = {"uncached_input_tokens": 101, "output_tokens": 4}
    receipts = [Receipt("r1", Outcome.UNKNOWN, delivered)]
    ledger = [] if billed is None else [charge(1, tokens=billed)]
    verdict = check([attempt(1, exact=False)], receipts, ledger, ledger, sums_of(ledger), sums_of(ledger), {"r1"})
    assert kinds(verdict) == found


@pytest.mark.parametrize(("output_tokens", "found"), [(6, {}), (7, {"wrong": 1})])
def test_a_stream_that_was_cut_is_charged_no_more_than_was_on_its_way(output_tokens: int, found: dict[str, int]) -> None:
    asked = Attempt("r1", "tenant-1", tokens(1), PRICES, exact=False, slack={"output_tokens": 2})
    receipts = [Receipt("r1", Outcome.UNKNOWN, {"uncached_input_tokens": 101, "output_tokens": 4})]
    ledger = [charge(1, tokens={"uncached_input_tokens": 101, "output_tokens": output_tokens})]
    assert kinds(check([asked], receipts, ledger, ledger, sums_of(ledger), sums_of(ledger), {"r1"})) == found


def test_a_history_is_read_back_without_a_torn_line(tmp_path: Path, case: Case) -> None:
    history = History(tmp_path / "history.jsonl")
    history.add(case.attempts)
    history.add(case.receipts)
    history.close()
    with history.path.open("a") as file:
        file.write('{"kind": "receipt", "request_id": "r0", "outc')
    assert read(history.path) == (case.attempts, case.receipts)


def test_what_the_ledger_refused_and_told_is_not_lost_and_must_not_be_charged(case: Case) -> None:
    def verdict() -> Verdict:
        sums = sums_of(case.ledger)
        return check(case.attempts, case.receipts, case.ledger, case.ledger, sums, sums, case.settled, refused={"r2"})

    assert kinds(verdict()) == {"wrong": 1}, "charged all the same"
    case.ledger = [each for each in case.ledger if each.request_id != "r2"]
    assert verdict().good
    assert kinds(check(case.attempts, case.receipts, case.ledger, case.ledger, {}, {}, case.settled))["lost"] == 1, "not told"
