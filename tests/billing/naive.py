"""A ledger as one would write it on paper: dictionaries, one event at a time, fractions for money: the state machines' model.

It shares no code with `billing` but the contracts and the bounds, and knows flat prices alone; tiers have a model of their own.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction

from billing.v1.account_pb2 import ACCOUNT_STATUS_ACTIVE, ACCOUNT_STATUS_CLOSED, ACCOUNT_STATUS_UNKNOWN
from billing.v1.ledger_pb2 import (
    DROP_REASON_CONFLICT,
    DROP_REASON_DUPLICATE,
    DROP_REASON_FORWARDED,
    DROP_REASON_INVALID,
    DROP_REASON_TOO_FAR_IN_FUTURE,
    DROP_REASON_TOO_OLD,
)
from billing.v1.usage_pb2 import OUTCOME_BACKEND_ERROR, OUTCOME_REJECTED, UsageEvent

__all__ = ["DAY_MS", "NaiveAccount", "NaiveLedger", "NaiveLine", "month_of"]

DAY_MS = 24 * 60 * 60 * 1000
FUTURE_ALERT_MS, FUTURE_REJECT_MS = 5 * 60_000, DAY_MS
# Model to the price of a million input and output tokens.
PriceList = dict[str, tuple[Fraction, Fraction]]


def month_of(time_ms: float) -> str:
    return datetime.fromtimestamp(time_ms // 1000, UTC).strftime("%Y-%m")


@dataclass
class NaiveAccount:
    currency: str
    status: int = ACCOUNT_STATUS_UNKNOWN
    credit: Fraction = Fraction(0)
    spend: Fraction = Fraction(0)
    events: int = 0
    duplicates: int = 0
    conflicts: int = 0
    unrated: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    # Of spend: by adjustments, and the requests that they corrected.
    adjusted: Fraction = Fraction(0)
    corrected: set[str] = field(default_factory=set)
    # What its invoices came to; of this, what was less than nothing and became credit; the month that comes next, "": any.
    invoiced: Fraction = Fraction(0)
    returned: Fraction = Fraction(0)
    next_month: str = ""
    keys: dict[str, tuple[bytes, bool]] = field(default_factory=dict)
    grants: dict[str, Fraction] = field(default_factory=dict)


@dataclass
class NaiveLine:
    """What one month of one tenant, project, model and price list came to."""

    events: int = 0
    refused: int = 0
    unrated: int = 0
    cost: Fraction = Fraction(0)
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass
class Remembered:
    payload: bytes
    until_ms: int


class NaiveLedger:
    """What one partition must come to."""

    def __init__(self, tenants_here: set[str], horizon_ms: int) -> None:
        self.here = tenants_here
        self.horizon_ms = horizon_ms
        self.accounts: dict[str, NaiveAccount] = {}
        self.charged: dict[tuple[str, str], list[bytes]] = defaultdict(list)
        self.remembered: dict[tuple[str, str], Remembered] = {}
        self.commands: dict[str, int] = {}
        self.books: dict[str, list[tuple[int, PriceList]]] = defaultdict(list)
        # By tenant, month in UTC, currency, project, model and price version (0: none).
        self.lines: dict[tuple[str, str, str, str, str, int], NaiveLine] = defaultdict(NaiveLine)
        # By tenant and month: what adjustments came to that no invoice has; as are the lines.
        self.adjustments: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
        self.invoices = 0
        self.day = 0

    def account(self, tenant_id: str) -> NaiveAccount:
        return self.accounts.setdefault(tenant_id, NaiveAccount("USD"))

    # --- usage ---

    def take(self, raws: list[bytes], now_ms: int) -> tuple[dict[int, int], list[Fraction]]:
        """Index to the reason why it is dropped, and what the others cost."""
        dropped: dict[int, int] = {}
        admitted: list[UsageEvent] = []
        for index, raw in enumerate(raws):
            event = UsageEvent.FromString(raw)
            reason = self._reason(event, raw, now_ms)
            if reason:
                dropped[index] = reason
            else:
                admitted.append(event)
                name = event.tenant_id, event.request_id
                until_ms = (max(now_ms, event.ended_ms) + self.horizon_ms) // DAY_MS * DAY_MS + DAY_MS
                self.remembered[name] = Remembered(raw, until_ms)
                self.charged[name].append(raw)
        return dropped, [self._charge(event) for event in admitted]

    def _reason(self, event: UsageEvent, raw: bytes, now_ms: int) -> int:
        before = self.remembered.get((event.tenant_id, event.request_id))
        if before is not None and before.payload == raw:
            self.account(event.tenant_id).duplicates += 1
            return DROP_REASON_DUPLICATE
        if not event.model or event.started_ms > event.ended_ms:
            return DROP_REASON_INVALID
        if event.tenant_id not in self.here:
            return DROP_REASON_FORWARDED
        if before is not None:
            self.account(event.tenant_id).conflicts += 1
            return DROP_REASON_CONFLICT
        if event.ended_ms > now_ms + FUTURE_REJECT_MS:
            return DROP_REASON_TOO_FAR_IN_FUTURE
        if event.ended_ms < now_ms - self.horizon_ms and not event.backfill:
            return DROP_REASON_TOO_OLD
        return 0

    def _charge(self, event: UsageEvent) -> Fraction:
        account = self.account(event.tenant_id)
        account.events += 1
        effective = [prices for since_ms, prices in self.books[account.currency] if since_ms <= event.ended_ms]
        priced = bool(effective) and event.model in effective[-1]
        month = month_of(event.ended_ms)
        version = len(effective) if priced else 0
        line = self.lines[event.tenant_id, month, account.currency, event.project_id, event.model, version]
        line.events += 1
        if event.outcome in (OUTCOME_REJECTED, OUTCOME_BACKEND_ERROR):
            line.refused += 1
            return Fraction(0)
        account.input_tokens += event.uncached_input_tokens
        account.output_tokens += event.output_tokens
        if not priced:
            account.unrated += 1
            line.unrated += 1
            return Fraction(0)
        each_input, each_output = effective[-1][event.model]
        cost = (each_input * event.uncached_input_tokens + each_output * event.output_tokens) / 10**6
        line.input_tokens += event.uncached_input_tokens
        line.output_tokens += event.output_tokens
        line.cost += cost
        account.spend += cost
        return cost

    # --- time ---

    def tick(self, now_ms: int) -> None:
        if now_ms // DAY_MS > self.day:
            self.day = now_ms // DAY_MS
            self.remembered = {name: known for name, known in self.remembered.items() if known.until_ms > self.day * DAY_MS}
            self.commands = {name: at_ms for name, at_ms in self.commands.items() if at_ms >= now_ms - self.horizon_ms}

    # --- commands: whether each is applied ---

    def once(self, command_id: str, now_ms: int, allowed: bool) -> bool:
        if command_id in self.commands or not allowed:
            return False
        self.commands[command_id] = now_ms
        return True

    def knows(self, tenant_id: str) -> bool:
        return tenant_id in self.here and self.account_status(tenant_id) != ACCOUNT_STATUS_UNKNOWN

    def account_status(self, tenant_id: str) -> int:
        return self.accounts[tenant_id].status if tenant_id in self.accounts else ACCOUNT_STATUS_UNKNOWN

    def grant(self, command_id: str, now_ms: int, tenant_id: str, amount: Fraction, currency: str, name: str) -> bool:
        allowed = self.knows(tenant_id) and amount > 0 and self.accounts[tenant_id].currency == currency
        granted = self.account(tenant_id).grants if allowed else {}
        if applied := self.once(command_id, now_ms, allowed and granted.get(name, amount) == amount):
            self.accounts[tenant_id].credit += amount if name not in granted else 0
            granted[name] = amount
        return applied

    def upsert(self, command_id: str, now_ms: int, tenant_id: str, currency: str, status: int) -> bool:
        known = self.accounts.get(tenant_id)
        moves = known is not None and currency not in ("", known.currency)
        # Credit, spend, an invoice; what was voided to nothing is still on its way to one, in two lines.
        has_amounts = known is not None and bool(known.credit or known.spend or known.next_month or self._has_lines(tenant_id))
        if applied := self.once(command_id, now_ms, tenant_id in self.here and not (moves and has_amounts)):
            account = self.account(tenant_id)
            account.currency = currency or account.currency
            account.status = status or (ACCOUNT_STATUS_ACTIVE if account.status == ACCOUNT_STATUS_UNKNOWN else account.status)
            if status == ACCOUNT_STATUS_CLOSED:
                account.keys = {name: (secret_hash, True) for name, (secret_hash, _) in account.keys.items()}
        return applied

    def _has_lines(self, tenant_id: str) -> bool:
        costs = [line.cost for place, line in self.lines.items() if place[0] == tenant_id]
        return any(costs) or any(amount for place, amount in self.adjustments.items() if place[0] == tenant_id)

    def void(self, command_id: str, now_ms: int, tenant_id: str, request_id: str, amount: Fraction, currency: str) -> bool:
        allowed = self.knows(tenant_id) and self.accounts[tenant_id].currency == currency and amount <= 0
        if applied := self.once(command_id, now_ms, allowed and request_id not in self.accounts[tenant_id].corrected):
            account = self.accounts[tenant_id]
            account.spend += amount
            account.adjusted += amount
            account.corrected.add(request_id)
            self.adjustments[tenant_id, month_of(now_ms)] += amount
        return applied

    def invoice(self, command_id: str, now_ms: int, tenant_id: str, month: str, draft: bool) -> Fraction | None:
        """What the invoice of that month and of all that is left of earlier ones comes to; None: it is not drawn."""
        next_month = self.accounts[tenant_id].next_month if tenant_id in self.accounts else ""
        pending = {place[1] for place in self.lines if place[0] == tenant_id}
        pending |= {month for whose, month in self.adjustments if whose == tenant_id}
        in_turn = next_month <= month < month_of(now_ms) and not any(next_month <= each < month for each in pending)
        if not self.once(command_id, now_ms, self.knows(tenant_id) and (draft or in_turn)):
            return None
        lines = [place for place in self.lines if place[0] == tenant_id and place[1] <= month]
        adjustments = [place for place in self.adjustments if place[0] == tenant_id and place[1] <= month]
        net = sum((self.lines[place].cost for place in lines), Fraction(0)) + sum(
            map(self.adjustments.__getitem__, adjustments)
        )
        if not draft:
            for place in lines:
                del self.lines[place]
            for adjusted in adjustments:
                del self.adjustments[adjusted]
            account = self.accounts[tenant_id]
            account.invoiced += net
            account.returned += max(-net, Fraction(0))
            # What is given back can be spent again.
            account.credit += max(-net, Fraction(0))
            account.spend += max(-net, Fraction(0))
            account.next_month = month_of(
                datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC).timestamp() * 1_000 + 32 * DAY_MS
            )
            self.invoices += 1
        return net

    def key(self, command_id: str, now_ms: int, tenant_id: str, key_id: str, secret_hash: bytes, revoked: bool) -> bool:
        others = any(key_id in account.keys for name, account in self.accounts.items() if name != tenant_id)
        allowed = self.knows(tenant_id) and not others and len(secret_hash) == 32
        opens_closed = not revoked and self.account_status(tenant_id) == ACCOUNT_STATUS_CLOSED
        if applied := self.once(command_id, now_ms, allowed and not opens_closed):
            self.accounts[tenant_id].keys[key_id] = secret_hash, revoked
        return applied

    def book(self, command_id: str, now_ms: int, currency: str, version: int, since_ms: int, prices: PriceList) -> bool:
        line = self.books[currency]
        allowed = version == len(line) + 1 and (not line or since_ms > line[-1][0])
        if applied := self.once(command_id, now_ms, allowed):
            line.append((since_ms, prices))
        return applied
