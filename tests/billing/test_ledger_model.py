"""The ledger and its accounts against a naive model, over any order of usage, commands, repeats, time and foundings.

Of each record: what was dropped and why, what each event cost, whether the command took effect, what an invoice came to. After
each step: accounts and keys are the model's, window totals sum to what was charged, and a reader that follows by the chain has
the same digest. In the end a replay from the first record has it too.

MODEL_EXAMPLES sets how many runs of each machine (`make models EXAMPLES=500`).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from fractions import Fraction
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from billing import commands, replay
from billing.amounts import PICO, from_amount, to_amount
from billing.chain import Chain
from billing.founding import LedgerSettings, found, found_again
from billing.invoice_checks import invoice_problems
from billing.line_parts import PartKey, Sum, to_line_parts
from billing.periods import month_of, month_start_ms, period_at
from billing.state import LedgerState, MemorySeenKeys
from billing.step import CommandInput, StepResult, TickInput, UsageInput, step
from billing.v1.account_pb2 import ACCOUNT_STATUS_CLOSED, ACCOUNT_STATUS_SUSPENDED, Amount, ApiKey, Calendar
from billing.v1.alert_pb2 import ALERT_RULE_UNSIGNED_COMMAND
from billing.v1.command_pb2 import (
    ADJUSTMENT_KIND_VOID,
    Adjustment,
    Command,
    CreditGrant,
    InvoiceFinalization,
    KeyUpsert,
    Price,
    PriceBook,
    TenantUpsert,
)
from billing.v1.invoice_pb2 import ROUNDING_RULE_HALF_EVEN, Invoice, PeriodLine, PeriodLineKey
from billing.v1.ledger_pb2 import CommandApplied, WindowTotal
from billing.v1.usage_pb2 import (
    OUTCOME_BACKEND_ERROR,
    OUTCOME_CANCELLED,
    OUTCOME_COMPLETED,
    OUTCOME_REJECTED,
    RawUsageBatch,
    UsageBatch,
)
from tests.billing import naive
from tests.billing.ledgers import KEYS, NOW_MS, tenants_in, usage
from tests.billing.naive import DAY_MS, NaiveLedger, NaiveLine

HORIZON_MS = 2 * DAY_MS
HERE, ELSEWHERE = tenants_in(0, 2, partitions=2), tenants_in(1, 1, partitions=2)
MODELS = ("small", "large")
tenants = st.sampled_from(HERE + ELSEWHERE)
currencies = st.sampled_from(("", "USD", "EUR"))
amounts_pico = st.sampled_from((0, 1, 10**13, 2**64 + 5))
command_numbers = st.integers(0, 40)
pauses_ms = st.sampled_from((0, 1, 2_000, 59_000, 3_600_000, DAY_MS, 3 * DAY_MS))


def tokens_of(line: NaiveLine) -> tuple[int, int]:
    return line.input_tokens, line.output_tokens


class AccountsMachine(RuleBasedStateMachine):
    """Tenants, credit, keys and prices, with enough usage to be charged for."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = NOW_MS
        self.offsets = Counter[str]()
        self.model = NaiveLedger(set(HERE), HORIZON_MS)
        self.state, self.follower = LedgerState(MemorySeenKeys()), LedgerState(MemorySeenKeys())
        self.chain = Chain(0, KEYS.seal_key)
        self.log: list[bytes] = []
        self.totals: dict[bytes, WindowTotal] = {}
        self.generations = 0
        self.last_invoice_hash = b""

    @initialize()
    def begin(self) -> None:
        made = LedgerSettings(partitions=2, dedupe_key=b"k" * 32, dedupe_horizon_ms=HORIZON_MS)
        _, stored = found(made, 0, b"g" * 16, self.now_ms, KEYS.seal_key, "model")
        self.write(stored, self.state)

    def write(self, stored: bytes, *others: LedgerState) -> None:
        """Append to the log; whoever follows it takes it."""
        record = self.chain.accept(stored)
        assert record is not None
        for state in (self.follower, *others):
            replay.apply(state, record, stored)
        self.log.append(stored)
        for total in record.totals:
            name = record.generation + total.key.SerializeToString(deterministic=True)
            self.totals[name] = WindowTotal.FromString(total.SerializeToString())

    def take(self, source: Any) -> StepResult:
        result = step(self.state, source, self.now_ms, keys=KEYS, writer="model")
        self.write(result.stored)
        return result

    def offset(self, topic: str) -> int:
        self.offsets[topic] += 1
        return self.offsets[topic]

    def command(self, number: int, **action: Any) -> bool:
        return self.give(number, **action).applied

    def give(self, number: int, **action: Any) -> CommandApplied:
        command = Command(schema_version=1, command_id=f"c{number}", issued_ms=self.now_ms, **action)
        value = commands.sign(command, KEYS.command_key)
        record = self.take(CommandInput("billing.commands", self.offset("c"), value)).record
        assert record.command.applied == (not record.command.refusal)
        return record.command

    def usage(self, raws: list[bytes]) -> StepResult:
        value = UsageBatch(schema_version=1).SerializeToString() + RawUsageBatch(events=raws).SerializeToString()
        result = self.take(UsageInput("usage.events", self.offset("u"), value))
        applied = result.record.usage
        dropped, costs = self.model.take(raws, self.now_ms)
        assert {each.index: each.reason for each in applied.dropped} == dropped
        high = list(applied.cost_pico_high) or [0] * len(costs)
        stated = [Fraction(low + (top << 64), PICO) for low, top in zip(applied.cost_pico_low, high, strict=True)]
        assert stated == costs
        return result

    def make_event(self, data: st.DataObject, far: bool) -> bytes:
        ended_ms = self.now_ms
        if far:
            ended_ms += data.draw(st.sampled_from((0, 0, -DAY_MS, -3 * DAY_MS, 180_000, 600_000, 2 * DAY_MS)))
        event = usage(
            f"r{data.draw(st.integers(0, 8))}",
            data.draw(tenants),
            model=data.draw(st.sampled_from((*MODELS, "unpriced", "") if far else MODELS)),
            outcome=data.draw(st.sampled_from((OUTCOME_COMPLETED, OUTCOME_CANCELLED, OUTCOME_REJECTED, OUTCOME_BACKEND_ERROR))),
            ended_ms=ended_ms,
            started_ms=ended_ms - 100,
            uncached_input_tokens=data.draw(st.sampled_from((0, 7, 2**40))),
            output_tokens=data.draw(st.sampled_from((1, 2))),
            backfill=far and data.draw(st.booleans()),
        )
        return event.SerializeToString()

    @rule(pause_ms=pauses_ms)
    def time_passes(self, pause_ms: int) -> None:
        self.now_ms += pause_ms
        self.take(TickInput())
        self.model.tick(self.now_ms)
        self.lines_and_open_windows_are_what_each_month_came_to()

    @rule(data=st.data())
    def use_a_little(self, data: st.DataObject) -> None:
        self.usage([self.make_event(data, far=False)])

    @rule(number=command_numbers, tenant_id=tenants, currency=currencies, status=st.sampled_from((0, 3, 4)))
    def upsert_tenant(self, number: int, tenant_id: str, currency: str, status: int) -> None:
        assert {ACCOUNT_STATUS_SUSPENDED, ACCOUNT_STATUS_CLOSED} == {3, 4}
        upsert = TenantUpsert(tenant_id=tenant_id, currency=currency, status=status)  # type: ignore[arg-type]
        expected = self.model.upsert(f"c{number}", self.now_ms, tenant_id, currency, status)
        assert self.command(number, tenant_upsert=upsert) == expected

    @rule(
        number=command_numbers,
        tenant_id=tenants,
        amount_pico=amounts_pico,
        currency=currencies,
        name=st.sampled_from(("", "", "g1", "g2")),
    )
    def grant_credit(self, number: int, tenant_id: str, amount_pico: int, currency: str, name: str) -> None:
        amount = Amount(high=amount_pico >> 64, low=amount_pico & 2**64 - 1)
        credit = Fraction(amount_pico, PICO)
        expected = self.model.grant(f"c{number}", self.now_ms, tenant_id, credit, currency, name or f"c{number}")
        grant = CreditGrant(tenant_id=tenant_id, amount=amount, currency=currency, grant_id=name)
        assert self.command(number, credit_grant=grant) == expected

    @rule(
        number=command_numbers,
        tenant_id=tenants,
        request=st.integers(0, 1),
        pico=st.sampled_from((1, 0, -1, -(2**64))),
        currency=st.sampled_from(("USD", "USD", "EUR")),
    )
    def void(self, number: int, tenant_id: str, request: int, pico: int, currency: str) -> None:
        # And again at once, by another command: an event is corrected once.
        for each in (number, number + 1):
            self.void_once(each, tenant_id, request, pico, currency)

    def void_once(self, number: int, tenant_id: str, request: int, pico: int, currency: str) -> None:
        period = period_at(Calendar(), self.now_ms)
        key = PeriodLineKey(
            tenant_id=tenant_id,
            period_start_ms=period.start_ms,
            period_end_ms=period.end_ms,
            currency=currency,
            adjustment_id=f"c{number}",
        )
        parts = to_line_parts({PartKey("request", "", 0): Sum(-1, pico)})
        said = Adjustment(
            tenant_id=tenant_id,
            kind=ADJUSTMENT_KIND_VOID,
            currency=currency,
            lines=[PeriodLine(key=key, parts=parts, cost=to_amount(pico))],
            corrected_request_ids=[f"r{request}"],
        )
        amount = Fraction(pico, PICO)
        expected = self.model.void(f"c{number}", self.now_ms, tenant_id, f"r{request}", amount, currency)
        assert self.command(number, adjustment=said, issuer="model", reason="a model's") == expected

    # What no invoice took in 400 days is let go.
    @precondition(lambda self: self.now_ms < NOW_MS + 300 * DAY_MS)
    @rule()
    def the_month_ends(self) -> None:
        self.now_ms = month_start_ms(month_of(self.now_ms) + 1)
        self.time_passes(0)

    @rule(number=command_numbers, tenant_id=tenants, months_ago=st.sampled_from((0, 1, 1, 2)), draft=st.booleans())
    def invoice(self, number: int, tenant_id: str, months_ago: int, draft: bool) -> None:
        start_ms = month_start_ms(month_of(self.now_ms) - months_ago)
        said = InvoiceFinalization(
            tenant_id=tenant_id,
            period_start_ms=start_ms,
            draft=draft,
            series_prefix="INV",
            rounding_rule=ROUNDING_RULE_HALF_EVEN,
            currency_decimals=2,
        )
        net = self.model.invoice(f"c{number}", self.now_ms, tenant_id, naive.month_of(start_ms), draft)
        applied = self.give(number, invoice_finalization=said)
        assert applied.applied == (net is not None)
        if net is None:
            return
        invoice = Invoice.FromString(applied.invoice)
        assert invoice_problems(invoice) == []
        assert from_amount(invoice.net_exact) == net * PICO
        if not draft:
            assert (invoice.number, invoice.previous_hash) == (self.model.invoices, self.last_invoice_hash)
            self.last_invoice_hash = hashlib.sha256(applied.invoice).digest()

    @rule(
        number=command_numbers,
        tenant_id=tenants,
        key_id=st.sampled_from(("k1", "k2")),
        secret_hash=st.sampled_from((b"a" * 32, b"b" * 32, b"secret")),
        revoked=st.booleans(),
    )
    def upsert_key(self, number: int, tenant_id: str, key_id: str, secret_hash: bytes, revoked: bool) -> None:
        key = ApiKey(key_id=key_id, tenant_id=tenant_id, secret_hash=secret_hash, revoked=revoked)
        expected = self.model.key(f"c{number}", self.now_ms, tenant_id, key_id, secret_hash, revoked)
        assert self.command(number, key_upsert=KeyUpsert(key=key)) == expected

    @rule(
        number=command_numbers,
        currency=st.sampled_from(("USD", "EUR")),
        skip=st.sampled_from((0, 0, 0, 1)),
        ahead_ms=st.sampled_from((-3 * DAY_MS, 0, 1_000, DAY_MS)),
        micros=st.integers(1, 10**7),
    )
    def take_book(self, number: int, currency: str, skip: int, ahead_ms: int, micros: int) -> None:
        version, since_ms = len(self.model.books[currency]) + 1 + skip, self.now_ms + ahead_ms
        # Micros for a million units are picos for one.
        prices = [Price(model=model, uncached_input_pico=micros, output_pico=3 * micros) for model in MODELS]
        book = PriceBook(version=version, currency=currency, effective_ms=since_ms, prices=prices)
        of_million = Fraction(micros, 10**6), Fraction(3 * micros, 10**6)
        expected = self.model.book(f"c{number}", self.now_ms, currency, version, since_ms, dict.fromkeys(MODELS, of_million))
        assert self.command(number, price_book=book) == expected

    @rule(number=command_numbers)
    def forge(self, number: int) -> None:
        grant = CreditGrant(tenant_id=HERE[0], amount=Amount(low=10**15), currency="USD")
        value = commands.sign(Command(schema_version=1, command_id=f"c{number}", credit_grant=grant), b"x" * 32)
        record = self.take(CommandInput("billing.commands", self.offset("c"), value)).record
        assert not record.command.applied
        assert ALERT_RULE_UNSIGNED_COMMAND in [alert.rule for alert in self.state.alerts.all()]

    @invariant()
    def accounts_are_the_models(self) -> None:
        held: dict[str, tuple[object, ...]] = {
            name: (a.currency, a.status, a.credit_pico, a.spend_pico, a.events, a.duplicates, a.conflicts, a.unrated_events)
            for name, a in self.state.accounts.items()
        }
        assert held == {
            name: (a.currency, a.status, a.credit * PICO, a.spend * PICO, a.events, a.duplicates, a.conflicts, a.unrated)
            for name, a in self.model.accounts.items()
        }
        keys = {(key.tenant_id, key.key_id): (key.secret_hash, key.revoked) for key in self.state.keys.values()}
        assert keys == {(name, key_id): key for name, a in self.model.accounts.items() for key_id, key in a.keys.items()}

    @invariant()
    def totals_are_the_sum_of_what_was_charged(self) -> None:
        summed: dict[str, list[int]] = {}
        for total in self.totals.values():
            sums = summed.setdefault(total.key.tenant_id, [0] * 5)
            cost_pico = total.cost.high * 2**64 + total.cost.low
            parts = (total.events, total.unrated_events, total.uncached_input_tokens, total.output_tokens, cost_pico)
            summed[total.key.tenant_id] = [have + more for have, more in zip(sums, parts, strict=True)]
        assert summed == {
            name: [a.events, a.unrated, a.input_tokens, a.output_tokens, (a.spend - a.adjusted - a.returned) * PICO]
            for name, a in self.model.accounts.items()
            if a.events
        }

    def lines_and_open_windows_are_what_each_month_came_to(self) -> None:
        summed: dict[tuple[str, ...], list[int]] = {}

        def add(name: tuple[object, ...], start_ms: int, *values: int) -> None:
            tenant_id, *rest = map(str, name)
            sums = summed.setdefault((tenant_id, naive.month_of(start_ms), *rest), [0] * len(values))
            sums[:] = [have + more for have, more in zip(sums, values, strict=True)]

        adjusted: Counter[str] = Counter()
        for line in self.state.lines:
            key = line.key
            if key.adjustment_id:
                adjusted[key.tenant_id] += line.cost_pico
                continue
            tokens = [
                sum(part.units for name, part in line.parts.items() if name.quantity_of == quantity)
                for quantity in ("uncached_input_tokens", "output_tokens")
            ]
            assert all(name.unit_pico * part.units == part.amount_pico for name, part in line.parts.items())
            where = (key.tenant_id, key.currency, key.project_id, key.model, key.price_version)
            counts = (line.events, line.refused_events, line.unrated_events)
            add(where, key.period.start_ms, *counts, line.cost_pico, *tokens)
        for window in self.state.windows.values():
            place = window.key
            where = (place.tenant_id, window.currency, place.project_id, place.model, place.price_version)
            # Of a window without a price its tokens are known; a line states what was charged.
            tokens = [window.tokens[0], window.tokens[1]] if place.price_version else [0, 0]
            counts = (window.events, window.refused_events, window.unrated_events)
            add(where, place.minute * 60_000, *counts, window.cost_pico, *tokens)
        assert summed == {
            tuple(map(str, name)): [each.events, each.refused, each.unrated, each.cost * PICO, *tokens_of(each)]
            for name, each in self.model.lines.items()
        }
        for name, account in self.model.accounts.items():
            open_adjustments = sum(amount for (whose, _), amount in self.model.adjustments.items() if whose == name)
            assert adjusted[name] == open_adjustments * PICO
            usage_left = sum(line.cost for place, line in self.model.lines.items() if place[0] == name)
            assert account.spend - account.returned == account.invoiced + usage_left + open_adjustments

    @invariant()
    def who_follows_is_where_the_writer_is(self) -> None:
        assert self.follower.digest() == self.state.digest()

    def teardown(self) -> None:
        if not self.log:
            return
        self.lines_and_open_windows_are_what_each_month_came_to()
        state, chain = LedgerState(MemorySeenKeys()), Chain(0, KEYS.seal_key)
        for stored in self.log:
            record = chain.accept(stored)
            assert record is not None
            replay.apply(state, record, stored)
        assert state.digest() == self.state.digest()
        # Every charge is of another request, or came after its memory was over.
        assert sum(map(len, self.model.charged.values())) == sum(a.events for a in self.state.accounts.values())


class LedgerMachine(AccountsMachine):
    """Batches of anything: repeats, conflicts, wrong partitions, far times, nonsense; and a log that is founded again."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    @rule(data=st.data(), count=st.integers(1, 8))
    def use(self, data: st.DataObject, count: int) -> None:
        raws = [self.make_event(data, far=True) for _ in range(count)]
        self.sent += raws
        result = self.usage(raws)
        sent_on = [raw for forward in result.forwards for raw in RawUsageBatch.FromString(forward.value).events]
        assert {forward.partition for forward in result.forwards} <= {1}
        assert len(sent_on) == len({each.index for each in result.record.usage.dropped if each.reason == 6})

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), count=st.integers(1, 12))
    def send_again(self, data: st.DataObject, count: int) -> None:
        self.usage([data.draw(st.sampled_from(self.sent)) for _ in range(count)])

    @rule(value=st.sampled_from((b"\xff" * 9, UsageBatch(schema_version=9).SerializeToString(), b"")))
    def send_nonsense(self, value: bytes) -> None:
        record = self.take(UsageInput("usage.events", self.offset("u"), value)).record
        assert record.rejected.reason
        assert not record.accounts
        assert not record.totals

    @rule()
    def the_broker_forgets(self) -> None:
        """A new generation carries on; offsets begin again, and nothing that was remembered is lost."""
        self.generations += 1
        generation = bytes((self.generations,)) * 16
        _, stored = found_again(self.state, generation, self.now_ms, KEYS.seal_key, "model")
        self.write(stored, self.state)
        self.offsets.clear()


_SETTINGS = settings(
    max_examples=int(os.environ.get("MODEL_EXAMPLES", "12")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
AccountsMachine.TestCase.settings = LedgerMachine.TestCase.settings = _SETTINGS
TestAccountsModel = AccountsMachine.TestCase
TestLedgerModel = LedgerMachine.TestCase
