"""The judge: a pure function over histories. No clock, no I/O, nothing of the product's code.

Promise: `check` names every request that was lost, doubled or attributed wrongly, per request, per tenant and per class:

- a request that was acknowledged and is not in the ledger, or is in the ledger and not in the database, is lost;
- one that is there more than once is doubled, wherever that is;
- wrong: charged and never attempted; charged to another tenant; another count in any class, or another cost; charged although
  it was refused; less than what had been delivered, or more than what was asked for; sums of a tenant that are not those of its
  requests, in the database's totals or its account, though totals may cancel elsewhere;
- an unknown outcome that was not looked up until it was settled is unsettled, which is as bad.

Before healing (`healed=False`) nothing is lost yet, and the rest holds all the same: ledger <= ok + unknown.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.chaos.history import Attempt, Outcome, Receipt, outcomes

__all__ = ["Charge", "Sums", "Verdict", "check", "sums_of"]


@dataclass(frozen=True, slots=True)
class Charge:
    """One charge, as the ledger or as the database has it. `request_id` is the one that the driver knows."""

    request_id: str
    tenant_id: str
    tokens: Mapping[str, int]
    cost_pico: int


@dataclass(slots=True)
class Sums:
    """A tenant's totals."""

    events: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    cost_pico: int = 0


@dataclass(slots=True)
class Verdict:
    """What was found. `lost`, `doubled` and `wrong` are sentences for people, one for each request or sum."""

    attempts: int = 0
    ok: int = 0
    failed: int = 0
    unknown: int = 0
    unknown_charged: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.unsettled)

    def findings(self) -> list[str]:
        return [f"{kind}: {what}" for kind in ("lost", "doubled", "wrong", "unsettled") for what in getattr(self, kind)]


def sums_of(charges: Iterable[Charge]) -> dict[str, Sums]:
    """Per tenant."""
    found: dict[str, Sums] = defaultdict(Sums)
    for charge in charges:
        each = found[charge.tenant_id]
        each.events += 1
        each.tokens.update(charge.tokens)
        each.cost_pico += charge.cost_pico
    return dict(found)


def check(
    attempts: Sequence[Attempt],
    receipts: Sequence[Receipt],
    ledger: Sequence[Charge],
    rows: Sequence[Charge],
    totals: Mapping[str, Sums],
    accounts: Mapping[str, Sums],
    settled: Collection[str],
    *,
    healed: bool = True,
    refused: Collection[str] = (),
) -> Verdict:
    """Compare. `totals` and `accounts` are what the database's sums gained over these attempts, `accounts` without tokens.

    `refused`: acknowledged by a producer, then refused by the ledger, which has told the world so: that must not be charged.
    """
    verdict = Verdict(attempts=len(attempts))
    asked = {attempt.request_id: attempt for attempt in attempts}
    assert len(asked) == len(attempts), "a request is attempted under one ID"
    known = outcomes(receipts)
    for request_id in known.keys() - asked.keys():
        verdict.wrong.append(f"{request_id}: a receipt for what was never attempted")
    in_ledger = _by_request(ledger)
    in_rows = _by_request(rows)
    for attempt in attempts:
        # Attempted, and nothing heard: as unknown as can be.
        receipt = known.get(attempt.request_id, Receipt(attempt.request_id, Outcome.UNKNOWN))
        charges = in_ledger.get(attempt.request_id, [])
        if attempt.request_id in refused:
            receipt = Receipt(attempt.request_id, Outcome.FAILED, reason="told on usage.rejected")
        _judge(verdict, attempt, receipt, charges, attempt.request_id in settled, healed)
    for request_id, charges in in_ledger.items():
        if request_id not in asked:
            verdict.wrong.append(f"{request_id}: charged to {charges[0].tenant_id} in the ledger, and nobody attempted it")
    _compare_rows(verdict, in_ledger, in_rows, healed=healed)
    if healed:
        stated = sums_of(ledger)
        _compare_sums(verdict, "usage_totals", stated, totals, with_tokens=True)
        _compare_sums(verdict, "accounts", stated, accounts, with_tokens=False)
    return verdict


def _judge(
    verdict: Verdict, attempt: Attempt, receipt: Receipt, charges: Sequence[Charge], settled: bool, healed: bool
) -> None:
    who = attempt.request_id
    if len(charges) > 1:
        verdict.doubled.append(f"{who}: {len(charges)} times in the ledger")
    if receipt.outcome is Outcome.OK:
        verdict.ok += 1
        if not charges and healed:
            verdict.lost.append(f"{who}: acknowledged, and not in the ledger")
    elif receipt.outcome is Outcome.FAILED:
        verdict.failed += 1
        if any(charge.cost_pico or any(charge.tokens.values()) for charge in charges):
            verdict.wrong.append(f"{who}: refused ({receipt.reason}), and charged")
        return
    else:
        verdict.unknown += 1
        verdict.unknown_charged += bool(charges)
        if healed and not settled:
            verdict.unsettled.append(f"{who}: its outcome was not looked up")
        if healed and not charges and any(receipt.delivered.values()):
            verdict.lost.append(f"{who}: {receipt.delivered} had been delivered, and nothing is in the ledger")
    for charge in charges:
        if charge.tenant_id != attempt.tenant_id:
            verdict.wrong.append(f"{who}: asked for by {attempt.tenant_id}, charged to {charge.tenant_id}")
        exact = attempt.exact or receipt.outcome is Outcome.OK
        for name in sorted(attempt.tokens.keys() | charge.tokens.keys()):
            most, counted = attempt.tokens.get(name, 0), charge.tokens.get(name, 0)
            least = most if exact else receipt.delivered.get(name, 0)
            if not exact and name in attempt.slack:
                most = min(most, least + attempt.slack[name])
            if not least <= counted <= most:
                verdict.wrong.append(f"{who}: {counted} {name}, and {least} to {most} are right")
        cost_pico = sum(count * attempt.prices_pico.get(name, 0) for name, count in charge.tokens.items())
        if charge.cost_pico != cost_pico:
            verdict.wrong.append(f"{who}: it costs {charge.cost_pico} pico, and {cost_pico} is right")


def _compare_rows(
    verdict: Verdict, in_ledger: Mapping[str, list[Charge]], in_rows: Mapping[str, list[Charge]], *, healed: bool
) -> None:
    for request_id in sorted(in_ledger.keys() | in_rows.keys()):
        charges, rows = in_ledger.get(request_id, []), in_rows.get(request_id, [])
        if len(rows) > len(charges):
            what = "doubled" if charges else "there and not in the ledger"
            (verdict.doubled if charges else verdict.wrong).append(f"{request_id}: {what} in usage_events: {len(rows)} rows")
        elif len(rows) < len(charges) and healed:
            verdict.lost.append(f"{request_id}: {len(charges)} in the ledger, {len(rows)} in usage_events")
        elif rows and sorted(map(_comparable, rows)) != sorted(map(_comparable, charges)) and len(rows) == len(charges):
            verdict.wrong.append(f"{request_id}: the ledger says {charges}, usage_events {rows}")


def _compare_sums(
    verdict: Verdict, name: str, stated: Mapping[str, Sums], found: Mapping[str, Sums], *, with_tokens: bool
) -> None:
    for tenant_id in sorted(stated.keys() | found.keys()):
        wanted, there = stated.get(tenant_id, Sums()), found.get(tenant_id, Sums())
        if (wanted.events, wanted.cost_pico) != (there.events, there.cost_pico):
            verdict.wrong.append(
                f"{name} of {tenant_id}: {there.events} events and {there.cost_pico} pico more, and its requests are "
                f"{wanted.events} events and {wanted.cost_pico} pico"
            )
        classes = sorted(wanted.tokens.keys() | there.tokens.keys()) if with_tokens else []
        for each in classes:
            if wanted.tokens[each] != there.tokens[each]:
                verdict.wrong.append(
                    f"{name} of {tenant_id}: {there.tokens[each]} {each} more, and its requests have {wanted.tokens[each]}"
                )


def _by_request(charges: Iterable[Charge]) -> dict[str, list[Charge]]:
    found: dict[str, list[Charge]] = defaultdict(list)
    for charge in charges:
        found[charge.request_id].append(charge)
    return dict(found)


def _comparable(charge: Charge) -> tuple[str, tuple[tuple[str, int], ...], int]:
    return charge.tenant_id, tuple(sorted((name, count) for name, count in charge.tokens.items() if count)), charge.cost_pico
