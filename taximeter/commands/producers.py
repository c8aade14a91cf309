"""Producers: who may report usage, of which tenants, and the key that their batches are signed with."""

from typing import Annotated

import typer

from billing.key_ring import as_ring
from billing.registrations import EVERYONE, producer_key
from billing.v1.account_pb2 import ProducerRegistration
from sinks import archived
from taximeter.commanding import Commander
from taximeter.commands.accounts import issuer, tell
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import key_ring, open_reader
from taximeter.errors import MisuseError
from taximeter.times import show_time

__all__ = ["key", "list_", "register", "revoke"]

NameArgument = Annotated[
    str, typer.Argument(help="A producer's ID, or how the IDs of several begin with * behind it: 'gateway-*'.")
]
KeyNumberOption = Annotated[
    int, typer.Option(min=0, max=1_000_000, help="Another number, another key: to replace one that leaked.")
]


@command
def register(
    context: Context,
    name: NameArgument,
    tenant: Annotated[list[str] | None, typer.Option(help="Whom it may bill; may be repeated.")] = None,
    all_tenants: Annotated[bool, typer.Option("--all-tenants", help="It may bill everybody, as a gateway does.")] = False,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Its batches need no signature: whoever writes to the topic speaks for it.")
    ] = False,
    key_number: KeyNumberOption = 0,
    json: JsonOption = False,
) -> None:
    """Register a producer, or change what it may bill, and show its key. `producer revoke '*'` shuts out all others."""
    if all_tenants == bool(tenant):
        raise MisuseError("name whom the producer may bill: --tenant ID, or --all-tenants")
    registration = ProducerRegistration(
        producer_id=name, tenant_ids=tenant or [], all_tenants=all_tenants, unsigned=unsigned, key_number=key_number
    )
    _give(context, registration)
    told: dict[str, object] = {"producer": name, "bills": "everybody" if all_tenants else ", ".join(tenant or ())}
    if not unsigned:
        told["key"] = _key_of(context, name, key_number)
    tell(context, told, json=json)


@command
def revoke(context: Context, name: NameArgument, json: JsonOption = False) -> None:
    """Refuse a producer's usage from now on; '*': of everyone who is not registered. It stays in the producers' journals."""
    _give(context, ProducerRegistration(producer_id=name, revoked=True))
    tell(context, {"producer": "everyone who is not registered" if name == EVERYONE else name, "state": "revoked"}, json=json)


@command
def list_(context: Context, json: JsonOption = False) -> None:
    """Show who is registered, whom they may bill, since when, and when they were last heard of."""
    with open_reader(context.config()) as reader:
        rows = [_values(row) for row in archived.registrations(reader)]
    if json:
        context.output.json(rows)
        return
    names = ("producer", "bills", "state", "signed", "since", "changed", "heard_of", "last_seen")
    table = [[", ".join(cell) if isinstance(cell := row[name], list) else cell for name in names] for row in rows]
    empty = "nobody is registered: everybody's usage is taken"
    columns = [name.replace("_", " ") + (" " if name == "heard_of" else "") for name in names]
    context.output.table("Producers", columns, table, empty=empty)


@command
def key(context: Context, name: NameArgument, key_number: KeyNumberOption = 0, json: JsonOption = False) -> None:
    """Show the key of a registration again. It is made from the command key, and signs usage alone."""
    tell(context, {"producer": name, "key": _key_of(context, name, key_number)}, json=json)


def _values(row: archived.RegistrationRow) -> dict[str, object]:
    registration = row.registration
    return {
        "producer": registration.producer_id,
        "bills": ["everybody"] if registration.all_tenants else list(registration.tenant_ids),
        "all_tenants": registration.all_tenants,
        "state": "revoked" if registration.revoked else "registered",
        "signed": not registration.unsigned,
        "key_number": registration.key_number,
        "since": show_time(row.since_ms),
        "changed": show_time(row.changed_ms),
        "heard_of": row.producers,
        "last_seen": show_time(row.seen_ms),
    }


def _give(context: Context, registration: ProducerRegistration) -> None:
    config = context.config()
    commander = Commander(config, issuer())
    with open_reader(config) as reader:
        commander.give([commander.producer(registration)], reader)


def _key_of(context: Context, name: str, key_number: int) -> str:
    command_key = key_ring(context.config(), "command_key", needed_for="making a producer's key")
    _, made = as_ring(producer_key(command_key, name, key_number)).signing
    return made.hex()
