"""Keys, accounts, budgets and projects in memory, as the ledger last said it, followed from two compacted topics.

Writes come from the followers' threads, reads from the event loop. Each view is immutable and is replaced as a whole, so a
reader sees the old or the new one, never a mix. A version that is lower than the known one of the same generation is
ignored. A message that cannot be read changes nothing and is counted: one bad record must not lock every tenant out.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final
from urllib.parse import unquote

from google.protobuf.message import DecodeError

from billing.alerts import rule_name
from billing.amounts import from_amount
from billing.identity import partition_of
from billing.v1.account_pb2 import (
    BILLING_MODE_POSTPAID,
    Account,
    AccountUpdate,
    ApiKey,
    BudgetState,
    Lease,
    LedgerPosition,
    Project,
)
from serving.gateway.limits import NO_LIMITS, LimitsView, Scope, limits_view

__all__ = ["AccountView", "BudgetView", "Directory", "KeyView", "RestrictionView", "scopes_of"]

_NO_MODEL_LIMITS: Final[Mapping[str, LimitsView]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class KeyView:
    """An API key, without its secret."""

    key_id: str
    tenant_id: str
    project_id: str
    user_id: str
    scopes: frozenset[int]
    expires_ms: int
    revoked: bool
    test: bool = False
    limits: LimitsView = NO_LIMITS


@dataclass(frozen=True, slots=True)
class RestrictionView:
    """What an abuse rule does to a tenant, or to one of its keys."""

    rule: str
    alert_id: str
    key_id: str
    """Empty: the whole tenant."""
    requests_per_minute: int
    """0: nothing is let through."""
    until_ms: int

    def holds(self, key: KeyView, now_ms: int) -> bool:
        """Whether it is about this key, and has not expired."""
        return now_ms < self.until_ms and self.key_id in ("", key.key_id)

    def __str__(self) -> str:
        until = datetime.fromtimestamp(self.until_ms / 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return f"{self.rule} until {until} (alert {self.alert_id})"


@dataclass(frozen=True, slots=True)
class AccountView:
    """What admission must know of a tenant."""

    tenant_id: str
    status: int
    billing_mode: int
    currency: str
    balance_pico: int
    credit_limit_pico: int
    leased_pico: int = 0
    prompt_tokens_max: int = 0
    output_tokens_default: int = 0
    limits: LimitsView = NO_LIMITS
    model_limits: Mapping[str, LimitsView] = field(default_factory=lambda: _NO_MODEL_LIMITS)
    tell_price: bool = False
    shadow: bool = False
    """Nothing is refused for its sake; what would be is counted."""
    restrictions: tuple[RestrictionView, ...] = ()

    @property
    def free_pico(self) -> int | None:
        """What nobody holds of the tenant's money; None: nothing bounds it."""
        if self.billing_mode != BILLING_MODE_POSTPAID:
            return self.balance_pico - self.leased_pico
        return self.balance_pico + self.credit_limit_pico - self.leased_pico if self.credit_limit_pico else None


@dataclass(frozen=True, slots=True)
class BudgetView:
    """A budget that is used up and stops what comes."""

    project_id: str
    user_id: str
    amount_pico: int
    period_end_ms: int


def _nobody(_: object) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class _Version:
    generation: bytes
    sequence: int
    log_time_ms: int

    def yields_to(self, position: LedgerPosition, log_time_ms: int) -> bool:
        """Whether what `position` says is at least as new. Sequences compare within a generation; across generations
        log time does where it is known, because a ledger that was founded again starts at 0."""
        if position.generation == self.generation:
            return position.sequence >= self.sequence
        return log_time_ms >= self.log_time_ms


def _key_view(key: ApiKey) -> KeyView:
    return KeyView(
        key.key_id,
        key.tenant_id,
        key.project_id,
        key.user_id,
        frozenset(key.scopes),
        key.expires_ms,
        key.revoked,
        key.test,
        limits_view(key.limits),
    )


def _account_view(account: Account) -> AccountView:
    plan = account.plan
    return AccountView(
        tenant_id=account.tenant_id,
        status=account.status,
        billing_mode=plan.billing_mode,
        currency=account.currency,
        balance_pico=from_amount(account.credit) - from_amount(account.spend),
        credit_limit_pico=from_amount(plan.credit_limit),
        leased_pico=from_amount(account.leased),
        prompt_tokens_max=plan.prompt_tokens_max,
        output_tokens_default=plan.output_tokens_default,
        limits=limits_view(plan.limits),
        model_limits={entry.model: limits_view(entry.limits) for entry in plan.model_limits},
        tell_price=plan.tell_price,
        shadow=plan.shadow,
        restrictions=tuple(
            RestrictionView(rule_name(held.rule), held.alert_id, held.key_id, held.requests_per_minute, held.until_ms)
            for held in account.restrictions
        ),
    )


def scopes_of(key: KeyView, account: AccountView | None, model: str, now_ms: int) -> list[Scope]:
    """Whose limits hold for a request, those that there are: also what an abuse rule leaves of them."""
    found = []
    if key.limits is not NO_LIMITS:
        found.append(Scope("key", key.key_id, key.limits))
    if account is not None:
        if account.limits is not NO_LIMITS:
            found.append(Scope("tenant", account.tenant_id, account.limits))
        if (limits := account.model_limits.get(model)) is not None:
            found.append(Scope("model", f"{model} of tenant {account.tenant_id}", limits))
        if account.restrictions:
            found += [
                Scope("rule", str(held), LimitsView(requests_per_minute=held.requests_per_minute))
                for held in account.restrictions
                if held.requests_per_minute and held.holds(key, now_ms)
            ]
    return found


class Directory:
    """What is known of keys and accounts."""

    def __init__(self, partitions: int) -> None:
        # Called on the follower's thread, for every lease and for every account that has changed.
        self.on_lease: Callable[[Lease], None] = _nobody
        self.on_changed_account: Callable[[AccountView], None] = _nobody
        self._partitions = partitions
        self._keys: dict[str, tuple[_Version, bytes, KeyView]] = {}
        self._by_hash: dict[bytes, str] = {}
        self._accounts: dict[str, tuple[_Version, AccountView]] = {}
        # Project and user, "" for all of them, to the budget; and projects that are closed. By tenant: few have any.
        self._stops: dict[str, dict[tuple[str, str], BudgetView]] = {}
        self._closed: dict[str, set[str]] = {}
        self._versions: dict[tuple[str, ...], LedgerPosition] = {}
        self._log_times_ms: dict[int, int] = {}
        self.unreadable = 0

    def on_key(self, key: bytes, value: bytes, partition: int) -> None:
        """Take a message of `billing.keys`; an empty value takes the key away."""
        if not value:
            self._forget_key(key.decode(errors="replace"))
            return
        try:
            update = ApiKey.FromString(value)
        except DecodeError:
            self.unreadable += 1
            return
        known = self._keys.get(update.key_id)
        if known is not None and not known[0].yields_to(update.version, 0):
            return
        if known is not None and known[1] != update.secret_hash:
            self._by_hash.pop(known[1], None)
        if known is not None and known[2].revoked and known[1] == update.secret_hash:
            # A topic that is read again from its beginning tells an old generation's story first.
            update.revoked |= known[0].generation != update.version.generation
        version = _Version(update.version.generation, update.version.sequence, 0)
        self._keys[update.key_id] = (version, update.secret_hash, _key_view(update))
        self._by_hash[update.secret_hash] = update.key_id

    def _forget_key(self, key_id: str) -> None:
        known = self._keys.pop(key_id, None)
        if known is not None:
            self._by_hash.pop(known[1], None)

    def on_account(self, key: bytes, value: bytes, partition: int) -> None:
        """Take a message of `billing.accounts`: an account or a partition's tick."""
        if not value:
            # Within a name a slash is written "%2F": a key that has one is no account's.
            if b"/" not in key:
                self._accounts.pop(unquote(key.decode(errors="replace")), None)
            return
        try:
            update = AccountUpdate.FromString(value)
        except DecodeError:
            self.unreadable += 1
            return
        if update.HasField("tick"):
            self._see(update.tick.partition, update.tick.log_time_ms)
            return
        if update.HasField("lease"):
            self.on_lease(update.lease)
            return
        if update.HasField("budget"):
            self._on_budget(update.budget)
            return
        if update.HasField("project"):
            self._on_project(update.project)
            return
        if not update.HasField("account"):
            return
        account = update.account
        known = self._accounts.get(account.tenant_id)
        if known is not None and not known[0].yields_to(account.version, account.log_time_ms):
            return
        version = _Version(account.version.generation, account.version.sequence, account.log_time_ms)
        view = _account_view(account)
        self._accounts[account.tenant_id] = (version, view)
        self.on_changed_account(view)
        self._see(partition_of(account.tenant_id, self._partitions), account.log_time_ms)

    def _on_budget(self, budget: BudgetState) -> None:
        if self._is_older(("budget", budget.tenant_id, budget.project_id, budget.user_id), budget.version):
            return
        stops = dict(self._stops.get(budget.tenant_id, {}))
        stops.pop((budget.project_id, budget.user_id), None)
        if budget.hard_stop and budget.used_up and not budget.gone:
            view = BudgetView(budget.project_id, budget.user_id, from_amount(budget.amount), budget.period_end_ms)
            stops[budget.project_id, budget.user_id] = view
        if stops:
            self._stops[budget.tenant_id] = stops
        else:
            self._stops.pop(budget.tenant_id, None)

    def _on_project(self, project: Project) -> None:
        if self._is_older(("project", project.tenant_id, project.project_id), project.version):
            return
        closed = self._closed.get(project.tenant_id, set()) - {project.project_id}
        if project.closed:
            closed.add(project.project_id)
        if closed:
            self._closed[project.tenant_id] = closed
        else:
            self._closed.pop(project.tenant_id, None)

    def _is_older(self, name: tuple[str, ...], version: LedgerPosition) -> bool:
        """Whether something newer of the same generation is known; else `version` is what is known."""
        known = self._versions.get(name)
        if known is not None and known.generation == version.generation and version.sequence < known.sequence:
            return True
        self._versions[name] = version
        return False

    def _see(self, partition: int, log_time_ms: int) -> None:
        if log_time_ms > self._log_times_ms.get(partition, 0):
            self._log_times_ms[partition] = log_time_ms

    def find_key(self, secret_hash: bytes) -> KeyView | None:
        """The key whose secret has this hash."""
        known = self._keys.get(self._by_hash.get(secret_hash, ""))
        # The look-up runs over a keyed hash, which nobody outside can steer; the comparison takes the same time anyway.
        if known is None or not hmac.compare_digest(known[1], secret_hash):
            return None
        return known[2]

    def find_account(self, tenant_id: str) -> AccountView | None:
        """The tenant's account."""
        known = self._accounts.get(tenant_id)
        return None if known is None else known[1]

    def find_stop(self, key: KeyView, now_ms: int) -> BudgetView | None:
        """The budget that stops what comes with this key, if one does."""
        stops = self._stops.get(key.tenant_id)
        if stops is None:
            return None
        for place in (("", ""), (key.project_id, ""), ("", key.user_id)):
            stop = stops.get(place)
            # When the period is over, it stops nothing, though the ledger has not begun the next one yet.
            if stop is not None and now_ms < stop.period_end_ms:
                return stop
        return None

    def is_closed(self, tenant_id: str, project_id: str) -> bool:
        """Whether the tenant's project is closed."""
        return project_id in self._closed.get(tenant_id, ())

    def log_time_ms(self, tenant_id: str) -> int:
        """When the ledger partition of the tenant last said something; 0: never."""
        return self._log_times_ms.get(partition_of(tenant_id, self._partitions), 0)

    def counts(self) -> dict[str, int]:
        """How much is known, for metrics."""
        return {
            "directory_keys": len(self._keys),
            "directory_accounts": len(self._accounts),
            "directory_unreadable": self.unreadable,
        }
