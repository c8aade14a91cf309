"""Applying a record that was written before: a replay sets what the record states, it never computes it again.

After `apply` the state has the same digest as the one that the step left when it wrote the record.
"""

from __future__ import annotations

from billing import chain
from billing.accounts import AccountState
from billing.commands import remembered_id
from billing.identity import DEDUPE_KEY_BYTES, FINGERPRINT_BYTES
from billing.leases import LeaseState
from billing.ledger_rules import with_rules
from billing.period_lines import line_key_of
from billing.prices import PriceBooks
from billing.sequences import ProducerSequences
from billing.state import Corrected, LedgerState, SeriesHead
from billing.v1.command_pb2 import Command
from billing.v1.ledger_pb2 import LedgerRecord, RememberedKeys
from billing.windows import Window, key_of

_ENTRY_BYTES = DEDUPE_KEY_BYTES + FINGERPRINT_BYTES


def split_entries(entries: bytes) -> tuple[list[bytes], list[bytes]]:
    """The digests and the fingerprints of RememberedKeys.entries."""
    starts = range(0, len(entries), _ENTRY_BYTES)
    return (
        [entries[start : start + DEDUPE_KEY_BYTES] for start in starts],
        [entries[start + DEDUPE_KEY_BYTES : start + _ENTRY_BYTES] for start in starts],
    )


def remember(state: LedgerState, remembered: RememberedKeys) -> None:
    """Put one day's keys of a record into the dedupe memory."""
    digests, fingerprints = split_entries(remembered.entries)
    state.seen.remember(remembered.expires_day, digests, fingerprints)


def apply(state: LedgerState, record: LedgerRecord, stored: bytes) -> None:
    """Bring `state` to what it was after `record` was written. The caller has accepted `record` by a Chain."""
    source = record.WhichOneof("source")
    if source == "founding":
        _found(state, record)
    elif source == "usage":
        for remembered in record.usage.remembered:
            remember(state, remembered)
    elif source == "command" and record.command.applied:
        if record.command.HasField("price_book"):
            state.books.add(record.command.price_book)
        if record.command.HasField("rules"):
            state.settings = with_rules(state.settings, record.command.rules)
        command = Command.FromString(record.command.command)
        command_id = remembered_id(command)
        if command_id:
            state.commands[command_id] = command.issued_ms
        if command.WhichOneof("action") == "lease_request":
            state.leases.note(command.lease_request, record.log_time_ms)
    elif source == "tick" and record.tick.expired_through_day > state.expired_through_day:
        state.expired_through_day = record.tick.expired_through_day
        state.seen.expire(state.expired_through_day)
        state.forget(record.log_time_ms)
    for account in record.accounts:
        state.accounts[account.tenant_id] = AccountState.from_account(account)
    for lease in record.leases:
        state.leases.put(LeaseState.from_lease(lease))
    for quantities in record.quantities:
        state.quantities.set(quantities)
    for credit in record.credits:
        state.credits.set(credit)
    for line in record.lines:
        state.lines.set(line)
    state.lines.remove(map(line_key_of, record.invoiced))
    for series in record.invoice_series:
        state.series[series.series] = SeriesHead(series.number, series.head_hash)
    for budget in record.budgets:
        state.budgets.set(budget)
    for alert in record.alerts:
        state.alerts.set(alert)
    for alert in record.alert_states:
        state.alerts.set(alert)
    for places in record.key_places:
        state.places.set(places)
    for project in record.projects:
        state.projects.setdefault(project.tenant_id, {})[project.project_id] = project
    for entry in record.corrected:
        state.corrected[entry.key] = Corrected(entry.adjustment_id, entry.corrected_ms)
    for key in record.keys:
        state.keys[key.key_id] = key
    for mark in record.producers:
        state.producers[mark.producer_id] = ProducerSequences.from_mark(mark)
    for registration in record.registrations:
        state.registrations.set(registration)
    for total in record.totals:
        window_key = key_of(total.key)
        window = Window.from_total(total)
        before = state.windows.get(window_key)
        # Where it already waits to be let go, so that the index of open windows stays one entry a window.
        window.release_minute = before.release_minute if before else 0
        state.windows[window_key] = window
        state.touch_window(window, record.log_time_ms)
    # A window that was followed by another one of its minute has its place no longer.
    gone = [(key_of(released), released.opened_sequence) for released in record.released]
    state.remove_windows([name for name, opened in gone if state.windows[name].opened_sequence == opened])
    for position in record.inputs:
        state.inputs[position.topic] = position.offset
    state.generation = record.generation
    state.sequence = record.sequence
    state.log_time_ms = record.log_time_ms
    state.resumed_ms = record.resumed_ms
    state.record_hash = chain.record_hash(stored)


def _found(state: LedgerState, record: LedgerRecord) -> None:
    state.partition = record.partition
    state.settings = record.founding
    # Input offsets belong to the generation; windows opened before are let go, later usage opens new ones.
    state.inputs.clear()
    state.remove_windows(list(state.windows))
    state.books = PriceBooks(record.founding.price_books)
