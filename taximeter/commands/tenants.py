"""Commands about a tenant's life: suspended, closed, its projects, its budgets."""

from typing import Annotated, Final

import typer

from billing.amounts import format_pico, to_amount
from billing.v1.account_pb2 import ACCOUNT_STATUS_ACTIVE, ACCOUNT_STATUS_CLOSED, ACCOUNT_STATUS_SUSPENDED, AccountStatus
from billing.v1.command_pb2 import BudgetUpsert, Command
from sinks import account_queries, queries
from sinks.engine import Reader
from sinks.rated_usage import payers
from sinks.rows import Balance
from taximeter.commanding import Commander
from taximeter.commands.accounts import TenantArgument, issuer, read_amount, tell
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import open_reader
from taximeter.errors import MisuseError, TaximeterError
from taximeter.times import show_time

__all__ = [
    "activate_tenant",
    "close_project",
    "close_tenant",
    "create_project",
    "list_budgets",
    "set_budget",
    "show_tenant",
    "suspend_tenant",
]

ReasonOption = Annotated[str, typer.Option(help="Why, for the audit.")]
ProjectArgument = Annotated[str, typer.Argument(help="The project.")]
_WHOLE: Final = 1_000_000


@command
def suspend_tenant(context: Context, tenant: TenantArgument, reason: ReasonOption = "", json: JsonOption = False) -> None:
    """Let gateways refuse a tenant. Keys, credit and budgets stay; usage that still comes is charged."""
    _set_status(context, tenant, ACCOUNT_STATUS_SUSPENDED, reason, json=json)


@command
def activate_tenant(context: Context, tenant: TenantArgument, reason: ReasonOption = "", json: JsonOption = False) -> None:
    """Let a tenant that was suspended or closed go on. Keys that were revoked stay so."""
    _set_status(context, tenant, ACCOUNT_STATUS_ACTIVE, reason, json=json)


@command
def close_tenant(
    context: Context,
    tenant: TenantArgument,
    reason: ReasonOption = "",
    expire_credit: Annotated[
        bool, typer.Option("--expire-credit", help="Also credit that was paid for expires: it was paid back, or is given up.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Close a tenant: its keys are revoked, promotional credit expires, paid credit stays, late usage is charged."""
    _set_status(context, tenant, ACCOUNT_STATUS_CLOSED, reason, expire_credit=expire_credit, json=json)


@command
def show_tenant(context: Context, tenant: TenantArgument, json: JsonOption = False) -> None:
    """Show who a tenant is: plan, months, projects, keys, budgets."""
    with open_reader(context.config()) as reader:
        account = known_account(reader, tenant)
        [payer] = payers(reader, tenant)
        projects = account_queries.projects(reader, tenant)
        values: dict[str, object] = {
            "tenant_id": tenant,
            "name": account.display_name,
            "status": account.status,
            "plan": account.plan_id,
            "currency": account.currency,
            "months_begin_in": payer.calendar.time_zone or "UTC",
            "keys": account_queries.key_count(reader, tenant),
            "budgets": len(account_queries.budgets(reader, tenant)),
            "balance": format_pico(account.balance_pico, account.currency),
        }
    shown = [{"project_id": name, "name": display, "closed": closed} for name, display, closed in projects]
    if json:
        context.output.json({**values, "projects": shown})
        return
    tell(context, values, json=False)
    context.output.table("projects", ("project", "name", "closed"), [tuple(row.values()) for row in shown], empty="no projects")


@command
def create_project(
    context: Context,
    tenant: TenantArgument,
    project: ProjectArgument,
    name: Annotated[str, typer.Option(help="Its name for people.")] = "",
    json: JsonOption = False,
) -> None:
    """Create a project, name it, or open it again."""
    commander = Commander(context.config(), issuer())
    with open_reader(context.config()) as reader:
        commander.give([commander.project(tenant, project, name, closed=False)], reader)
    tell(context, {"tenant_id": tenant, "project_id": project, "closed": False}, json=json)


@command
def close_project(context: Context, tenant: TenantArgument, project: ProjectArgument, json: JsonOption = False) -> None:
    """Let gateways refuse the keys of a project. Its usage stays on invoices; usage that still comes is charged."""
    commander = Commander(context.config(), issuer())
    with open_reader(context.config()) as reader:
        commander.give([commander.project(tenant, project, "", closed=True)], reader)
    tell(context, {"tenant_id": tenant, "project_id": project, "closed": True}, json=json)


@command
def set_budget(
    context: Context,
    tenant: TenantArgument,
    amount: Annotated[str, typer.Argument(help="How much a month, like 25 or 12.50; 0 ends the budget.")],
    project: Annotated[str, typer.Option(help="Of this project.")] = "",
    user: Annotated[str, typer.Option(help="Of this user.")] = "",
    warn_at: Annotated[list[str] | None, typer.Option(help="Percent; each warns once a month (default: 80 and 100).")] = None,
    hard_stop: Annotated[bool, typer.Option("--hard-stop", help="Gateways refuse what comes when it is used up.")] = False,
    json: JsonOption = False,
) -> None:
    """Set how much a tenant, or a project or a user of it, may spend in a month of the tenant's zone."""
    upsert = BudgetUpsert(
        tenant_id=tenant,
        project_id=project,
        user_id=user,
        amount=to_amount(read_amount("AMOUNT", amount)),
        threshold_millionths=[_threshold(text) for text in (("80", "100") if warn_at is None else warn_at)],
        hard_stop=hard_stop,
    )
    commander = Commander(context.config(), issuer())
    said = commander.budget(upsert)
    with open_reader(context.config()) as reader:
        values = _give(commander, reader, said)
        rows = [row for row in account_queries.budgets(reader, tenant) if (row.project_id, row.user_id) == (project, user)]
        currency = known_account(reader, tenant).currency
    values |= {"tenant_id": tenant, "budgets": [budget_values(row, currency) for row in rows]}
    if json:
        context.output.json(values)
    else:
        _print_budgets(context, rows, currency)


@command
def list_budgets(context: Context, tenant: TenantArgument, json: JsonOption = False) -> None:
    """Show a tenant's budgets and what they have seen this month."""
    with open_reader(context.config()) as reader:
        currency = known_account(reader, tenant).currency
        rows = account_queries.budgets(reader, tenant)
    if json:
        context.output.json([budget_values(row, currency) for row in rows])
    else:
        _print_budgets(context, rows, currency)


def known_account(reader: Reader, tenant: str) -> Balance:
    """The tenant's account. Raises TaximeterError where there is none."""
    account = next(iter(queries.balances(reader, tenant)), None)
    if account is None:
        raise TaximeterError(f"tenant {tenant!r} is not known: create it with `taximeter tenant create {tenant}`")
    return account


def budget_values(row: account_queries.BudgetRow, currency: str) -> dict[str, object]:
    """A budget for programs."""
    return {
        "project_id": row.project_id,
        "user_id": row.user_id,
        "amount": format_pico(row.amount_pico).replace(",", ""),
        "spend": format_pico(row.spend_pico).replace(",", ""),
        "currency": currency,
        "warns_at_percent": [str(threshold / (_WHOLE // 100)) for threshold in row.thresholds_millionths],
        "hard_stop": row.hard_stop,
        "used_up": row.used_up,
        "period_start": show_time(row.period_start_ms),
        "period_end": show_time(row.period_end_ms),
    }


def _print_budgets(context: Context, rows: list[account_queries.BudgetRow], currency: str) -> None:
    context.output.table(
        "",
        ("of", "a month ", "spent ", "used up", "stops", "until"),
        [
            (
                row.name,
                format_pico(row.amount_pico, currency),
                format_pico(row.spend_pico, currency),
                row.used_up,
                row.hard_stop,
                show_time(row.period_end_ms),
            )
            for row in rows
        ],
        empty="no budgets",
    )


def _set_status(
    context: Context, tenant: str, status: AccountStatus.ValueType, reason: str, *, expire_credit: bool = False, json: bool
) -> None:
    commander = Commander(context.config(), issuer())
    with open_reader(context.config()) as reader:
        known_account(reader, tenant)
        values = _give(commander, reader, commander.status(tenant, status, reason, expire_credit=expire_credit))
        values = {"tenant_id": tenant, "status": queries.balances(reader, tenant)[0].status, **values}
    tell(context, values, json=json)


def _give(commander: Commander, reader: Reader, said: Command) -> dict[str, object]:
    commander.give([said], reader)
    outcome = commander.outcome(reader, said.command_id)
    return {"outcome": outcome} if outcome else {}


def _threshold(text: str) -> int:
    try:
        millionths = round(float(text.rstrip("%")) * (_WHOLE // 100))
    except (ValueError, OverflowError):
        raise MisuseError(f"--warn-at {text!r} is no number: write percent, like 80") from None
    if not 0 < millionths <= 10 * _WHOLE:
        raise MisuseError(f"--warn-at {text!r}: write more than 0 and at most 1000 percent")
    return millionths
