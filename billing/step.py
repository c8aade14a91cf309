"""The step function: one input, one record, which is the whole effect of that input.

`step` is pure in the sense that counts: the record and the state after it depend on nothing but the state before, the input,
the log time that the host read, and the keys. It never raises for bad input: what cannot be used becomes a record that says
so. It moves the state forward at once, so that several records may be in flight; a host that fails to write one throws the
state away and starts over from the log.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from billing import chain, completeness
from billing.command_step import apply_command
from billing.key_ring import Keys, as_ring
from billing.limits import (
    BATCH_BYTES_MAX,
    BATCH_EVENTS_MAX,
    REJECTED_PAYLOAD_BYTES_MAX,
    SCHEMA_VERSION,
)
from billing.registrations import alert_refused, forward_key, permission, sign_batch
from billing.release import release_due
from billing.state import DAY_MS, LedgerState
from billing.usage_admission import Forward
from billing.usage_step import apply_usage
from billing.v1.alert_pb2 import ALERT_RULE_FORGED_RECORD, SEVERITY_CRITICAL, Alert
from billing.v1.command_pb2 import SignedCommand
from billing.v1.ledger_pb2 import InputPosition, LedgerRecord, RefusedRecord, Rejected, SnapshotTaken, Tick
from billing.v1.usage_pb2 import UsageBatch


@dataclass(frozen=True, slots=True)
class LedgerKeys:
    """The installation's secrets that a step uses: what seals records, and what commands are signed with."""

    seal_key: Keys = field(repr=False)
    command_key: Keys = field(repr=False)


@dataclass(frozen=True, slots=True)
class UsageInput:
    """A message of `usage.events`."""

    topic: str
    offset: int
    value: bytes


@dataclass(frozen=True, slots=True)
class CommandInput:
    """A message of `billing.commands`."""

    topic: str
    offset: int
    value: bytes


@dataclass(frozen=True, slots=True)
class TickInput:
    """No message: time has passed. It may announce a snapshot that was taken meanwhile, and what was found in the log that the
    ledger's key did not seal: some of it, and how much there was in all.
    """

    snapshot: SnapshotTaken | None = None
    refused: Sequence[RefusedRecord] = ()
    refused_records: int = 0


Input = UsageInput | CommandInput | TickInput


@dataclass(frozen=True, slots=True)
class StepResult:
    """What to write: first `forwards`, each acknowledged in its own partition, then `stored` to the ledger."""

    record: LedgerRecord
    stored: bytes
    forwards: list[Forward]


class InputWentBack(RuntimeError):
    """The host handed over an input that the state has already taken. It must seek behind `state.inputs` first."""


def step(state: LedgerState, source: Input, log_time_ms: int, *, keys: LedgerKeys, writer: str) -> StepResult:
    """The record for `source`, sealed; `state` is then the state after it. Log time never goes back: the later one counts."""
    log_time_ms = max(log_time_ms, state.log_time_ms)
    record = LedgerRecord(
        schema_version=SCHEMA_VERSION,
        generation=state.generation,
        sequence=state.sequence + 1,
        previous_hash=state.record_hash,
        log_time_ms=log_time_ms,
        partition=state.partition,
        writer=writer,
    )
    if log_time_ms - state.log_time_ms > completeness.PAUSE_MS:
        state.resumed_ms = log_time_ms
    record.resumed_ms = state.resumed_ms
    if not isinstance(source, TickInput):
        _advance(state, source.topic, source.offset)
    if state.credits.next_ms <= log_time_ms:
        state.credits.advance(state.accounts, record)
    if state.budgets.next_ms <= log_time_ms:
        state.budgets.advance(state.accounts, record)
    forwards: list[Forward] = []
    match source:
        case UsageInput():
            forwards = _usage(state, source, record, keys)
        case CommandInput():
            _command(state, source, record, keys.command_key)
        case TickInput():
            _tick(state, source, record)
    if completeness.is_due(state, log_time_ms):
        completeness.look(state, record)
    if record.credits:
        _state_accounts(state, record)
    release_due(state, record)
    record.lines.extend(state.lines.take_touched())
    record.inputs.extend(InputPosition(topic=topic, offset=offset) for topic, offset in sorted(state.inputs.items()))
    if record.alerts or state.alerts.next_ms <= log_time_ms:
        restricted = state.alerts.settle(record, state.settings, state.accounts, state.settings.default_plan.rules)
        if restricted:
            _state_again(state, record, restricted)
    stored, state.record_hash = chain.seal_and_hash(record, keys.seal_key)
    state.log_time_ms = log_time_ms
    state.sequence = record.sequence
    return StepResult(record, stored, forwards)


def _advance(state: LedgerState, topic: str, offset: int) -> None:
    last = state.inputs.get(topic, -1)
    if offset <= last:
        raise InputWentBack(f"{topic}[{state.partition}]: offset {offset} was taken already, the last is {last}")
    state.inputs[topic] = offset


def _state_accounts(state: LedgerState, record: LedgerRecord) -> None:
    """An expiry changes a balance: the accounts that nothing else of the record has stated."""
    stated = {account.tenant_id for account in record.accounts}
    for tenant_id in sorted({credit.tenant_id for credit in record.credits} - stated):
        account = state.accounts[tenant_id]
        record.accounts.append(account.to_account(state.generation, record.sequence, record.log_time_ms))


def _state_again(state: LedgerState, record: LedgerRecord, tenant_ids: set[str]) -> None:
    """A rule has acted: accounts that the record may have stated already."""
    stated = {account.tenant_id: account for account in record.accounts}
    for tenant_id in sorted(tenant_ids):
        account = state.accounts[tenant_id].to_account(state.generation, record.sequence, record.log_time_ms)
        (stated.get(tenant_id) or record.accounts.add()).CopyFrom(account)


def _usage(state: LedgerState, source: UsageInput, record: LedgerRecord, keys: LedgerKeys) -> list[Forward]:
    if len(source.value) > BATCH_BYTES_MAX:
        _reject(record, source, f"batch: {len(source.value)} bytes; send at most {BATCH_BYTES_MAX}")
        return []
    try:
        batch = UsageBatch.FromString(source.value)
    except DecodeError:
        _reject(record, source, "batch: cannot be decoded; send a serialized billing.v1.UsageBatch")
        return []
    if batch.schema_version != SCHEMA_VERSION:
        _reject(
            record,
            source,
            f"schema_version: {batch.schema_version} is not known here (this ledger speaks {SCHEMA_VERSION}); "
            "upgrade the workers before the producers",
        )
        return []
    if len(batch.events) > BATCH_EVENTS_MAX:
        _reject(record, source, f"events: {len(batch.events)} in one batch; send at most {BATCH_EVENTS_MAX}")
        return []
    permitted = permission(state.registrations, batch, source.value, keys.command_key, keys.seal_key)
    if permitted.refusal:
        # Its numbers are not marked as taken: the producer keeps it.
        _reject(record, source, permitted.refusal)
        cooldown_ms = state.settings.alert_cooldown_ms
        alert_refused(record, state.registrations, permitted, batch.producer_id, cooldown_ms, events=len(batch.events))
        return []
    forwards = apply_usage(state, source.value, batch, record, permitted)
    if not forwards:
        return forwards
    _, key = as_ring(forward_key(keys.seal_key)).signing
    return [Forward(each.partition, sign_batch(each.value, key)) for each in forwards]


def _command(state: LedgerState, source: CommandInput, record: LedgerRecord, command_key: Keys) -> None:
    if len(source.value) > BATCH_BYTES_MAX:
        _reject(record, source, f"command: {len(source.value)} bytes; send at most {BATCH_BYTES_MAX}")
        return
    try:
        signed = SignedCommand.FromString(source.value)
    except DecodeError:
        _reject(record, source, "command: cannot be decoded; send a serialized billing.v1.SignedCommand")
        return
    apply_command(state, signed, record, command_key)


def _tick(state: LedgerState, source: TickInput, record: LedgerRecord) -> None:
    # A day's keys are let go when the whole day is over.
    through_day = record.log_time_ms // DAY_MS - 1
    if through_day > state.expired_through_day:
        state.seen.expire(through_day)
        state.expired_through_day = through_day
        state.forget(record.log_time_ms)
    record.tick.CopyFrom(
        Tick(
            expired_through_day=state.expired_through_day,
            snapshot=source.snapshot,
            refused=source.refused,
            refused_records=source.refused_records,
        )
    )
    if source.refused:
        first = source.refused[0]
        record.alerts.append(
            Alert(
                rule=ALERT_RULE_FORGED_RECORD,
                severity=SEVERITY_CRITICAL,
                summary=f"{source.refused_records} message(s) in the ledger's log were refused; the first, at offset "
                f"{first.offset}: {first.reason}",
                figures={"records": source.refused_records, "first_offset": first.offset},
                labels={"partition": str(state.partition)},
            )
        )


def _reject(record: LedgerRecord, source: UsageInput | CommandInput, reason: str) -> None:
    record.rejected.CopyFrom(
        Rejected(
            topic=source.topic,
            offset=source.offset,
            reason=reason,
            payload=source.value[:REJECTED_PAYLOAD_BYTES_MAX],
            payload_bytes=len(source.value),
            payload_hash=hashlib.sha256(source.value).digest(),
        )
    )
