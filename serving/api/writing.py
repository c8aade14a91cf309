"""What changes something: credit, keys, tenants. Each is a command to the ledger, answered when the ledger has applied it.

Promise: a repeat under the same idempotency key changes nothing and has the same answer (but for a key's secret, which is shown
once); the same key with something else is refused. The ledger itself sees to that: the key is the command's ID there, so it
holds across processes of the API and restarts.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING, Final

import grpc

from billing.amounts import parse_decimal_to_pico
from billing.v1.account_pb2 import (
    ACCOUNT_STATUS_ACTIVE,
    ACCOUNT_STATUS_SUSPENDED,
    KEY_SCOPE_ADMIN,
    KEY_SCOPE_METER,
    KEY_SCOPE_READ,
)
from billing.v1.billing_service_pb2 import (
    AcknowledgeAlertRequest,
    AcknowledgeAlertResponse,
    CreateKeyRequest,
    CreateKeyResponse,
    CreateTenantRequest,
    CreateTenantResponse,
    Grant,
    GrantCreditRequest,
    GrantCreditResponse,
    KeyEntry,
    ListCreditGrantsRequest,
    ListCreditGrantsResponse,
    ListKeysRequest,
    ListKeysResponse,
    RevokeKeyRequest,
    RevokeKeyResponse,
    SetTenantStatusRequest,
    SetTenantStatusResponse,
)
from billing.v1.command_pb2 import Command
from billing.v1.invoice_pb2 import CREDIT_KIND_PAID
from serving.api.alerting import alert_entry
from serving.api.errors import ApiError
from serving.api.fields import CREDIT_KINDS, SCOPES, from_time, to_time
from serving.api.reading import find_balance, money, page_of, tenant_balance
from serving.calendars import UnknownTimeZone, calendar_of
from serving.commanding import Commander, CreditTerms, PlanTerms
from sinks import account_queries, queries

if TYPE_CHECKING:
    from serving.api.calls import Call
    from sinks.account_queries import GrantRow, KeyRow
    from sinks.rows import AlertRow

__all__ = [
    "acknowledge_alert",
    "create_key",
    "create_tenant",
    "grant_credit",
    "list_credit_grants",
    "list_keys",
    "revoke_key",
    "set_tenant_status",
]

# What a tenant may give to its own keys.
_TENANT_SCOPES: Final = frozenset({KEY_SCOPE_METER, KEY_SCOPE_READ, KEY_SCOPE_ADMIN})
_KEY_WAIT_S: Final = 5.0
_STATUSES: Final = {"active": ACCOUNT_STATUS_ACTIVE, "suspended": ACCOUNT_STATUS_SUSPENDED}


def list_credit_grants(call: Call, request: ListCreditGrantsRequest) -> ListCreditGrantsResponse:
    """A tenant's grants in the order in which they came."""
    account = find_balance(call, call.principal.tenant(request.tenant_id))
    rows = account_queries.grants(call.reader, account.tenant_id)
    page, token = page_of(call, request, rows, lambda row: row.grant_id)
    return ListCreditGrantsResponse(grants=[_grant(row, account.currency) for row in page], next_page_token=token)


def grant_credit(call: Call, request: GrantCreditRequest) -> GrantCreditResponse:
    """Add credit to a tenant, in the currency that it is billed in."""
    amount_pico = parse_decimal_to_pico(request.amount)
    if amount_pico <= 0:
        raise ApiError.unacceptable(f"amount: {request.amount} grants nothing; send more than 0")
    account = find_balance(call, request.tenant_id)
    commander, command_id = _commander(call), _command_id(call, request.idempotency_key)
    expires_ms = from_time(request, "expires", 0)
    terms = CreditTerms(
        request.grant_id,
        CREDIT_KINDS[request.kind] if request.kind else CREDIT_KIND_PAID,
        _future(call, commander, command_id, "expires", expires_ms),
        request.priority,
        request.reference,
    )
    said = commander.credit(account.tenant_id, amount_pico, account.currency, request.reason, terms, command_id=command_id)
    _give(call, commander, said)
    [row] = account_queries.grants(call.reader, account.tenant_id, request.grant_id or command_id)
    return GrantCreditResponse(grant=_grant(row, account.currency))


def acknowledge_alert(call: Call, request: AcknowledgeAlertRequest) -> AcknowledgeAlertResponse:
    """Take an alert on; one that somebody has taken on stays as it is."""
    tenant_id = call.principal.tenant_or_all(request.tenant_id)
    row = _find_alert(call, tenant_id, request.alert_id)
    commander, command_id = _commander(call), _command_id(call, request.idempotency_key)
    if row.state != "acknowledged" or commander.was_applied(call.reader, command_id):
        _give(call, commander, commander.acknowledgement(row.alert_id, request.note, command_id=command_id))
        row = _find_alert(call, tenant_id, request.alert_id)
    return AcknowledgeAlertResponse(alert=alert_entry(row))


def _find_alert(call: Call, tenant_id: str | None, alert_id: str) -> AlertRow:
    rows = queries.alerts(call.reader, tenant_id, filters={"alert_id": alert_id}, limit=1)
    if not rows:
        raise ApiError.unknown("alert", alert_id)
    return rows[0]


def list_keys(call: Call, request: ListKeysRequest) -> ListKeysResponse:
    """A tenant's keys, without their secrets; an operator who names no tenant sees operators' keys."""
    rows = account_queries.keys(call.reader, call.principal.tenant_or_all(request.tenant_id) or "")
    page, token = page_of(call, request, rows, lambda row: row.key_id)
    return ListKeysResponse(keys=[_key(row, call.now_ms) for row in page], next_page_token=token)


def create_key(call: Call, request: CreateKeyRequest) -> CreateKeyResponse:
    """A new key. It opens what it may when the answer comes."""
    tenant_id = call.principal.tenant_or_all(request.tenant_id) or ""
    scopes = [SCOPES[name] for name in dict.fromkeys(request.scopes)] or [KEY_SCOPE_METER]
    if not call.principal.is_operator and not _TENANT_SCOPES.issuperset(scopes):
        raise ApiError(grpc.StatusCode.PERMISSION_DENIED, "scopes: a tenant's keys have meter, read and admin at most")
    if not tenant_id and KEY_SCOPE_METER in scopes:
        raise ApiError.unacceptable("scopes: a key without a tenant meters nothing; name a tenant, or other scopes")
    commander, command_id = _commander(call), _command_id(call, request.idempotency_key)
    made = commander.key(
        tenant_id,
        request.project_id,
        request.user_id,
        scopes,
        _future(call, commander, command_id, "expires", from_time(request, "expires", 0)),
        key_id=f"key-{command_id[-16:]}",
        command_id=command_id,
    )
    _give(call, commander, made.command)
    known = call.keys.wait_for(made.key_id, min(_KEY_WAIT_S, call.left_s))
    # An answer that was given before had the secret; it is nowhere now.
    is_first = known is not None and known.secret_hash == made.command.key_upsert.key.secret_hash
    [row] = account_queries.keys(call.reader, tenant_id, key_id=made.key_id)
    return CreateKeyResponse(key=_key(row, call.now_ms), secret=made.secret if is_first else "")


def revoke_key(call: Call, request: RevokeKeyRequest) -> RevokeKeyResponse:
    """Make a key open nothing any more."""
    tenant_id = call.principal.tenant_or_all(request.tenant_id) or ""
    known = call.keys.find(request.key_id)
    if known is None or known.tenant_id != tenant_id:
        raise ApiError.unknown("key", request.key_id)
    # The topic is a moment behind the database: what a call has just done is not done twice.
    stated = account_queries.keys(call.reader, tenant_id, key_id=request.key_id)
    if not (known.revoked or any(row.revoked for row in stated)):
        commander, command_id = _commander(call), _command_id(call, request.idempotency_key)
        _give(call, commander, commander.changed_key(known, request.reason, command_id=command_id, revoked=True))
    [row] = account_queries.keys(call.reader, tenant_id, key_id=request.key_id)
    return RevokeKeyResponse(key=_key(row, call.now_ms))


def create_tenant(call: Call, request: CreateTenantRequest) -> CreateTenantResponse:
    """A new tenant."""
    if request.tenant_id[0] == "/" or request.tenant_id[0].isspace():
        raise ApiError.unacceptable(f"tenant_id: {request.tenant_id[:40]!r} begins with a slash or a space; choose another")
    postpaid = request.billing_mode == "postpaid"
    limit_pico = parse_decimal_to_pico(request.credit_limit) if request.credit_limit else 0
    if limit_pico and not postpaid:
        raise ApiError.unacceptable("credit_limit: a prepaid tenant has none; leave it out, or choose postpaid")
    commander, command_id = _commander(call), _command_id(call, request.idempotency_key)
    account = next(iter(queries.balances(call.reader, request.tenant_id)), None)
    if account is not None and account.status != "unknown" and not commander.was_applied(call.reader, command_id):
        raise ApiError(grpc.StatusCode.ALREADY_EXISTS, f"tenant {request.tenant_id!r} is there already")
    try:
        calendar = calendar_of(request.time_zone, call.now_ms) if request.time_zone else None
    except UnknownTimeZone as error:
        raise ApiError.unacceptable(f"time_zone: {error}") from None
    terms = PlanTerms(prepaid=not postpaid, prompt_tokens_max=request.prompt_tokens_max, credit_limit_pico=limit_pico)
    said = commander.tenant(
        request.tenant_id,
        request.display_name,
        request.currency or "USD",
        terms,
        calendar=calendar,
        command_id=command_id,
        reason=request.reason,
    )
    _give(call, commander, said)
    return CreateTenantResponse(balance=tenant_balance(find_balance(call, request.tenant_id)))


def set_tenant_status(call: Call, request: SetTenantStatusRequest) -> SetTenantStatusResponse:
    """Let gateways refuse a tenant, or let it go on. Usage that still comes is charged."""
    account = find_balance(call, request.tenant_id)
    commander, command_id = _commander(call), _command_id(call, request.idempotency_key)
    _give(
        call,
        commander,
        commander.status(account.tenant_id, _STATUSES[request.status], request.reason, command_id=command_id),
    )
    return SetTenantStatusResponse(balance=tenant_balance(find_balance(call, account.tenant_id)))


def _commander(call: Call) -> Commander:
    if call.open_commander is None:
        raise ApiError(
            grpc.StatusCode.UNAVAILABLE, "nothing can be changed through here: this API was started without the command key"
        )
    return call.open_commander(f"api/{call.principal.key_id}")


def _command_id(call: Call, idempotency_key: str) -> str:
    """The command's ID: the same for the same idempotency key of the same tenant, or of operators. Without one: a new one."""
    if not idempotency_key:
        return f"api-{secrets.token_hex(16)}"
    owner = call.principal.tenant_id.encode()
    named = hashlib.blake2b(len(owner).to_bytes(4, "big") + owner + idempotency_key.encode(), digest_size=16)
    return f"api-{named.hexdigest()}"


def _give(call: Call, commander: Commander, said: Command) -> None:
    """Give it, and see that what the ledger applied under its ID is this. Raises ApiError and what `Commander.give` raises."""
    commander.give([said], call.reader, call.left_s)
    applied = commander.applied(call.reader, said.command_id)
    if applied is not None and _meant(applied) != _meant(said):
        raise ApiError.unacceptable("idempotency key: was used before for something else; use another for this")


def _meant(command: Command) -> bytes:
    """What two commands that mean the same have in common."""
    meant = Command()
    meant.CopyFrom(command)
    for name in ("issuer", "issued_ms"):
        meant.ClearField(name)
    if meant.HasField("key_upsert"):
        meant.key_upsert.key.ClearField("secret_hash")
        meant.key_upsert.key.ClearField("created_ms")
    if meant.HasField("tenant_upsert"):
        # Zone rules are looked up when the command is made.
        meant.tenant_upsert.calendar.ClearField("from_month")
        meant.tenant_upsert.calendar.ClearField("offset_minutes")
    return meant.SerializeToString(deterministic=True)


def _future(call: Call, commander: Commander, command_id: str, name: str, at_ms: int) -> int:
    """A time to come. What is repeated may have been in time. Raises ApiError."""
    if 0 < at_ms <= call.now_ms and not commander.was_applied(call.reader, command_id):
        raise ApiError.unacceptable(f"{name}: is over already; send a time to come")
    return at_ms


def _grant(row: GrantRow, currency: str) -> Grant:
    return Grant(
        grant_id=row.grant_id,
        kind=row.kind,
        amount=money(row.amount_pico),
        used=money(row.used_pico),
        expired=money(row.expired_pico),
        left=money(row.left_pico),
        currency=currency,
        granted=to_time(row.granted_ms),
        expires=to_time(row.expires_ms),
        priority=row.priority,
        reference=row.reference,
    )


def _key(row: KeyRow, now_ms: int) -> KeyEntry:
    state = "in force"
    if row.revoked:
        state = "revoked"
    elif 0 < row.expires_ms <= now_ms:
        state = "expired"
    return KeyEntry(
        key_id=row.key_id,
        tenant_id=row.tenant_id,
        project_id=row.project_id,
        user_id=row.user_id,
        scopes=row.scopes,
        created=to_time(row.created_ms),
        expires=to_time(row.expires_ms),
        state=state,
    )
