"""Commands that people and programs give: made, sent to the ledger, and followed until it says what became of them.

Promise: `give` returns when every partition that a command concerns has applied it and the database shows so; it raises
`CommandRefused` with the ledger's own words when one refused it, and `CommandPending` when no word came in time. Then
the command may still be applied, and giving it again under the same ID is harmless. The command line and the API both give
their commands through here.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from billing.amounts import to_amount
from billing.limits import SCHEMA_VERSION
from billing.v1.account_pb2 import (
    BILLING_MODE_POSTPAID,
    BILLING_MODE_PREPAID,
    KEY_SCOPE_METER,
    AccountStatus,
    ApiKey,
    Calendar,
    KeyScope,
    Limits,
    ModelLimits,
    Plan,
    ProducerRegistration,
    RuleLimits,
)
from billing.v1.command_pb2 import (
    Adjustment,
    AlertAcknowledgement,
    BudgetUpsert,
    Command,
    CreditGrant,
    InvoiceFinalization,
    KeyUpsert,
    LeaseRetirement,
    PriceBook,
    ProducerUpsert,
    ProjectUpsert,
    RulesChange,
    TenantUpsert,
    UserErasure,
)
from billing.v1.invoice_pb2 import CREDIT_KIND_PAID, CreditKind
from billing.v1.ledger_pb2 import LedgerRecord
from producers.commands import CommandSender, CommandSettings, tenant_of
from serving.gateway.credentials import hash_secret
from sinks.errors import EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from billing.key_ring import Keys
    from sinks.engine import Reader

__all__ = ["CommandError", "CommandPending", "CommandRefused", "Commander", "CreditTerms", "NewKey", "PlanTerms"]

_LOOK_S: Final = 0.1
_KEY_PREFIX: Final = "tm-"
_SECRET_BYTES: Final = 32
_RECORDS_SQL: Final = """
SELECT hex(record) FROM ledger_records FINAL WHERE (ledger_partition, generation, sequence) IN
(SELECT ledger_partition, generation, sequence FROM commands FINAL WHERE command_id = {id:String} AND applied = 1) LIMIT 1
"""
_COMMANDS_SQL: Final = """
SELECT command_id, ledger_partition, applied, refusal FROM commands FINAL
WHERE command_id IN {ids:Array(String)} ORDER BY command_id, ledger_partition, applied
"""


class CommandError(Exception):
    """A command did not take effect, as far as is known; the text says why and what to do."""


class CommandRefused(CommandError):
    """The ledger refused it, in its own words; giving it again changes nothing."""


class CommandPending(CommandError):
    """The ledger has not said what became of it; it may still be applied, and giving it again is harmless."""


@dataclass(frozen=True, slots=True)
class PlanTerms:
    """What a tenant's plan says; zero is no limit."""

    prepaid: bool = True
    prompt_tokens_max: int = 0
    output_tokens_default: int = 0
    # None, and what `rules` does not say: as the ledger was founded.
    burst_tokens_floor: int | None = None
    burst_factor: int | None = None
    duplicate_flood_events: int | None = None
    credit_limit_pico: int = 0
    limits: Limits | None = None
    model_limits: Mapping[str, Limits] = field(default_factory=dict)
    tell_price: bool = False
    shadow: bool = False
    rules: RuleLimits | None = None

    def to_plan(self) -> Plan:
        return Plan(
            plan_id="prepaid" if self.prepaid else "postpaid",
            billing_mode=BILLING_MODE_PREPAID if self.prepaid else BILLING_MODE_POSTPAID,
            prompt_tokens_max=self.prompt_tokens_max,
            output_tokens_default=self.output_tokens_default,
            burst_tokens_floor=self.burst_tokens_floor,
            burst_factor=self.burst_factor,
            duplicate_flood_events=self.duplicate_flood_events,
            credit_limit=to_amount(self.credit_limit_pico),
            limits=self.limits,
            model_limits=[ModelLimits(model=model, limits=limits) for model, limits in sorted(self.model_limits.items())],
            tell_price=self.tell_price,
            shadow=self.shadow,
            rules=self.rules,
        )


@dataclass(frozen=True, slots=True)
class CreditTerms:
    """What there is to a grant beside its amount."""

    grant_id: str = ""
    kind: CreditKind.ValueType = CREDIT_KIND_PAID
    expires_ms: int = 0
    priority: int = 0
    reference: str = ""


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key and its secret, which is nowhere else."""

    key_id: str
    secret: str
    command: Command

    def __repr__(self) -> str:
        return f"NewKey({self.key_id!r})"


class Commander:
    """Gives commands in the name of `issuer`."""

    def __init__(self, settings: CommandSettings, command_key: Keys, key_pepper: Callable[[], bytes], issuer: str) -> None:
        """`key_pepper` is asked for only when a key is made: who gives other commands need not know it."""
        self._partitions = settings.partitions
        self._key_pepper = key_pepper
        self._issuer = issuer
        self._sender = CommandSender(settings, command_key)

    def tenant(
        self,
        tenant_id: str,
        name: str,
        currency: str,
        plan: PlanTerms | None,
        *,
        calendar: Calendar | None = None,
        command_id: str = "",
        reason: str = "",
    ) -> Command:
        """Create a tenant, or change its plan, or when its months begin."""
        upsert = TenantUpsert(tenant_id=tenant_id, display_name=name, currency=currency, calendar=calendar)
        if plan is not None:
            upsert.plan.CopyFrom(plan.to_plan())
        return self._command(command_id, reason, tenant_upsert=upsert)

    def status(
        self,
        tenant_id: str,
        status: AccountStatus.ValueType,
        reason: str,
        *,
        expire_credit: bool = False,
        command_id: str = "",
    ) -> Command:
        """Suspend a tenant, close it, or let it go on."""
        upsert = TenantUpsert(tenant_id=tenant_id, status=status, expire_credit=expire_credit)
        return self._command(command_id, reason, tenant_upsert=upsert)

    def credit(
        self,
        tenant_id: str,
        amount_pico: int,
        currency: str,
        reason: str,
        terms: CreditTerms | None = None,
        *,
        command_id: str = "",
    ) -> Command:
        """Grant credit. With a grant ID in `terms` a repeat is harmless, whatever the command's ID."""
        terms = terms or CreditTerms()
        grant = CreditGrant(
            tenant_id=tenant_id,
            amount=to_amount(amount_pico),
            currency=currency,
            grant_id=terms.grant_id,
            kind=terms.kind,
            expires_ms=terms.expires_ms,
            priority=terms.priority,
            reference=terms.reference,
        )
        return self._command(command_id, reason, credit_grant=grant)

    def project(self, tenant_id: str, project_id: str, name: str, *, closed: bool) -> Command:
        """Create, name, close or open a project."""
        upsert = ProjectUpsert(tenant_id=tenant_id, project_id=project_id, display_name=name, closed=closed)
        return self._command("", "", project_upsert=upsert)

    def budget(self, upsert: BudgetUpsert) -> Command:
        """Set, change or end a budget."""
        return self._command("", "", budget_upsert=upsert)

    def key(
        self,
        tenant_id: str,
        project_id: str = "",
        user_id: str = "",
        scopes: Sequence[KeyScope.ValueType] = (KEY_SCOPE_METER,),
        expires_ms: int = 0,
        *,
        test: bool = False,
        limits: Limits | None = None,
        key_id: str = "",
        command_id: str = "",
    ) -> NewKey:
        """A new key; its secret is in the answer and nowhere else."""
        key_id = key_id or f"key-{secrets.token_hex(8)}"
        secret = _KEY_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        key = ApiKey(
            key_id=key_id,
            tenant_id=tenant_id,
            project_id=project_id,
            user_id=user_id,
            secret_hash=hash_secret(self._key_pepper(), secret),
            scopes=scopes,
            created_ms=_now_ms(),
            expires_ms=expires_ms,
            test=test,
            limits=limits,
        )
        return NewKey(key_id, secret, self._command(command_id, "", key_upsert=KeyUpsert(key=key)))

    def changed_key(self, known: ApiKey, reason: str = "", *, command_id: str = "", **changes: Any) -> Command:
        """The key as it is, with some of its fields set."""
        key = ApiKey()
        key.CopyFrom(known)
        key.ClearField("version")
        for name, value in changes.items():
            setattr(key, name, value)
        return self._command(command_id, reason, key_upsert=KeyUpsert(key=key))

    def erasure(self, tenant_id: str, user_digest: bytes, pseudonym: str, key_ids: Sequence[str], reason: str) -> Command:
        """Take a user out of what is kept outside of the log."""
        said = UserErasure(tenant_id=tenant_id, user_digest=user_digest, pseudonym=pseudonym, key_ids=key_ids)
        return self._command("", reason, user_erasure=said)

    def prices(self, book: PriceBook, *, command_id: str = "") -> Command:
        """A version of the price book, for every partition."""
        return self._command(command_id, "", price_book=book)

    def adjustment(self, said: Adjustment, reason: str, command_id: str) -> Command:
        """A correction; its ID is the one that its lines name."""
        return self._command(command_id, reason, adjustment=said)

    def invoice(self, said: InvoiceFinalization, *, command_id: str = "") -> Command:
        """Draw an invoice, or a draft of it."""
        return self._command(command_id, "", invoice_finalization=said)

    def producer(self, registration: ProducerRegistration, reason: str = "") -> Command:
        """Register a producer, or revoke it, in every partition."""
        return self._command("", reason, producer_upsert=ProducerUpsert(registration=registration))

    def rules(self, change: RulesChange, reason: str, *, command_id: str = "") -> Command:
        """Change when the abuse rules speak, in every partition."""
        return self._command(command_id, reason, rules_change=change)

    def acknowledgement(self, alert_id: str, note: str, *, command_id: str = "") -> Command:
        """Take an alert on."""
        return self._command(command_id, "", alert_acknowledgement=AlertAcknowledgement(alert_id=alert_id, note=note))

    def lease_retirement(self, holder_id: str, *, unexpired: bool) -> Command:
        """Give up on a gateway, in every partition."""
        return self._command("", "", lease_retirement=LeaseRetirement(holder_id=holder_id, unexpired=unexpired))

    def send(self, commands: Sequence[Command]) -> None:
        """Send, without waiting for what becomes of them."""
        for command in commands:
            self._sender.send(command)

    def give(self, commands: Sequence[Command], reader: Reader, timeout_s: float = 30.0) -> None:
        """Send, and wait until the ledger has applied all of them."""
        self.send(commands)
        wanted = {command.command_id: self._partitions if tenant_of(command) is None else 1 for command in commands}
        deadline_s = time.monotonic() + timeout_s
        while True:
            missing = self._missing(reader, wanted)
            if not missing:
                return
            if time.monotonic() >= deadline_s:
                raise CommandPending(
                    f"{len(missing)} of {len(wanted)} commands were sent, but the database does not show them after "
                    f"{timeout_s:g} s ({', '.join(missing[:3])}): see `taximeter doctor`; they may still be applied"
                )
            time.sleep(_LOOK_S)

    def outcome(self, reader: Reader, command_id: str) -> str:
        """What the ledger had to say of a command that it applied; after `give`."""
        sql = "SELECT outcome FROM commands FINAL WHERE command_id = {id:String} AND applied = 1 LIMIT 1"
        rows = reader.query(sql, {"id": command_id}).rows
        return str(rows[0][0]) if rows else ""

    def was_applied(self, reader: Reader, command_id: str) -> bool:
        """Whether a command of this ID took effect before, in any partition."""
        return any(row[2] for row in reader.query(_COMMANDS_SQL, {"ids": [command_id]}).rows)

    def applied(self, reader: Reader, command_id: str) -> Command | None:
        """The command of this ID as the ledger applied it, whoever gave it; None: none was."""
        rows = reader.query(_RECORDS_SQL, {"id": command_id}).rows
        if not rows:
            return None
        record = LedgerRecord.FromString(bytes.fromhex(str(rows[0][0])))
        return Command.FromString(record.command.command)

    def _missing(self, reader: Reader, wanted: Mapping[str, int]) -> list[str]:
        try:
            rows = reader.query(_COMMANDS_SQL, {"ids": list(wanted)}).rows
        except EngineUnavailable:
            return list(wanted)
        answers: dict[str, dict[int, tuple[bool, str]]] = {}
        for command_id, partition, applied, refusal in rows:
            assert isinstance(partition, int)
            # Of several rows of one partition, one that was applied stands: the others are repeats.
            answers.setdefault(str(command_id), {})[partition] = (bool(applied), str(refusal))
        for command_id, partitions in answers.items():
            for partition, (applied, refusal) in partitions.items():
                if not applied:
                    raise CommandRefused(f"the ledger refused command {command_id} in partition {partition}: {refusal}")
        return [command_id for command_id, count in wanted.items() if len(answers.get(command_id, {})) < count]

    def _command(self, command_id: str, reason: str, **action: object) -> Command:
        return Command(
            schema_version=SCHEMA_VERSION,
            command_id=command_id or f"cli-{secrets.token_hex(12)}",
            issued_ms=_now_ms(),
            issuer=self._issuer,
            reason=reason,
            **action,  # type: ignore[arg-type]  # one of the actions, each by its own type
        )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
