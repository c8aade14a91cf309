"""Commands to the ledger: tenants and credit. Each waits until the ledger says what became of it."""

import getpass
import re
import socket
from typing import Annotated, Final

import typer

from billing.amounts import AmountError, format_pico, parse_decimal_to_pico
from billing.limits import ID_CHARS_MAX
from billing.v1.invoice_pb2 import CreditKind
from serving.calendars import UnknownTimeZone, calendar_of
from sinks import queries
from taximeter.commanding import Commander, CreditTerms, PlanTerms
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import open_reader
from taximeter.errors import MisuseError, TaximeterError
from taximeter.limit_options import LimitOption, parse_limits, parse_model_limits
from taximeter.rule_options import RuleOption, parse_rules
from taximeter.times import now_ms, parse_time_ms

__all__ = ["TenantArgument", "check_id", "create_tenant", "expiry", "grant_credit", "issuer", "read_amount", "tell"]

_ID: Final = re.compile(r"[^\s/\x00-\x1f][^\x00-\x1f]*")
_CREDIT_KINDS: Final = {name.removeprefix("CREDIT_KIND_").lower(): number for name, number in CreditKind.items() if number}
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
    limit: LimitOption = None,
    model_limit: Annotated[
        list[str] | None, typer.Option(metavar="MODEL:NAME=NUMBER", help="The same for one model; may be repeated.")
    ] = None,
    rule: RuleOption = None,
    tell_price: Annotated[
        bool, typer.Option("--tell-price", help="Answers say their price and the remaining balance.")
    ] = False,
    shadow: Annotated[bool, typer.Option("--shadow", help="Meter, and refuse nothing for limits or balance.")] = False,
    time_zone: Annotated[str, typer.Option(help="Where its months begin at midnight: Asia/Shanghai (default: UTC).")] = "",
    json: JsonOption = False,
) -> None:
    """Create a tenant, or change its plan."""
    check_id("TENANT", tenant)
    rules = parse_rules("--rule", rule or ())
    terms = PlanTerms(
        prepaid=not postpaid,
        prompt_tokens_max=prompt_tokens_max,
        credit_limit_pico=read_amount("--credit-limit", credit_limit),
        limits=parse_limits("--limit", limit or ()),
        model_limits=parse_model_limits("--model-limit", model_limit or ()),
        tell_price=tell_price,
        shadow=shadow,
        rules=rules.limits,
        **rules.of_plan,
    )
    try:
        calendar = calendar_of(time_zone, now_ms()) if time_zone else None
    except UnknownTimeZone as error:
        raise MisuseError(f"--time-zone: {error}") from None
    config = context.config()
    commander = Commander(config, issuer())
    with open_reader(config) as reader:
        commander.give([commander.tenant(tenant, name, currency, terms, calendar=calendar)], reader)
    tell(context, {"tenant_id": tenant, "plan": "postpaid" if postpaid else "prepaid", "currency": currency}, json=json)


@command
def grant_credit(
    context: Context,
    tenant: TenantArgument,
    amount: Annotated[str, typer.Argument(help="How much, like 25 or 12.50.")],
    reason: Annotated[str, typer.Option(help="Why, for the audit.")] = "",
    grant_id: Annotated[
        str, typer.Option("--id", help="The grant's own ID, e.g. the payment's: given twice, it counts once.")
    ] = "",
    kind: Annotated[str, typer.Option(help=f"Any of {', '.join(_CREDIT_KINDS)}: promotional is used first.")] = "paid",
    expires: Annotated[str, typer.Option(help="When what is left of it ends: 2026-12-31T00:00:00Z.")] = "",
    priority: Annotated[int, typer.Option(min=0, max=1_000, help="Lower ones are used first, whatever their kind.")] = 0,
    json: JsonOption = False,
) -> None:
    """Grant credit to a tenant, in the currency that it is billed in."""
    amount_pico = read_amount("AMOUNT", amount)
    if amount_pico <= 0:
        raise MisuseError(f"AMOUNT {amount!r} grants nothing: write more than 0")
    if kind not in _CREDIT_KINDS:
        raise MisuseError(f"--kind {kind!r} is not known: write one of {', '.join(_CREDIT_KINDS)}")
    terms = CreditTerms(grant_id, _CREDIT_KINDS[kind], expiry(expires), priority)
    config = context.config()
    commander = Commander(config, issuer())
    with open_reader(config) as reader:
        account = next(iter(queries.balances(reader, tenant)), None)
        if account is None:
            raise TaximeterError(f"tenant {tenant!r} is not known: create it with `taximeter tenant create {tenant}`")
        said = commander.credit(tenant, amount_pico, account.currency, reason, terms)
        commander.give([said], reader)
        repeated = bool(commander.outcome(reader, said.command_id))
        after = queries.balances(reader, tenant)[0]
    values: dict[str, object] = {
        "tenant_id": tenant,
        "granted": "nothing: this ID was granted before" if repeated else format_pico(amount_pico, account.currency),
        "balance": format_pico(after.balance_pico, after.currency),
    }
    tell(context, values, json=json)


def expiry(text: str) -> int:
    """When credit expires, in milliseconds; 0 where nothing is said. Raises MisuseError."""
    now = now_ms()
    expires_ms = parse_time_ms("--expires", text, now=now) if text else 0
    if text and expires_ms <= now:
        raise MisuseError(f"--expires {text!r} is over already: name a time to come")
    return expires_ms


def issuer() -> str:
    """Who gives a command, for the audit."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"[:ID_CHARS_MAX]


def tell(context: Context, values: dict[str, object], *, json: bool) -> None:
    """What a command did, for people or for programs."""
    if json:
        context.output.json(values)
    else:
        context.output.pairs("", {name.replace("_", " "): value for name, value in values.items()})


def check_id(argument: str, value: str) -> None:
    """Raises MisuseError for what cannot be an identifier."""
    if len(value) > ID_CHARS_MAX or not _ID.fullmatch(value):
        raise MisuseError(f"{argument} {value[:40]!r}: write 1 to {ID_CHARS_MAX} printable characters without a leading slash")


def read_amount(argument: str, text: str) -> int:
    """Pico of what somebody wrote. Raises MisuseError."""
    try:
        return parse_decimal_to_pico(text)
    except AmountError as error:
        raise MisuseError(f"{argument}: {error}") from None
