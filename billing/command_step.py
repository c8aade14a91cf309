"""What a command does to the state. Refused commands leave a record that says why; nothing else changes."""

from __future__ import annotations

from billing.accounts import AccountState
from billing.adjustments import adjust
from billing.amounts import format_pico
from billing.commands import CommandRefused, check_time, remembered_id, verify
from billing.erasures import erase_user
from billing.identity import partition_of
from billing.invoice_step import finalize
from billing.key_ring import Keys
from billing.ledger_rules import change_rules
from billing.limits import ACCOUNT_TERMS_BYTES_MAX, ID_CHARS_MAX, KEY_BYTES_MAX, RELEASED_LEASES_MAX
from billing.periods import calendar_problem, month_of, same_through
from billing.prices import PriceBookRefused
from billing.registrations import register, registration_problem
from billing.rule_limits import completed, rules_problem
from billing.state import DAY_MS, LedgerState
from billing.tenant_step import check_key, check_operator_key, close_tenant, plan_problem, upsert_budget, upsert_project
from billing.v1.account_pb2 import (
    ACCOUNT_STATUS_ACTIVE,
    ACCOUNT_STATUS_CLOSED,
    ACCOUNT_STATUS_UNKNOWN,
    Account,
    ApiKey,
    Calendar,
    Plan,
)
from billing.v1.alert_pb2 import ALERT_RULE_STALE_COMMAND, ALERT_RULE_UNSIGNED_COMMAND, SEVERITY_CRITICAL, Alert
from billing.v1.command_pb2 import (
    Command,
    InvoiceFinalization,
    KeyUpsert,
    LeaseRequest,
    LeaseRetirement,
    PriceBook,
    SignedCommand,
    TenantUpsert,
)
from billing.v1.ledger_pb2 import CommandApplied, LedgerRecord

# By the field that was refused, who should hear of it.
_ALERTS = {
    "signature": (
        ALERT_RULE_UNSIGNED_COMMAND,
        "a command without a valid signature was refused; find out who can write to the command topic",
    ),
    "issued_ms": (
        ALERT_RULE_STALE_COMMAND,
        "a command that was signed too long ago, or for a time to come, was refused; find out who repeats commands",
    ),
}


def apply_command(state: LedgerState, signed: SignedCommand, record: LedgerRecord, command_key: Keys) -> None:
    """Apply `signed` to `state` and state its effect in `record`."""
    applied = CommandApplied(command=signed.command, signature=signed.signature)
    try:
        command = verify(signed, command_key)
        check_time(command, record.log_time_ms, state.settings.dedupe_horizon_ms, state.settings.future_reject_ms)
        remembered = remembered_id(command)
        if remembered in state.commands:
            raise CommandRefused(f"command_id: {command.command_id} was applied before; a repeat changes nothing")
        _dispatch(state, command, record, applied)
    except (CommandRefused, PriceBookRefused) as refused:
        applied.refusal = str(refused)
        if told := _ALERTS.get(applied.refusal.partition(":")[0]):
            rule, summary = told
            record.alerts.append(Alert(rule=rule, severity=SEVERITY_CRITICAL, summary=summary))
    else:
        applied.applied = True
        if remembered:
            state.commands[remembered] = command.issued_ms
    record.command.CopyFrom(applied)


def _dispatch(state: LedgerState, command: Command, record: LedgerRecord, applied: CommandApplied) -> None:
    match command.WhichOneof("action"):
        case "credit_grant":
            _grant(state, command, record, applied)
        case "tenant_upsert":
            _upsert_tenant(state, command.tenant_upsert, record, applied)
        case "project_upsert":
            _own_tenant(state, command.project_upsert.tenant_id)
            _known_account(state, command.project_upsert.tenant_id)
            upsert_project(state, command.project_upsert, record)
        case "budget_upsert":
            _own_tenant(state, command.budget_upsert.tenant_id)
            account = _known_account(state, command.budget_upsert.tenant_id)
            applied.outcome = upsert_budget(state, account, command.budget_upsert, record)
        case "key_upsert":
            _upsert_key(state, command.key_upsert, record)
        case "price_book":
            _take_book(state, command.price_book, applied)
        case "producer_upsert":
            said = command.producer_upsert.registration
            if problem := registration_problem(state.registrations, said):
                raise CommandRefused(problem)
            register(state.registrations, said, record)
        case "rules_change":
            rules, applied.outcome = change_rules(state, command.rules_change, record)
            applied.rules.CopyFrom(rules)
        case "lease_request":
            _lease(state, command.lease_request, record, applied)
        case "lease_retirement":
            _retire_leases(state, command.lease_retirement, record, applied)
        case "adjustment":
            _adjust(state, command, record, applied)
        case "user_erasure":
            _own_tenant(state, command.user_erasure.tenant_id)
            _known_account(state, command.user_erasure.tenant_id)
            applied.outcome = erase_user(state, command.user_erasure, record)
        case "alert_acknowledgement":
            _acknowledge(state, command, record, applied)
        case "invoice_finalization":
            _invoice(state, command.invoice_finalization, record, applied)
        case other:
            raise CommandRefused(f"action: {other} is not known here; upgrade the workers first")


def _own_tenant(state: LedgerState, tenant_id: str) -> None:
    if not 0 < len(tenant_id) <= ID_CHARS_MAX:
        raise CommandRefused(f"tenant_id: {tenant_id[:32]!r}; give 1 to {ID_CHARS_MAX} characters")
    _own_partition(state, tenant_id)


def _own_partition(state: LedgerState, tenant_id: str) -> None:
    partition = partition_of(tenant_id, state.settings.partitions)
    if partition != state.partition:
        raise CommandRefused(f"tenant_id: {tenant_id} lives in partition {partition}, not {state.partition}; send it there")


def _known_account(state: LedgerState, tenant_id: str) -> AccountState:
    account = state.accounts.get(tenant_id)
    if account is None or account.status == ACCOUNT_STATUS_UNKNOWN:
        raise CommandRefused(f"tenant_id: {tenant_id} is not known; create the tenant first")
    return account


def _state_account(state: LedgerState, account: AccountState, record: LedgerRecord) -> None:
    record.accounts.append(account.to_account(state.generation, record.sequence, record.log_time_ms))


def _grant(state: LedgerState, command: Command, record: LedgerRecord, applied: CommandApplied) -> None:
    grant = command.credit_grant
    _own_tenant(state, grant.tenant_id)
    account = _known_account(state, grant.tenant_id)
    if grant.currency != account.currency:
        raise CommandRefused(f"currency: {grant.currency!r}; tenant {grant.tenant_id} is billed in {account.currency}")
    applied.outcome = state.credits.grant(grant.tenant_id, account, grant, command.command_id, record)
    _state_account(state, account, record)


def _upsert_tenant(state: LedgerState, upsert: TenantUpsert, record: LedgerRecord, applied: CommandApplied) -> None:
    _own_tenant(state, upsert.tenant_id)
    account = state.accounts.get(upsert.tenant_id)
    if problem := calendar_problem(upsert.calendar):
        raise CommandRefused(problem)
    currency = upsert.currency or (account.currency if account else state.settings.default_currency)
    if len(currency) > 8:
        raise CommandRefused(f"currency: {currency[:16]!r}; write a code such as USD")
    plan = completed(upsert.plan, state.settings.default_plan)
    _check_terms(upsert, plan, account)
    if problem := plan_problem(plan) or rules_problem(plan.rules):
        raise CommandRefused(problem)
    if account is None:
        account = state.accounts[upsert.tenant_id] = AccountState(upsert.tenant_id, currency, plan=state.settings.default_plan)
    elif currency != account.currency and _has_amounts(state, account):
        raise CommandRefused(
            f"currency: {currency}; tenant {upsert.tenant_id} has amounts in {account.currency}, which stays its currency"
        )
    if upsert.HasField("calendar"):
        _check_calendar(state, account, upsert.calendar, record.log_time_ms)
        account.calendar = upsert.calendar
    account.currency = currency
    before = account.status
    account.status = upsert.status or (ACCOUNT_STATUS_ACTIVE if account.status == ACCOUNT_STATUS_UNKNOWN else account.status)
    if account.status != before:
        account.status_ms = record.log_time_ms
    if upsert.status == ACCOUNT_STATUS_ACTIVE:
        # Whoever lets a tenant go on has looked at what the rules did.
        account.restrictions = []
    if upsert.display_name:
        account.display_name = upsert.display_name[:ID_CHARS_MAX]
    if upsert.HasField("plan"):
        account.plan = plan
    if upsert.status == ACCOUNT_STATUS_CLOSED:
        applied.outcome = close_tenant(state, account, record, expire_credit=upsert.expire_credit)
    _state_account(state, account, record)


def _check_terms(upsert: TenantUpsert, plan: Plan, account: AccountState | None) -> None:
    if not (upsert.HasField("plan") or upsert.HasField("calendar") or upsert.display_name):
        # Whoever suspends a tenant is not asked for a shorter name.
        return
    kept = account.to_account(b"", 0, 0) if account else Account(plan=plan)
    name = upsert.display_name[:ID_CHARS_MAX] or kept.display_name
    calendar = upsert.calendar if upsert.HasField("calendar") else kept.calendar
    size = (plan if upsert.HasField("plan") else kept.plan).ByteSize() + len(name.encode()) + calendar.ByteSize()
    if size > ACCOUNT_TERMS_BYTES_MAX:
        raise CommandRefused(
            f"plan, display_name, calendar: {size} bytes; every record states them, give {ACCOUNT_TERMS_BYTES_MAX} at most"
        )


def _has_amounts(state: LedgerState, account: AccountState) -> bool:
    tenant_id = account.tenant_id
    if account.spend_pico or state.credits.knows(tenant_id) or tenant_id in state.budgets.tenants:
        return True
    # What was voided to the last pico is still on its way to an invoice, in two lines.
    return any(line.cost_pico for line in state.lines.of(tenant_id))


def _check_calendar(state: LedgerState, account: AccountState, calendar: Calendar, log_time_ms: int) -> None:
    # A period that has begun keeps its bounds: its tiers and its invoice are counted within them. Months begin up to a day
    # before UTC's, and usage may be as far ahead as is taken.
    month = month_of(log_time_ms + DAY_MS + state.settings.future_reject_ms)
    begun = account.events or account.invoiced_through_ms or state.lines.of(account.tenant_id)
    if begun and not same_through(account.calendar, calendar, month):
        raise CommandRefused(
            f"calendar: tenant {account.tenant_id} has usage or invoices, so periods that have begun, or do within days, stay "
            "as they are; let the new zone begin with a later month"
        )


def _upsert_key(state: LedgerState, upsert: KeyUpsert, record: LedgerRecord) -> None:
    key = ApiKey()
    key.CopyFrom(upsert.key)
    if key.tenant_id:
        _own_tenant(state, key.tenant_id)
        check_key(state, _known_account(state, key.tenant_id), key)
    else:
        _own_partition(state, "")
        check_operator_key(key)
    if not 0 < len(key.key_id) <= ID_CHARS_MAX:
        raise CommandRefused(f"key_id: needs 1 to {ID_CHARS_MAX} characters")
    known = state.keys.get(key.key_id)
    if known is not None and known.tenant_id != key.tenant_id:
        raise CommandRefused(f"key_id: {key.key_id} belongs to another tenant; choose another")
    if known is not None and known.revoked and not key.revoked:
        # Whoever changed it did not know that yet.
        raise CommandRefused(f"key_id: {key.key_id} is revoked, and stays so; create another key")
    if key.ByteSize() > KEY_BYTES_MAX:
        raise CommandRefused(f"key: {key.ByteSize()} bytes; the record and every gateway hold it, send at most {KEY_BYTES_MAX}")
    if len(key.secret_hash) != 32:
        raise CommandRefused(f"secret_hash: {len(key.secret_hash)} bytes; give an HMAC-SHA256, never the secret")
    key.version.generation = state.generation
    key.version.sequence = record.sequence
    state.keys[key.key_id] = key
    record.keys.append(key)


def _lease(state: LedgerState, request: LeaseRequest, record: LedgerRecord, applied: CommandApplied) -> None:
    _own_tenant(state, request.tenant_id)
    account = _known_account(state, request.tenant_id)
    holder = state.producers.get(request.holder_id)
    covered = holder.covered if holder else 0
    changed, applied.outcome = state.leases.answer(request, account, covered, record.log_time_ms)
    record.leases.extend(lease.to_lease(state.generation, record.sequence, covered) for lease in changed)
    _state_account(state, account, record)


def _retire_leases(state: LedgerState, retirement: LeaseRetirement, record: LedgerRecord, applied: CommandApplied) -> None:
    gone, bound_pico = state.leases.retire(
        retirement.holder_id, retirement.unexpired, state.accounts, record.log_time_ms, RELEASED_LEASES_MAX
    )
    record.leases.extend(lease.to_lease(state.generation, record.sequence) for lease in gone)
    for tenant_id in sorted({lease.tenant_id for lease in gone}):
        _state_account(state, state.accounts[tenant_id], record)
    bounds = " and ".join(format_pico(pico, currency) for currency, pico in sorted(bound_pico.items()))
    applied.outcome = f"{len(gone)} lease(s) let go"
    if bounds:
        applied.outcome += f"; usage worth up to {bounds} may still come from that gateway's journal"
    if state.leases.held_by(retirement.holder_id):
        applied.outcome += "; more are left, repeat it with another command ID"
    producer = state.producers.get(retirement.holder_id)
    if producer is not None:
        # Its journal does not come back either: what it announced and did not send is not waited for any more.
        given_up = sum(hole.numbers for hole in producer.missing())
        producer.retire()
        record.producers.append(producer.to_mark())
        if given_up:
            applied.outcome += f"; {given_up} event(s) that it counted are given up as missing"


def _acknowledge(state: LedgerState, command: Command, record: LedgerRecord, applied: CommandApplied) -> None:
    said = command.alert_acknowledgement
    # "<generation>-<partition>-…": see `Alerts`.
    partition = said.alert_id.split("-")[1:2]
    if partition != [str(state.partition)] and partition and partition[0].isdecimal():
        applied.outcome = f"it is of partition {partition[0][:8]}"
        return
    state.alerts.acknowledge(said.alert_id, command.issuer[:ID_CHARS_MAX], said.note, record)


def _invoice(state: LedgerState, said: InvoiceFinalization, record: LedgerRecord, applied: CommandApplied) -> None:
    _own_tenant(state, said.tenant_id)
    account = _known_account(state, said.tenant_id)
    applied.invoice = finalize(state, account, said, record)
    if not said.draft:
        _state_account(state, account, record)


def _adjust(state: LedgerState, command: Command, record: LedgerRecord, applied: CommandApplied) -> None:
    _own_tenant(state, command.adjustment.tenant_id)
    account = _known_account(state, command.adjustment.tenant_id)
    applied.outcome = adjust(state, account, command, record)
    _state_account(state, account, record)


def _take_book(state: LedgerState, book: PriceBook, applied: CommandApplied) -> None:
    state.books.add(book)
    applied.price_book.CopyFrom(book)
