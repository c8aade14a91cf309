"""What an adjustment does to the state: new entries that correct what was charged. The original stays.

Promise: an adjustment is applied whole or refused with the field, the value and the mend. Its amounts multiply and sum, to the
last pico; it moves the tenant's spend by their sum and adds its lines, under the command's ID, to the tenant's periods, where
the next invoice finds them. It says who asked and why. An event that was voided or amended is not corrected again for 400 days;
after that, whoever asks looks in ClickHouse first.
"""

from __future__ import annotations

from billing import line_parts
from billing.accounts import AccountState
from billing.amounts import format_pico, from_amount
from billing.commands import CommandRefused
from billing.identity import identities
from billing.limits import (
    ADJUSTMENT_EVENTS_MAX,
    ADJUSTMENT_LINES_KEPT_MAX,
    ADJUSTMENT_LINES_MAX,
    ADJUSTMENT_NAMES_BYTES_MAX,
    CORRECTED_EVENTS_MAX,
    ID_CHARS_MAX,
    LINE_PARTS_MAX,
)
from billing.line_parts import Parts
from billing.period_lines import LineKey, line_key_of
from billing.periods import period_at
from billing.state import Corrected, LedgerState
from billing.v1.command_pb2 import (
    ADJUSTMENT_KIND_AMEND,
    ADJUSTMENT_KIND_CREDIT_NOTE,
    ADJUSTMENT_KIND_RATE_UNRATED,
    ADJUSTMENT_KIND_RERATE,
    ADJUSTMENT_KIND_VOID,
    Adjustment,
    Command,
)
from billing.v1.invoice_pb2 import PeriodLine
from billing.v1.ledger_pb2 import CorrectedEvent, LedgerRecord

__all__ = ["adjust"]

_OF_EVENTS = (ADJUSTMENT_KIND_VOID, ADJUSTMENT_KIND_AMEND)
_OF_PERIODS = (ADJUSTMENT_KIND_CREDIT_NOTE, ADJUSTMENT_KIND_RERATE, ADJUSTMENT_KIND_RATE_UNRATED)
# Gives money back, and never takes any.
_GIVES_BACK = (ADJUSTMENT_KIND_VOID, ADJUSTMENT_KIND_CREDIT_NOTE)
_AMOUNT_PICO_MAX = 10**30
# So many fit where amounts do, with their twelve decimals.
_UNITS_MAX = 10**25
_TEXT_CHARS_MAX = 64


def adjust(state: LedgerState, account: AccountState, command: Command, record: LedgerRecord) -> str:
    """Apply the adjustment that `command` asks for; the caller has checked the tenant. Returns what there is to say about it.

    Raises CommandRefused, and then nothing has changed.
    """
    said = command.adjustment
    if not command.issuer or not command.reason:
        raise CommandRefused("reason: an adjustment says who asks for it and why; give issuer and reason")
    if said.kind not in (*_OF_EVENTS, *_OF_PERIODS):
        raise CommandRefused(f"kind: {said.kind} is not known here; upgrade the workers first")
    if said.currency != account.currency:
        raise CommandRefused(f"currency: {said.currency!r}; tenant {said.tenant_id} is billed in {account.currency}")
    if not 0 < len(said.lines) <= ADJUSTMENT_LINES_MAX:
        raise CommandRefused(f"lines: {len(said.lines)} entries; write 1 to {ADJUSTMENT_LINES_MAX}, and several adjustments")
    lines = [
        _checked_line(state, account, command, place, line, record.log_time_ms) for place, line in enumerate(said.lines, 1)
    ]
    if len({key for key, _ in lines}) < len(lines):
        raise CommandRefused("lines: a line stands twice; sum what belongs together")
    total_pico = sum(part.amount_pico for _, parts in lines for part in parts.values())
    if said.kind in _GIVES_BACK and total_pico > 0:
        raise CommandRefused(
            f"lines: sum up to {format_pico(total_pico, said.currency)}; what gives back is not above zero, charge by usage"
        )
    if abs(total_pico) > _AMOUNT_PICO_MAX:
        raise CommandRefused(f"lines: sum up to {total_pico} pico, over 10^18 {said.currency}; check the unit")
    kept = [line.key for line in state.lines.of(said.tenant_id) if line.key.adjustment_id]
    names_bytes = sum(key.names_bytes for key in (*kept, *(key for key, _ in lines)))
    if len(kept) + len(lines) > ADJUSTMENT_LINES_KEPT_MAX or names_bytes > ADJUSTMENT_NAMES_BYTES_MAX:
        raise CommandRefused(
            f"lines: tenant {said.tenant_id} has {len(kept)} lines of adjustments on no invoice yet; draw the invoice first"
        )
    keys = _corrected_keys(state, said)
    for line_key, parts in lines:
        state.lines.line(line_key, record.generation, record.sequence).add_parts(parts)
    account.spend_pico += total_pico
    state.credits.correct(account.tenant_id, account, record)
    for key in keys:
        state.corrected[key] = Corrected(command.command_id, record.log_time_ms)
        record.corrected.append(CorrectedEvent(key=key, adjustment_id=command.command_id, corrected_ms=record.log_time_ms))
    outcome = f"{format_pico(total_pico, said.currency)} in {len(lines)} line(s)"
    if beyond := state.seen.find(keys).count(None):
        outcome += f"; {beyond} of {len(keys)} event(s) are beyond the ledger's memory: ClickHouse says that they were charged"
    return outcome


def _checked_line(
    state: LedgerState, account: AccountState, command: Command, place: int, line: PeriodLine, log_time_ms: int
) -> tuple[LineKey, Parts]:
    """A line's key and parts. Raises CommandRefused."""
    said, where = line.key, f"lines[{place}]"
    if (said.tenant_id, said.currency, said.adjustment_id) != (account.tenant_id, account.currency, command.command_id):
        raise CommandRefused(f"{where}.key: names another tenant, currency or adjustment than the command; make them the same")
    if said.opened_sequence or said.opened_generation or line.events or line.refused_events or line.unrated_events:
        raise CommandRefused(f"{where}: an adjustment adds amounts alone; leave out where it was opened and counts of events")
    period = period_at(account.calendar, said.period_start_ms)
    if (said.period_start_ms, said.period_end_ms) != period:
        raise CommandRefused(
            f"{where}.key.period_start_ms: {said.period_start_ms} to {said.period_end_ms} is no period of the tenant; the one "
            f"around it is {period.start_ms} to {period.end_ms}"
        )
    if period.end_ms <= 0 or period.start_ms > log_time_ms + state.settings.future_reject_ms:
        raise CommandRefused(
            f"{where}.key.period_start_ms: {period.start_ms} is a period without usage, log time is {log_time_ms}; "
            "name one that has begun"
        )
    if max(len(said.project_id), len(said.model)) > ID_CHARS_MAX:
        raise CommandRefused(f"{where}.key: a project or model of over {ID_CHARS_MAX} characters; name one that was used")
    if said.price_version and state.books.version(account.currency, said.price_version) is None:
        raise CommandRefused(f"{where}.key.price_version: {said.price_version} is not known here; apply it first, or write 0")
    if not 0 < len(line.parts) <= LINE_PARTS_MAX - 1:
        raise CommandRefused(f"{where}.parts: {len(line.parts)} entries; write 1 to {LINE_PARTS_MAX - 1}")
    for number, part in enumerate(line.parts, 1):
        units, amount_pico = line_parts.from_units(part.units), from_amount(part.amount)
        if not 0 < len(part.quantity_of) <= _TEXT_CHARS_MAX or len(part.terms) > _TEXT_CHARS_MAX:
            raise CommandRefused(
                f"{where}.parts[{number}]: write what it is of, and its terms, in at most {_TEXT_CHARS_MAX} characters each"
            )
        if part.unit_pico and units * part.unit_pico != amount_pico:
            raise CommandRefused(
                f"{where}.parts[{number}].amount: {amount_pico} pico is not {units} times {part.unit_pico}; state the product"
            )
        if abs(amount_pico) > _AMOUNT_PICO_MAX or abs(units) > _UNITS_MAX:
            raise CommandRefused(
                f"{where}.parts[{number}].amount: {amount_pico} pico is over 10^18 {account.currency}; check the unit"
            )
    parts = line_parts.from_line_parts(line.parts)
    if len(parts) < len(line.parts):
        raise CommandRefused(f"{where}.parts: a part stands twice; sum what belongs together")
    if (summed := sum(part.amount_pico for part in parts.values())) != from_amount(line.cost):
        raise CommandRefused(f"{where}.cost: {from_amount(line.cost)} pico, and the parts sum up to {summed}; state their sum")
    return line_key_of(said), parts


def _corrected_keys(state: LedgerState, said: Adjustment) -> list[bytes]:
    """The dedupe keys of the events that are corrected. Raises CommandRefused."""
    request_ids = list(said.corrected_request_ids)
    if said.kind in _OF_PERIODS:
        if request_ids:
            raise CommandRefused("corrected_request_ids: only a void and an amendment correct events; leave them out")
        return []
    if not 0 < len(request_ids) <= ADJUSTMENT_EVENTS_MAX or len(set(request_ids)) < len(request_ids):
        raise CommandRefused(
            f"corrected_request_ids: {len(request_ids)} entries; name 1 to {ADJUSTMENT_EVENTS_MAX} events, each once"
        )
    if any(not 0 < len(request_id) <= ID_CHARS_MAX for request_id in request_ids):
        raise CommandRefused(f"corrected_request_ids: a request ID has 1 to {ID_CHARS_MAX} characters")
    if len(state.corrected) + len(request_ids) > CORRECTED_EVENTS_MAX:
        raise CommandRefused(
            f"corrected_request_ids: {len(state.corrected)} corrected events are remembered, {CORRECTED_EVENTS_MAX} are the "
            "bound; write a credit note"
        )
    count = len(request_ids)
    keys, _ = identities(state.settings.dedupe_key, [said.tenant_id] * count, request_ids, [b""] * count)
    for request_id, key in zip(request_ids, keys, strict=True):
        if by := state.corrected.get(key):
            raise CommandRefused(
                f"corrected_request_ids: {request_id} was corrected by {by.adjustment_id} before; an event is corrected once, "
                "write a credit note"
            )
    return keys
