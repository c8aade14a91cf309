"""Producers: who may report usage, of which tenants, and the key that their batches are signed with."""

from typing import Annotated

import typer

from billing.key_ring import as_ring
from billing.registrations import EVERYONE, producer_key
from billing.v1.account_pb2 import ProducerRegistration
from taximeter.commanding import Commander
from taximeter.commands.accounts import issuer, tell
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import key_ring, open_reader
from taximeter.errors import MisuseError

__all__ = ["key", "register", "revoke"]

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
def key(context: Context, name: NameArgument, key_number: KeyNumberOption = 0, json: JsonOption = False) -> None:
    """Show the key of a registration again. It is made from the command key, and signs usage alone."""
    tell(context, {"producer": name, "key": _key_of(context, name, key_number)}, json=json)


def _give(context: Context, registration: ProducerRegistration) -> None:
    config = context.config()
    commander = Commander(config, issuer())
    with open_reader(config) as reader:
        commander.give([commander.producer(registration)], reader)


def _key_of(context: Context, name: str, key_number: int) -> str:
    command_key = key_ring(context.config(), "command_key", needed_for="making a producer's key")
    _, made = as_ring(producer_key(command_key, name, key_number)).signing
    return made.hex()
