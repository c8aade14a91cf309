"""Commands to the ledger: tenants, keys, credit. Each waits until the ledger says what became of it."""

import getpass
import re
import socket
from typing import Annotated, Final

import typer

from billing.amounts import AmountError, format_pico, parse_decimal_to_pico
from billing.limits import ID_CHARS_MAX
from billing.v1.account_pb2 import KeyScope
from sinks import queries
from taximeter.commanding import Commander, PlanTerms
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import open_reader
from taximeter.errors import MisuseError, TaximeterError
from taximeter.times import now_ms, parse_time_ms, show_time

__all__ = ["create_key", "create_tenant", "grant_credit", "issuer"]

_ID: Final = re.compile(r"[^\s/\x00-\x1f][^\x00-\x1f]*")
_SCOPES: Final = {name.removeprefix("KEY_SCOPE_").lower(): number for name, number in KeyScope.items() if number}
TenantArgument = Annotated[str, typer.Argument(help="The tenant.")]


@command
def create_tenant(
    context: Context,
    tenant: TenantArgument,
    name: Annotated[str, typer.Option(help="Its name for people.")] = "",
    currency: Annotated[str, typer.Option(help="What it is billed in.")] = "USD",
    postpaid: Annotated[
        bool, typer.Option("--postpaid", help="Billed afterwards; else refused when its credit is used.")
    ] = False,
    credit_limit: Annotated[str, typer.Option(help="Postpaid: refused beyond; 0: no limit.")] = "0",
    prompt_tokens_max: Annotated[int, typer.Option(min=0, help="Larger prompts are refused; 0: no limit.")] = 0,
    json: JsonOption = False,
) -> None:
    """Create a tenant, or change its plan."""
    _check_id("TENANT", tenant)
    terms = PlanTerms(
        prepaid=not postpaid,
        prompt_tokens_max=prompt_tokens_max,
        credit_limit_pico=_amount("--credit-limit", credit_limit),
    )
    config = context.config()
    commander = Commander(config, issuer())
    with open_reader(config) as reader:
        commander.give([commander.tenant(tenant, name, currency, terms)], reader)
    _tell(context, {"tenant_id": tenant, "plan": "postpaid" if postpaid else "prepaid", "currency": currency}, json=json)


@command
def create_key(
    context: Context,
    tenant: TenantArgument,
    project: Annotated[str, typer.Option(help="What it is for; stands on every request.")] = "",
    user: Annotated[str, typer.Option(help="Who holds it; stands on every request.")] = "",
    scope: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(_SCOPES)} (default: meter).")] = None,
    expires: Annotated[str, typer.Option(help="When it ends: 2026-12-31T00:00:00Z.")] = "",
    json: JsonOption = False,
) -> None:
    """Make an API key. Its secret is shown once, here, and kept nowhere."""
    _check_id("TENANT", tenant)
    scopes = [_scope(name) for name in scope or ["meter"]]
    now = now_ms()
    expires_ms = parse_time_ms("--expires", expires, now=now) if expires else 0
    if expires_ms and expires_ms <= now:
        raise MisuseError(f"--expires {expires!r} is over already: name a time to come")
    config = context.config()
    commander = Commander(config, issuer())
    key = commander.key(tenant, project, user, scopes, expires_ms)
    with open_reader(config) as reader:
        commander.give([key.command], reader)
    _tell(
        context, {"tenant_id": tenant, "key_id": key.key_id, "secret": key.secret, "expires": show_time(expires_ms)}, json=json
    )


@command
def grant_credit(
    context: Context,
    tenant: TenantArgument,
    amount: Annotated[str, typer.Argument(help="How much, like 25 or 12.50.")],
    reason: Annotated[str, typer.Option(help="Why, for the audit.")] = "",
    grant_id: Annotated[
        str, typer.Option("--id", help="The grant's own ID, e.g. the payment's: given twice, it counts once.")
    ] = "",
    json: JsonOption = False,
) -> None:
    """Grant prepaid credit to a tenant, in the currency that it is billed in."""
    amount_pico = _amount("AMOUNT", amount)
    if amount_pico <= 0:
        raise MisuseError(f"AMOUNT {amount!r} grants nothing: write more than 0")
    config = context.config()
    commander = Commander(config, issuer())
    with open_reader(config) as reader:
        account = next(iter(queries.balances(reader, tenant)), None)
        if account is None:
            raise TaximeterError(f"tenant {tenant!r} is not known: create it with `taximeter tenant create {tenant}`")
        repeated = bool(grant_id) and commander.was_applied(reader, grant_id)
        if not repeated:
            grant = commander.credit(tenant, amount_pico, account.currency, reason, command_id=grant_id)
            commander.give([grant], reader)
        after = queries.balances(reader, tenant)[0]
    values: dict[str, object] = {
        "tenant_id": tenant,
        "granted": "nothing: this ID was granted before" if repeated else format_pico(amount_pico, account.currency),
        "balance": format_pico(after.balance_pico, after.currency),
    }
    _tell(context, values, json=json)


def issuer() -> str:
    """Who gives a command, for the audit."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"[:ID_CHARS_MAX]


def _tell(context: Context, values: dict[str, object], *, json: bool) -> None:
    if json:
        context.output.json(values)
    else:
        context.output.pairs("", {name.replace("_", " "): value for name, value in values.items()})


def _check_id(argument: str, value: str) -> None:
    if len(value) > ID_CHARS_MAX or not _ID.fullmatch(value):
        raise MisuseError(f"{argument} {value[:40]!r}: write 1 to {ID_CHARS_MAX} printable characters without a leading slash")


def _scope(name: str) -> KeyScope.ValueType:
    if name not in _SCOPES:
        raise MisuseError(f"--scope {name!r} is not known: write one of {', '.join(_SCOPES)}")
    return _SCOPES[name]


def _amount(argument: str, text: str) -> int:
    try:
        return parse_decimal_to_pico(text)
    except AmountError as error:
        raise MisuseError(f"{argument}: {error}") from None
