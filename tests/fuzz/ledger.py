"""Targets around the ledger: whatever comes on its topics, the step gives a record that every reader can take.

An input is a script: usage, commands (signed here, or as they come) and time. Of each record it holds that it is within its
bound, links, is replayed to the same state, and becomes rows and messages. Of bytes on the ledger's topic: a reader takes
the true next record and nothing else.
"""

from __future__ import annotations

import contextlib
import hmac
from functools import cache

from google.protobuf.message import DecodeError

from billing import replay
from billing.amounts import to_amount
from billing.chain import Chain, UnreadableRecord
from billing.founding import LedgerSettings, found
from billing.limits import RECORD_BYTES_MAX
from billing.line_parts import PartKey, Sum, to_line_parts
from billing.periods import month_of, month_start_ms, period_at
from billing.state import DAY_MS, LedgerState, MemorySeenKeys
from billing.step import CommandInput, Input, TickInput, UsageInput, step
from billing.v1.account_pb2 import AccountUpdate, Amount, ApiKey, Calendar, Plan
from billing.v1.command_pb2 import (
    ADJUSTMENT_KIND_VOID,
    Adjustment,
    Command,
    CreditGrant,
    InvoiceFinalization,
    KeyUpsert,
    PriceBook,
    SignedCommand,
    TenantUpsert,
    UserErasure,
)
from billing.v1.invoice_pb2 import ROUNDING_RULE_HALF_UP, PeriodLine, PeriodLineKey, TaxRate
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import OUTCOME_REJECTED, UnitQuantity
from serving.gateway.directory import Directory
from sinks.columns import Accepted, build_columns
from stream_processors.publisher_app import Batch, messages_of
from stream_processors.settings import TopicNames
from tests.billing.ledgers import COMMAND_KEY, KEYS, NOW_MS, PRICES, batch, tenants_in, usage
from tests.fuzz.target import Reader, Target

__all__ = ["TARGETS"]

SETTINGS = LedgerSettings(partitions=2, dedupe_key=b"k" * 32)
HERE = tenants_in(0, 1, partitions=2)[0]
THERE = tenants_in(1, 1, partitions=2)[0]
USAGE, COMMAND, SIGNED, TICK = range(4)
_INPUTS_MAX = 12
_TOPICS = TopicNames()


@cache
def _founding() -> tuple[LedgerRecord, bytes]:
    return found(SETTINGS, 0, b"g" * 16, NOW_MS - 1_000, KEYS.seal_key, "fuzz")


def _input(kind: int, offset: int, piece: bytes) -> Input:
    if kind == USAGE:
        return UsageInput("usage.events", offset, piece)
    if kind == COMMAND:
        piece = SignedCommand(command=piece, signature=hmac.digest(COMMAND_KEY, piece, "sha256")).SerializeToString()
    return TickInput() if kind == TICK else CommandInput("billing.commands", offset, piece)


def run_script(data: bytes) -> list[bytes]:
    """Step over the script; check every record. Returns the stored bytes."""
    record, stored = _founding()
    state, follower = LedgerState(MemorySeenKeys()), LedgerState(MemorySeenKeys())
    follow = Chain(0, KEYS.seal_key)
    assert follow.accept(stored) is not None
    for each in (state, follower):
        replay.apply(each, record, stored)
    log, now_ms, reader = [stored], NOW_MS, Reader(data)
    for offset in range(_INPUTS_MAX):
        if not reader.more:
            break
        kind = reader.number() % 4
        # From a quarter of a millisecond to half a year.
        now_ms += reader.number() ** 4 // 4
        result = step(state, _input(kind, offset, reader.piece()), now_ms, keys=KEYS, writer="fuzz")
        assert len(result.stored) <= RECORD_BYTES_MAX
        for forward in result.forwards:
            assert forward.partition == 1
        accepted = follow.accept(result.stored)
        assert accepted is not None
        replay.apply(follower, accepted, result.stored)
        log.append(result.stored)
        build_columns([Accepted(accepted, result.stored, follow.record_hash, 1)], "usage.events")
        messages_of(accepted, _TOPICS, Batch())
    assert state.digest() == follower.digest()
    seen, followed = state.seen, follower.seen
    assert isinstance(seen, MemorySeenKeys)
    assert isinstance(followed, MemorySeenKeys)
    assert {day: keys for day, keys in seen.days.items() if keys} == {day: keys for day, keys in followed.days.items() if keys}
    return log


def _commands() -> list[Command]:
    book = PriceBook(version=1, currency="USD", effective_ms=0, prices=PRICES)
    key = ApiKey(key_id="key", tenant_id=HERE, secret_hash=b"h" * 32)
    actions: list[dict[str, object]] = [
        {"price_book": book},
        {"tenant_upsert": TenantUpsert(tenant_id=HERE, currency="USD", plan=Plan(plan_id="p", prompt_tokens_max=50))},
        {"credit_grant": CreditGrant(tenant_id=HERE, amount=Amount(low=10**12), currency="USD")},
        {"key_upsert": KeyUpsert(key=key)},
        {"user_erasure": UserErasure(tenant_id=HERE, user_digest=b"d" * 32, pseudonym=f"erased-{0:032x}", key_ids=["key"])},
        {
            "credit_grant": CreditGrant(
                tenant_id=HERE, amount=Amount(low=10**6), currency="USD", priority=1, expires_ms=NOW_MS + 1
            )
        },
    ]
    return [Command(schema_version=1, command_id=f"c{i}", issued_ms=NOW_MS, **action) for i, action in enumerate(actions)]  # type: ignore[arg-type]


def _invoice(command_id: str, draft: bool) -> bytes:
    said = InvoiceFinalization(
        tenant_id=HERE,
        period_start_ms=month_start_ms(month_of(NOW_MS)),
        draft=draft,
        series_prefix="INV",
        rounding_rule=ROUNDING_RULE_HALF_UP,
        currency_decimals=2,
        taxes=[TaxRate(name="VAT", rate_millionths=190_000)],
    )
    return Command(schema_version=1, command_id=command_id, issued_ms=NOW_MS, invoice_finalization=said).SerializeToString()


def _adjustment(command_id: str, request_id: str) -> bytes:
    """Void a request that was charged a thousand tokens' worth."""
    period = period_at(Calendar(), NOW_MS)
    key = PeriodLineKey(
        tenant_id=HERE,
        period_start_ms=period.start_ms,
        period_end_ms=period.end_ms,
        currency="USD",
        model="smollm2",
        price_version=1,
        adjustment_id=command_id,
    )
    parts = to_line_parts({PartKey("uncached_input_tokens", "", 10_000): Sum(-100, -(10**6))})
    said = Adjustment(
        tenant_id=HERE,
        kind=ADJUSTMENT_KIND_VOID,
        currency="USD",
        lines=[PeriodLine(key=key, parts=parts, cost=to_amount(-(10**6)))],
        corrected_request_ids=[request_id],
    )
    command = Command(
        schema_version=1, command_id=command_id, issued_ms=NOW_MS, issuer="ann", reason="counted twice", adjustment=said
    )
    return command.SerializeToString()


def _scripts() -> list[bytes]:
    said = [command.SerializeToString() for command in _commands()]
    plain = batch([usage("r1", HERE), usage("r2", HERE, output_tokens=7)], producer_id="p", first=1, highest=2)
    odd = batch(
        [
            usage("r1", HERE),
            usage("r2", HERE, output_tokens=8),
            usage("r3", THERE),
            usage("r4", HERE, started_ms=1, ended_ms=NOW_MS - 36 * DAY_MS),
            usage("r5", HERE, ended_ms=NOW_MS + 2 * DAY_MS),
            usage("r6", HERE, outcome=OUTCOME_REJECTED, model="other"),
            usage("r7", HERE, units=[UnitQuantity(unit="characters", quantity=9)], attributes={"a": "b"}),
            usage("", HERE),
        ]
    )
    voids = [_adjustment("v1", "r1"), _adjustment("v2", "r1"), _adjustment("v3", "r2")]
    signed = SignedCommand(command=said[2], signature=hmac.digest(COMMAND_KEY, said[2], "sha256")).SerializeToString()
    setup = Reader.join(*(part for command in said for part in (COMMAND, 0, command)))
    return [
        setup + Reader.join(USAGE, 1, plain, USAGE, 2, odd, USAGE, 0, plain),
        setup + Reader.join(SIGNED, 0, signed, SIGNED, 0, signed[:-1], TICK, 255, b"", USAGE, 0, plain, TICK, 80, b""),
        Reader.join(USAGE, 0, b"", USAGE, 0, odd, TICK, 200, b"", USAGE, 0, odd),
        # The month is over after a tick of eight days.
        setup + Reader.join(USAGE, 0, plain, COMMAND, 0, _invoice("d", True), TICK, 230, b"", COMMAND, 0, _invoice("f", False)),
        # Corrections before the month is over and after it was invoiced.
        Reader.join(COMMAND, 0, said[0], COMMAND, 0, said[1], USAGE, 0, plain, COMMAND, 0, voids[0], COMMAND, 0, voids[1])
        + Reader.join(TICK, 230, b"", COMMAND, 0, _invoice("f", False), COMMAND, 0, voids[2]),
    ]


# --- bytes on the ledger's topic ---


@cache
def _log() -> tuple[bytes, ...]:
    return tuple(run_script(_scripts()[0]))


def read_record(data: bytes) -> None:
    """A reader that stands before the last record is handed `data`; so is one that was not given the seal's key."""
    *before, last = _log()
    for seal_key in (KEYS.seal_key, None):
        chain = Chain(0, seal_key)
        for stored in before:
            assert chain.accept(stored) is not None
        with contextlib.suppress(UnreadableRecord):
            record = chain.accept(data)
            assert record is None or seal_key is None or data == last


# --- bytes on the topics that gateways follow ---


def follow_accounts(data: bytes) -> None:
    directory, reader = Directory(2), Reader(data)
    while reader.more:
        take = (directory.on_account, directory.on_key)[reader.number() % 2]
        take(b"key", reader.piece(), 0)
    directory.find_key(b"h" * 32)
    directory.find_account(HERE)
    directory.log_time_ms(HERE)


def _followed() -> list[bytes]:
    records = [LedgerRecord.FromString(stored) for stored in _log()]
    messages: list[int | bytes] = []
    for record in records:
        for account in record.accounts:
            messages += (0, AccountUpdate(account=account).SerializeToString())
        for key in record.keys:
            messages += (1, key.SerializeToString())
    return [Reader.join(*messages), Reader.join(0, b"", 1, b"")]


TARGETS = {
    "ledger-step": Target(run_script, _scripts, mutations=500),
    "ledger-record": Target(read_record, lambda: list(_log()[-2:]), mutations=500),
    "followed-accounts": Target(follow_accounts, _followed, (DecodeError,), mutations=500),
}
