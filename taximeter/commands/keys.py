"""API keys: made, listed, revoked, rotated. What changes one is in every gateway within two seconds of the ledger's word."""

from typing import Annotated, Final

import typer

from billing.v1.account_pb2 import ApiKey, KeyScope
from taximeter.api_keys import find_key, read_keys
from taximeter.commanding import Commander
from taximeter.commands.accounts import check_id, issuer, tell
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import open_reader
from taximeter.errors import MisuseError, TaximeterError
from taximeter.limit_options import LimitOption, parse_limits
from taximeter.times import now_ms, parse_time_ms, show_time

__all__ = ["create", "list_", "revoke", "rotate"]

_SCOPES: Final = {name.removeprefix("KEY_SCOPE_").lower(): number for name, number in KeyScope.items() if number}
_SCOPE_NAMES: Final = {number: name for name, number in _SCOPES.items()}
OwnerArgument = Annotated[str, typer.Argument(metavar="[TENANT]", help="The tenant.")]
OperatorOption = Annotated[
    bool, typer.Option("--operator", help="Instead of TENANT: of an operator, for the billing API of all tenants.")
]
KeyArgument = Annotated[str, typer.Argument(help="The key's ID, as `key list` shows it.")]


@command
def create(
    context: Context,
    tenant: OwnerArgument = "",
    project: Annotated[str, typer.Option(help="What it is for; stands on every request.")] = "",
    user: Annotated[str, typer.Option(help="Who holds it; stands on every request.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"Any of {', '.join(_SCOPES)} (default: meter; an operator's: read, admin, prices)."),
    ] = None,
    expires: Annotated[str, typer.Option(help="When it ends: 2026-12-31T00:00:00Z.")] = "",
    test: Annotated[bool, typer.Option("--test", help="Its usage is metered, costs nothing and needs no balance.")] = False,
    limit: LimitOption = None,
    operator: OperatorOption = False,
    json: JsonOption = False,
) -> None:
    """Make an API key. Its secret is shown once, here, and kept nowhere."""
    _check_owner(tenant, operator=operator)
    scopes = [_scope(name) for name in scope or (["read", "admin", "prices"] if operator else ["meter"])]
    now = now_ms()
    expires_ms = parse_time_ms("--expires", expires, now=now) if expires else 0
    if expires_ms and expires_ms <= now:
        raise MisuseError(f"--expires {expires!r} is over already: name a time to come")
    config = context.config()
    commander = Commander(config, issuer())
    key = commander.key(tenant, project, user, scopes, expires_ms, test=test, limits=parse_limits("--limit", limit or ()))
    with open_reader(config) as reader:
        commander.give([key.command], reader)
    values: dict[str, object] = {
        "tenant_id": tenant,
        "key_id": key.key_id,
        "secret": key.secret,
        "expires": show_time(expires_ms),
    }
    tell(context, values, json=json)


@command
def list_(context: Context, tenant: OwnerArgument = "", operator: OperatorOption = False, json: JsonOption = False) -> None:
    """Show a tenant's keys, without their secrets, the newest last."""
    _check_owner(tenant, operator=operator)
    keys = [key for key in read_keys(context.config()).values() if key.tenant_id == tenant]
    rows = [_values(key) for key in sorted(keys, key=lambda key: (key.created_ms, key.key_id))]
    if json:
        context.output.json(rows)
        return
    names = ("key_id", "project", "user", "scopes", "state", "created", "expires")
    table = [[", ".join(cell) if isinstance(cell := row[name], list) else str(cell) for name in names] for row in rows]
    context.output.table(f"Keys of {tenant or 'operators'}", [name.replace("_", " ") for name in names], table)


@command
def revoke(
    context: Context,
    key: KeyArgument,
    reason: Annotated[str, typer.Option(help="Why, for the audit.")] = "",
    json: JsonOption = False,
) -> None:
    """Make a key open nothing any more. Streams that run end as they would have; their next request is refused."""
    config = context.config()
    known = find_key(config, key)
    commander = Commander(config, issuer())
    with open_reader(config) as reader:
        commander.give([commander.changed_key(known, reason, revoked=True)], reader)
    tell(context, {"tenant_id": known.tenant_id, "key_id": key, "state": "revoked"}, json=json)


@command
def rotate(
    context: Context,
    key: KeyArgument,
    grace: Annotated[
        float, typer.Option(min=0, metavar="HOURS", help="For so long the old one still opens; 0: it is revoked at once.")
    ] = 24.0,
    json: JsonOption = False,
) -> None:
    """Make a key that may do what the old one may, and let the old one end."""
    config = context.config()
    known = find_key(config, key)
    if 0 < known.expires_ms <= now_ms():
        raise TaximeterError(f"key {key} expired at {show_time(known.expires_ms)}, and so would its successor: create another")
    commander = Commander(config, issuer())
    fresh = commander.key(
        known.tenant_id,
        known.project_id,
        known.user_id,
        list(known.scopes),
        known.expires_ms,
        test=known.test,
        limits=known.limits if known.HasField("limits") else None,
    )
    ends_ms = now_ms() + int(grace * 3_600_000)
    ends_ms = min(ends_ms, known.expires_ms) if known.expires_ms else ends_ms
    changes = {"expires_ms": ends_ms} if grace else {"revoked": True}
    with open_reader(config) as reader:
        commander.give([fresh.command, commander.changed_key(known, f"rotated to {fresh.key_id}", **changes)], reader)
    values: dict[str, object] = {
        "tenant_id": known.tenant_id,
        "key_id": fresh.key_id,
        "secret": fresh.secret,
        "old_key_id": key,
        "old_key_ends": show_time(ends_ms) if grace else "now",
    }
    tell(context, values, json=json)


def _check_owner(tenant: str, *, operator: bool) -> None:
    if operator == bool(tenant):
        raise MisuseError("TENANT, --operator: name a tenant, or say --operator for a key that sees all of them; not both")
    if tenant:
        check_id("TENANT", tenant)


def _values(key: ApiKey) -> dict[str, object]:
    state = "test" if key.test else "in force"
    if key.revoked:
        state = "revoked"
    elif 0 < key.expires_ms <= now_ms():
        state = "expired"
    return {
        "key_id": key.key_id,
        "project": key.project_id,
        "user": key.user_id,
        "scopes": [_SCOPE_NAMES.get(scope, str(scope)) for scope in key.scopes],
        "state": state,
        "test": key.test,
        "limits": {field.name: value for field, value in key.limits.ListFields()},
        "created": show_time(key.created_ms),
        "expires": show_time(key.expires_ms),
    }


def _scope(name: str) -> KeyScope.ValueType:
    if name not in _SCOPES:
        raise MisuseError(f"--scope {name!r} is not known: write one of {', '.join(_SCOPES)}")
    return _SCOPES[name]
