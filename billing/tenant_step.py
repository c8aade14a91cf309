"""What commands about a tenant's life do: closing it, its projects, its budgets. The caller has found the tenant here."""

from __future__ import annotations

from billing.accounts import AccountState
from billing.amounts import format_pico, from_amount
from billing.commands import CommandRefused
from billing.limits import CLOSED_KEYS_MAX, ID_CHARS_MAX, PROJECTS_MAX
from billing.state import LedgerState
from billing.v1.account_pb2 import ACCOUNT_STATUS_CLOSED, KEY_SCOPE_METER, ApiKey, LedgerPosition, Plan, Project
from billing.v1.command_pb2 import BudgetUpsert, ProjectUpsert
from billing.v1.ledger_pb2 import LedgerRecord

_AMOUNT_PICO_MAX = 10**30
# Alerts state it in a signed field.
_PROMPT_TOKENS_MAX = 2**63 - 1


def plan_problem(plan: Plan) -> str:
    """What nobody downstream could hold, for a person; empty: nothing."""
    limit_pico = from_amount(plan.credit_limit)
    if not 0 <= limit_pico <= _AMOUNT_PICO_MAX:
        return f"credit_limit: {limit_pico} pico; give 0 to 10^18 units, 0 is no limit"
    if plan.prompt_tokens_max > _PROMPT_TOKENS_MAX:
        return f"prompt_tokens_max: {plan.prompt_tokens_max}; give at most {_PROMPT_TOKENS_MAX}, 0 is no limit"
    return ""


def close_tenant(state: LedgerState, account: AccountState, record: LedgerRecord, *, expire_credit: bool) -> str:
    """What a closed tenant has no use for: its keys are revoked, promotional credit expires. Returns what came of it.

    Usage that still comes is charged as ever. Credit that was paid for stays, to be paid back or used for what is due, unless
    `expire_credit`.
    """
    keys = [key for key in state.keys.values() if key.tenant_id == account.tenant_id and not key.revoked]
    for known in sorted(keys, key=lambda key: key.key_id)[:CLOSED_KEYS_MAX]:
        key = ApiKey()
        key.CopyFrom(known)
        key.revoked = True
        key.version.CopyFrom(LedgerPosition(generation=state.generation, sequence=record.sequence))
        state.keys[key.key_id] = key
        record.keys.append(key)
    expired_pico = state.credits.forfeit(account.tenant_id, account, record, paid_too=expire_credit)
    left_pico = account.balance_pico
    outcome = f"closed: {min(len(keys), CLOSED_KEYS_MAX)} key(s) revoked"
    if len(keys) > CLOSED_KEYS_MAX:
        outcome += f", {len(keys) - CLOSED_KEYS_MAX} are left: close it again"
    if expired_pico:
        outcome += f"; {format_pico(expired_pico, account.currency)} of credit expired"
    if left_pico > 0:
        outcome += f"; {format_pico(left_pico, account.currency)} that was paid for is left: pay it back, or expire it"
    elif left_pico < 0:
        outcome += f"; {format_pico(-left_pico, account.currency)} is owed"
    return outcome + "; usage that still comes is charged"


def check_key(state: LedgerState, account: AccountState, key: ApiKey) -> None:
    """Raises CommandRefused for a key that would open what is closed."""
    if key.revoked:
        return
    if account.status == ACCOUNT_STATUS_CLOSED:
        raise CommandRefused(f"tenant_id: {key.tenant_id} is closed; activate it before it gets keys")
    project = state.projects.get(key.tenant_id, {}).get(key.project_id)
    if project is not None and project.closed:
        raise CommandRefused(f"project_id: {key.project_id} is closed; open it before it gets keys")


def check_operator_key(key: ApiKey) -> None:
    """Raises CommandRefused for a key of no tenant, an operator's, that would meter: nobody would pay."""
    if KEY_SCOPE_METER in key.scopes or key.project_id or key.test:
        raise CommandRefused("key: one without a tenant meters nothing; name the tenant, or leave out meter, project and test")


def upsert_project(state: LedgerState, said: ProjectUpsert, record: LedgerRecord) -> None:
    """Create a project, name it, close it or open it again. Raises CommandRefused."""
    if not 0 < len(said.project_id) <= ID_CHARS_MAX:
        raise CommandRefused(f"project_id: {said.project_id[:32]!r}; give 1 to {ID_CHARS_MAX} characters")
    projects = state.projects.get(said.tenant_id, {})
    known = projects.get(said.project_id)
    if known is None and len(projects) >= PROJECTS_MAX:
        raise CommandRefused(f"tenant_id: {said.tenant_id} has {PROJECTS_MAX} projects, which is the most; use one of them")
    name = said.display_name[:ID_CHARS_MAX] or (known.display_name if known else "")
    project = Project(
        tenant_id=said.tenant_id,
        project_id=said.project_id,
        display_name=name,
        closed=said.closed,
        version=LedgerPosition(generation=state.generation, sequence=record.sequence),
    )
    state.projects.setdefault(said.tenant_id, {})[said.project_id] = project
    record.projects.append(project)


def upsert_budget(state: LedgerState, account: AccountState, said: BudgetUpsert, record: LedgerRecord) -> str:
    """Set, change or end a budget. Returns what there is to say about it. Raises CommandRefused."""
    known = state.budgets.find(said.tenant_id, said.project_id, said.user_id)
    done = state.budgets.upsert(said, account, record)
    if not done:
        return "there was no such budget"
    return "" if known else "it counts what is charged from now on"
