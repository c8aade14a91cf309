"""Credit: top-ups, what an account consists of and why it is refused, and the bookkeeper's report."""

import csv
import io
from typing import Annotated, Final

import typer

from billing.amounts import format_pico
from billing.periods import month_start_ms
from sinks import account_queries
from sinks.account_queries import BudgetRow, CreditMonths, GrantRow, LeaseRow, Money
from sinks.rows import Balance
from taximeter.commanding import Commander, CreditTerms
from taximeter.commands.accounts import TenantArgument, expiry, issuer, read_amount, tell
from taximeter.commands.common import Context, JsonOption, command
from taximeter.commands.tenants import budget_values, known_account
from taximeter.compose import open_reader
from taximeter.errors import MisuseError
from taximeter.times import now_ms, parse_month, show_month, show_time
from taximeter.topups import top_up

__all__ = ["report_credit", "show_account", "topup_credit"]

_DAY_MS: Final = 86_400_000
_REPORT: Final = ("tenant_id", "currency", "kind", "opening", "granted", "used", "expired", "closing", "deferred")


@command
def topup_credit(
    context: Context,
    tenant: TenantArgument,
    amount: Annotated[str, typer.Argument(help="What was paid, like 25 or 12.50, in the tenant's currency.")],
    grant_id: Annotated[str, typer.Option("--grant-id", help="The payment's ID at the provider: a repeat changes nothing.")],
    reference: Annotated[str, typer.Option(help="For people: the receipt's number.")] = "",
    expires: Annotated[str, typer.Option(help="When what is left of it ends: 2027-01-01T00:00:00Z.")] = "",
    json: JsonOption = False,
) -> None:
    """Add credit that was paid for, once however often it is asked for; each time the answer is the same."""
    amount_pico = read_amount("AMOUNT", amount)
    if amount_pico <= 0 or not grant_id:
        raise MisuseError("AMOUNT, --grant-id: write more than 0, and the payment's ID")
    terms = CreditTerms(grant_id=grant_id, reference=reference, expires_ms=expiry(expires))
    config = context.config()
    with open_reader(config) as reader:
        done = top_up(Commander(config, issuer()), reader, tenant, amount_pico, terms)
    values: dict[str, object] = {
        "tenant_id": done.tenant_id,
        "grant_id": done.grant_id,
        "amount": _decimal(done.amount_pico),
        "currency": done.currency,
        "granted": show_time(done.granted_ms),
        "expires": show_time(done.expires_ms),
    }
    tell(context, values, json=json)


@command
def show_account(context: Context, tenant: TenantArgument, json: JsonOption = False) -> None:
    """Show what a balance consists of: credit by grant, who holds what, budgets; and what is refused, and why."""
    with open_reader(context.config()) as reader:
        account = known_account(reader, tenant)
        money = account_queries.money(reader, tenant)
        grants = account_queries.grants(reader, tenant)
        leases = account_queries.leases(reader, tenant)
        budgets = account_queries.budgets(reader, tenant)
        closed = [name for name, _, is_closed in account_queries.projects(reader, tenant) if is_closed]
        refused = account_queries.refusals(reader, tenant, now_ms() - _DAY_MS)
    values: dict[str, object] = {
        "tenant_id": tenant,
        "status": account.status,
        "mode": account.billing_mode,
        "currency": account.currency,
        "credit": _decimal(account.credit_pico),
        "spend": _decimal(account.spend_pico),
        "balance": _decimal(account.balance_pico),
        "credit_limit": _decimal(money.credit_limit_pico),
        "leased": _decimal(money.leased_pico),
        "free": _decimal(_free_pico(account, money)),
        "due": _decimal(money.due_pico),
        "not_set_against_grants": _decimal(account.spend_pico - money.allocated_pico) if grants else "0.00",
    }
    refusals = _refusals(account, money, leases, budgets, closed)
    if json:
        context.output.json(
            {
                **values,
                "grants": [_grant_values(grant) for grant in grants],
                "leases": [_lease_values(lease) for lease in leases],
                "budgets": [budget_values(budget, account.currency) for budget in budgets],
                "refuses": refusals,
                "refused_in_24_h": refused,
            }
        )
        return
    output = context.output
    output.pairs(tenant, {name.replace("_", " "): value for name, value in values.items()})
    if grants:
        output.table("credit", _columns(_grant_values(grants[0])), [tuple(_grant_values(each).values()) for each in grants])
    if leases:
        output.table("leased to", _columns(_lease_values(leases[0])), [tuple(_lease_values(each).values()) for each in leases])
    for budget in budgets:
        output.say(
            f"budget of {budget.name}: {format_pico(budget.spend_pico, account.currency)} of "
            f"{format_pico(budget.amount_pico, account.currency)} until {show_time(budget.period_end_ms)}"
        )
    for line in refusals or ["nothing is refused now"]:
        output.say(line)
    if refused:
        output.say("refused in the last 24 h: " + ", ".join(f"{count:,} by {reason}" for reason, count in refused.items()))


@command
def report_credit(
    context: Context,
    start: Annotated[str, typer.Option("--from", help="The first month: 2026-01.")],
    end: Annotated[str, typer.Option("--to", help="The last month, which is over: 2026-03.")],
    tenant: Annotated[str | None, typer.Option(help="One tenant; without: all.")] = None,
    csv_: Annotated[bool, typer.Option("--csv", help="Comma-separated values, for a spreadsheet.")] = False,
    json: JsonOption = False,
) -> None:
    """Show deferred revenue and expired credit by tenant and kind: opening + granted - used - expired = closing."""
    first, last = parse_month(start, "--from"), parse_month(end, "--to")
    if first > last:
        raise MisuseError(f"--from {start} is after --to {end}: name the earlier month first")
    if month_start_ms(last + 1) > now_ms() - _DAY_MS:
        raise MisuseError(f"--to {end} is not over in every time zone: name an earlier month")
    with open_reader(context.config()) as reader:
        rows = account_queries.credit_report(reader, first, last, tenant)
    values = [_report_values(row) for row in rows]
    if json:
        context.output.json({"from": show_month(first), "to": show_month(last), "rows": values})
    elif csv_:
        text = io.StringIO()
        writer = csv.DictWriter(text, _REPORT, lineterminator="\n")
        writer.writeheader()
        writer.writerows(values)
        context.output.say(text.getvalue().rstrip("\n"))
    else:
        title = f"credit from {show_month(first)} to {show_month(last)}, months of each tenant's zone"
        columns = [f"{name} " if name in _REPORT[3:8] else name for name in _REPORT]
        context.output.table(title, columns, [tuple(value.values()) for value in values], empty="no credit in these months")


def _free_pico(account: Balance, money: Money) -> int:
    return account.balance_pico + money.credit_limit_pico - money.leased_pico


def _refusals(account: Balance, money: Money, leases: list[LeaseRow], budgets: list[BudgetRow], closed: list[str]) -> list[str]:
    """Why gateways would refuse a request that comes now, a sentence each."""
    found = []
    if account.status != "active":
        found.append(f"every request is refused: the account is {account.status}")
    unlimited = account.billing_mode == "postpaid" and not money.credit_limit_pico
    left_pico = account.balance_pico + money.credit_limit_pico
    if not unlimited and left_pico <= 0:
        used = format_pico(account.spend_pico, account.currency)
        has = format_pico(account.credit_pico + money.credit_limit_pico, account.currency)
        found.append(f"every request is refused: {used} of {has} are spent; add credit")
    elif not unlimited and _free_pico(account, money) <= 0:
        holders = ", ".join(sorted({lease.holder_id for lease in leases if lease.held_pico}))
        found.append(
            f"a request that needs more than its gateway has at hand is refused: all that is left is leased to {holders}; "
            "wait, or add credit"
        )
    found += [
        f"requests of {budget.name} are refused until {show_time(budget.period_end_ms)}: the budget of "
        f"{format_pico(budget.amount_pico, account.currency)} is used up; raise it with `taximeter budget set`"
        for budget in budgets
        if budget.used_up and budget.hard_stop
    ]
    found += [f"requests with keys of project {name} are refused: it is closed" for name in closed]
    return found


def _grant_values(grant: GrantRow) -> dict[str, object]:
    return {
        "grant_id": grant.grant_id,
        "kind": grant.kind,
        "priority": grant.priority,
        "granted": show_time(grant.granted_ms),
        "expires": show_time(grant.expires_ms),
        "amount": _decimal(grant.amount_pico),
        "used": _decimal(grant.used_pico),
        "expired": _decimal(grant.expired_pico),
        "left": _decimal(grant.left_pico),
        "reference": grant.reference,
    }


def _lease_values(lease: LeaseRow) -> dict[str, object]:
    return {
        "holder_id": lease.holder_id,
        "granted": _decimal(lease.granted_pico),
        "settled": _decimal(lease.charged_pico),
        "reserved_or_at_hand": _decimal(lease.held_pico),
        "expires": show_time(lease.expires_ms),
        "of_an_earlier_start": lease.ended,
    }


def _report_values(row: CreditMonths) -> dict[str, str]:
    amounts = (row.opening_pico, row.granted_pico, row.used_pico, row.expired_pico, row.closing_pico)
    texts = (row.tenant_id, row.currency, row.kind, *map(_decimal, amounts), "yes" if row.deferred else "no")
    return dict(zip(_REPORT, texts, strict=True))


def _columns(values: dict[str, object]) -> list[str]:
    return [name.replace("_", " ") for name in values]


def _decimal(pico: int) -> str:
    return format_pico(pico).replace(",", "")
