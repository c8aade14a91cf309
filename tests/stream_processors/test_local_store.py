"""The local store holds exactly the state after the record that it names, and keeps what the sink has not confirmed."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import pytest

from billing import period_lines, replay
from billing.commands import lease_key, sign
from billing.founding import LedgerSettings, found, found_again
from billing.state import DAY_MS, LedgerState, MemorySeenKeys
from billing.step import CommandInput, Input, LedgerKeys, TickInput, UsageInput, step
from billing.v1.command_pb2 import Command, InvoiceFinalization, LeaseRequest, PriceBook, RulesChange, TenantUpsert
from billing.v1.invoice_pb2 import ROUNDING_RULE_HALF_UP
from billing.v1.usage_pb2 import UsageBatch
from stream_processors import local_store
from stream_processors.errors import LocalStoreError
from stream_processors.known_fields import known_fields, unpack_fields
from stream_processors.local_store import Acknowledged, LocalStore
from tests.billing.ledgers import KEYS as LEDGER_KEYS
from tests.billing.ledgers import NOW_MS as LEDGER_NOW_MS
from tests.billing.ledgers import Ledger, batch, tenants_in, usage
from tests.stream_processors.harness import event

KEYS = LedgerKeys(b"s" * 32, b"c" * 32)
SETTINGS = LedgerSettings(partitions=1, dedupe_key=b"d" * 32)
NOW_MS = time.time_ns() // 1_000_000

# A tenant, and three starts of a gateway: the first is over and waits for usage, the second is gone, the third lasts.
_TENANT = TenantUpsert(tenant_id="tenant-1")
_COMMANDS = [
    sign(
        Command(schema_version=1, command_id="t", issued_ms=NOW_MS, tenant_upsert=TenantUpsert(tenant_id="tenant-1")),
        KEYS.command_key,
    ),
    *(
        sign(
            Command(
                schema_version=1,
                command_id="unremembered",
                issued_ms=NOW_MS,
                lease_request=LeaseRequest(
                    tenant_id="tenant-1",
                    holder_id="p",
                    epoch=epoch,
                    request_number=1,
                    duration_ms=1_000,
                    previous_sequence=last_sequence,
                ),
            ),
            lease_key(KEYS.command_key),
        )
        for epoch, last_sequence in ((1, 0), (2, 10**6), (3, 0))
    ),
]


def _written(store: LocalStore, batches: int) -> LedgerState:
    state = LedgerState(store.seen)
    record, stored = found(SETTINGS, 0, b"g" * 16, NOW_MS, KEYS.seal_key, "test")
    replay.apply(state, record, stored)
    store.apply([Acknowledged(record, stored, 0)])
    for number, command in enumerate(_COMMANDS):
        result = step(state, CommandInput("billing.commands", number, command), NOW_MS, keys=KEYS, writer="test")
        assert result.record.command.applied, result.record.command.refusal
        store.apply([Acknowledged(result.record, result.stored, 0)])
    for number in range(batches):
        batch = UsageBatch(
            schema_version=1,
            producer_id="p",
            first_sequence=number * 10 + 1,
            highest_sequence=number * 10 + 10,
            events=[event(f"tenant-{i}") for i in range(10)],
        )
        source = UsageInput("usage.events", number, batch.SerializeToString())
        result = step(state, source, NOW_MS + number, keys=KEYS, writer="test")
        store.apply([Acknowledged(result.record, result.stored, number + 1)])
    return state


def test_what_is_loaded_has_the_digest_of_what_was_applied(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, 0)
    assert store.load() is None
    state = _written(store, 5)
    assert state.leases.asked["p"][:2] == (3, 1)
    for moment_ms in (NOW_MS + 3_600_000, NOW_MS + 2 * DAY_MS, NOW_MS + 40 * DAY_MS):
        store.close()
        store = LocalStore(tmp_path, 0)
        loaded = store.load()
        assert loaded is not None
        assert loaded.digest() == state.digest()
        state = loaded
        result = step(state, TickInput(), moment_ms, keys=KEYS, writer="test")
        store.apply([Acknowledged(result.record, result.stored, 9)])
    assert state.windows == {}, "let go after an hour"
    assert store.seen.recent_keys == 0, "expired after 40 days"
    assert state.leases.asked == {}
    store.close()


def test_unconfirmed_records_are_kept_until_the_sink_has_them(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, 0, keep_unconfirmed=True)
    _written(store, 5)
    kept = list(store.unconfirmed_records(-1))
    assert len(kept) == 6 + len(_COMMANDS)
    assert sum(map(len, kept)) == store.unconfirmed_bytes
    assert list(store.unconfirmed_records(3)) == kept[4:]
    store.trim_unconfirmed(3)
    assert list(store.unconfirmed_records(-1)) == kept[4:]
    store.close()
    store = LocalStore(tmp_path, 0, keep_unconfirmed=True)
    assert sum(map(len, kept[4:])) == store.unconfirmed_bytes
    store.close()


def test_a_new_generation_carries_on_and_still_knows_what_was_charged(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, 0)
    state = _written(store, 3)
    known = event("tenant-1", "charged-before")
    batch = UsageBatch(schema_version=1, events=[known]).SerializeToString()
    result = step(state, UsageInput("usage.events", 10, batch), NOW_MS, keys=KEYS, writer="test")
    store.apply([Acknowledged(result.record, result.stored, 4)])
    record, stored = found_again(state, b"h" * 16, NOW_MS, KEYS.seal_key, "test")
    replay.apply(state, record, stored)
    store.apply([Acknowledged(record, stored, 0)])
    store.close()
    store = LocalStore(tmp_path, 0)
    loaded = store.load()
    assert loaded is not None
    assert loaded.digest() == state.digest()
    result = step(loaded, UsageInput("usage.events", 0, batch), NOW_MS, keys=KEYS, writer="test")
    assert result.record.usage.duplicates == 1
    store.close()


def rules_set(offset: int, change: RulesChange, issued_ms: int = NOW_MS) -> CommandInput:
    """A command that changes the ledger's figures of rules."""
    command = Command(schema_version=1, command_id=f"rules-{offset}", issued_ms=issued_ms, rules_change=change)
    return CommandInput("billing.commands", offset, sign(command, KEYS.command_key))


def test_one_call_for_many_records_leaves_what_a_call_for_each_leaves(tmp_path: Path) -> None:
    """Windows touched again and let go, a command that is forgotten, a ledger founded again: all within one call."""
    state = LedgerState(MemorySeenKeys())
    record, stored = found(SETTINGS, 0, b"g" * 16, NOW_MS, KEYS.seal_key, "test")
    replay.apply(state, record, stored)
    records = [Acknowledged(record, stored, 0)]

    def take(source: Input, moment_ms: int) -> None:
        result = step(state, source, moment_ms, keys=KEYS, writer="test")
        records.append(Acknowledged(result.record, result.stored, len(records)))

    book = PriceBook(version=1, currency="USD", effective_ms=1)
    book.prices.add(model="*", uncached_input_pico=150_000, output_pico=600_000)
    command = Command(schema_version=1, command_id="book", issued_ms=NOW_MS, issuer="test", price_book=book)
    take(CommandInput("billing.commands", 0, sign(command, KEYS.command_key)), NOW_MS)
    take(rules_set(1, RulesChange(burst_factor=3)), NOW_MS)
    for offset, signed in enumerate(_COMMANDS, start=2):
        take(CommandInput("billing.commands", offset, signed), NOW_MS)
    for number in range(6):
        batch = UsageBatch(schema_version=1, events=[event(f"tenant-{i}", f"{number}-{i}") for i in range(4)])
        take(UsageInput("usage.events", number, batch.SerializeToString()), NOW_MS + number)
    take(TickInput(), NOW_MS + DAY_MS)
    assert state.windows == {}
    assert state.commands
    assert state.leases.asked
    middle = state.digest(), list(records)
    known = UsageBatch(schema_version=1, events=[event("tenant-1", "charged-before")]).SerializeToString()
    take(UsageInput("usage.events", 6, known), NOW_MS + DAY_MS)
    take(TickInput(), NOW_MS + 37 * DAY_MS)
    assert state.commands == {}
    assert state.leases.asked == {}
    late = event("tenant-2", "late")
    late.started_ms = late.ended_ms = NOW_MS + 37 * DAY_MS
    recent = UsageBatch(schema_version=1, events=[late]).SerializeToString()
    take(UsageInput("usage.events", 7, recent), NOW_MS + 37 * DAY_MS)
    assert state.windows
    record, stored = found_again(state, b"h" * 16, NOW_MS + 37 * DAY_MS, KEYS.seal_key, "test")
    replay.apply(state, record, stored)
    records.append(Acknowledged(record, stored, 0))
    take(rules_set(0, RulesChange(drift_millionths=5), NOW_MS + 37 * DAY_MS), NOW_MS + 37 * DAY_MS)
    take(UsageInput("usage.events", 0, recent), NOW_MS + 37 * DAY_MS)
    assert records[-1].record.usage.duplicates == 1
    assert (state.settings.default_plan.burst_factor, state.settings.drift_millionths) == (3, 5)

    store = LocalStore(tmp_path / "middle", 0)
    store.apply(middle[1])
    store.close()
    store = LocalStore(tmp_path / "middle", 0)
    loaded = store.load()
    assert loaded is not None
    assert loaded.digest() == middle[0]
    store.close()
    for name, groups in (("each", [[one] for one in records]), ("all", [records])):
        store = LocalStore(tmp_path / name, 0, keep_unconfirmed=True)
        for group in groups:
            store.apply(group)
        kept = list(store.unconfirmed_records(-1))
        assert kept == [one.stored for one in records[-3:]], "those of this generation"
        assert store.unconfirmed_bytes == sum(map(len, kept))
        store.close()
        store = LocalStore(tmp_path / name, 0, keep_unconfirmed=True)
        loaded = store.load()
        assert loaded is not None
        assert loaded.digest() == state.digest()
        again = step(loaded, UsageInput("usage.events", 1, recent), NOW_MS + 37 * DAY_MS, keys=KEYS, writer="test")
        assert again.record.usage.duplicates == 1
        store.close()


def test_two_processes_cannot_share_a_store_and_another_format_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, 0)
    with pytest.raises(LocalStoreError, match="give each its own"):
        LocalStore(tmp_path, 0)
    store._db[b"v"] = b"99"
    store.close()
    with pytest.raises(LocalStoreError, match="format"):
        LocalStore(tmp_path, 0)


def test_a_store_that_a_newer_version_wrote_is_refused_and_one_that_it_only_opened_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version would load the state without what it does not know, and state it without from then on."""
    ledger = Ledger()
    ledger.usage(batch([usage("r1", tenants_in(1)[0])]))
    applied = [
        Acknowledged(record, stored, number)
        for number, (record, stored) in enumerate(zip(ledger.records(), ledger.stored, strict=True))
    ]
    store = LocalStore(tmp_path, 1)
    store.apply(applied[:1])
    store.close()
    newer = zlib.compress("\n".join([*known_fields(), "billing.v1.LedgerRecord.90"]).encode())
    with monkeypatch.context() as patched:
        for name, value in (("packed_fields", newer), ("known_fields", unpack_fields(newer))):
            patched.setattr(local_store, name, lambda value=value: value)
        LocalStore(tmp_path, 1).close()
    LocalStore(tmp_path, 1).close()
    with monkeypatch.context() as patched:
        for name, value in (("packed_fields", newer), ("known_fields", unpack_fields(newer))):
            patched.setattr(local_store, name, lambda value=value: value)
        store = LocalStore(tmp_path, 1)
        store.apply(applied[1:])
        store.close()
        LocalStore(tmp_path, 1).close()
    with pytest.raises(LocalStoreError, match=r"newer version wrote it, this one does not know billing\.v1\.LedgerRecord\.90"):
        LocalStore(tmp_path, 1)


def test_lines_and_series_of_invoices_are_loaded_as_they_were(tmp_path: Path) -> None:
    """Windows that were let go, one month invoiced, one not; and the log founded again."""
    ledger = Ledger()
    ledger.price()
    [one, two, _] = tenants_in(1)
    ledger.tenant(one)
    december_ms = 1_764_547_200_000
    for number, tenant_id in enumerate((one, two)):
        ledger.usage(batch([usage(f"r{number}", tenant_id)]))
    ledger.tick(LEDGER_NOW_MS + 3_600_000)
    said = InvoiceFinalization(
        tenant_id=one, period_start_ms=1_761_955_200_000, series_prefix="INV", rounding_rule=ROUNDING_RULE_HALF_UP
    )
    ledger.usage(batch([usage("open", one, started_ms=december_ms, ended_ms=december_ms)]), december_ms)
    drawn = ledger.command(log_time_ms=december_ms, invoice_finalization=said)
    assert drawn.record.command.applied, drawn.record.command.refusal
    assert len(drawn.record.invoiced) == len(drawn.record.invoice_series) == 1
    _, stored = found_again(ledger.state, b"h" * 16, december_ms, LEDGER_KEYS.seal_key, "test")
    for founded_again in (False, True):
        if founded_again:
            ledger.stored.append(stored)
        folder = tmp_path / str(founded_again)
        store = LocalStore(folder, 1)
        store.apply([Acknowledged(record, each, 0) for record, each in zip(ledger.records(), ledger.stored, strict=True)])
        store.close()
        again = LocalStore(folder, 1)
        loaded = again.load()
        assert loaded is not None
        assert loaded.digest(with_memory=False) == ledger.replayed().digest(with_memory=False)
        assert len(list(loaded.lines)) == 1 + founded_again
        assert loaded.series["INV-0001"].number == 1
        again.close()


def test_what_came_late_for_an_invoiced_month_waits_on_disk_too(tmp_path: Path) -> None:
    """The ledger keeps it for the next invoice, however long: a restart knows what was never on an invoice."""
    ledger = Ledger()
    ledger.price()
    [invoiced, never, _] = tenants_in(1)
    ledger.tenant(invoiced)
    ledger.usage(batch([usage("r1", invoiced)]))
    november_ms, december_ms = 1_761_955_200_000, 1_764_547_200_000
    said = InvoiceFinalization(
        tenant_id=invoiced, period_start_ms=november_ms, series_prefix="INV", rounding_rule=ROUNDING_RULE_HALF_UP
    )
    assert ledger.command(log_time_ms=december_ms, invoice_finalization=said).record.command.applied
    late_ms = december_ms + period_lines.KEPT_MS + DAY_MS
    ledger.usage(batch([usage("late", invoiced, backfill=True), usage("other", never, backfill=True)]), late_ms)
    ledger.tick(late_ms + 3_600_000)
    ledger.tick(late_ms + 2 * DAY_MS)
    [line] = ledger.state.lines
    assert (line.key.tenant_id, line.events) == (invoiced, 1)
    applied = [Acknowledged(record, stored, 0) for record, stored in zip(ledger.records(), ledger.stored, strict=True)]
    for name, groups in (("each", [[one] for one in applied]), ("all", [applied])):
        store = LocalStore(tmp_path / name, 1)
        for group in groups:
            store.apply(group)
        loaded = store.load()
        assert loaded is not None
        assert loaded.digest(with_memory=False) == ledger.state.digest(with_memory=False)
        store.close()
