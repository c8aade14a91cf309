"""Leases: the key that gateways ask with, and giving up on a gateway that does not come back."""

from typing import Annotated

import typer

from billing.commands import lease_key
from billing.key_ring import to_hex
from taximeter.commanding import Commander
from taximeter.commands.accounts import issuer
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import key_ring, open_reader

__all__ = ["key", "retire"]


@command
def key(
    context: Context,
    bare: Annotated[bool, typer.Option("--bare", help="The key alone, for a file.")] = False,
    json: JsonOption = False,
) -> None:
    """Show the key that gateways sign lease requests with, made from the command key. It signs nothing else."""
    secret = to_hex(lease_key(key_ring(context.config(), "command_key", needed_for="making the lease key")))
    told = {"lease_key": secret}
    if bare:
        context.output.say(secret)
    elif json:
        context.output.json(told)
    else:
        context.output.pairs("", told)


@command
def retire(
    context: Context,
    holder: Annotated[str, typer.Argument(help="The gateway: the producer ID of its journal.")],
    unexpired: Annotated[
        bool, typer.Option("--unexpired", help="Also leases that run: only if the gateway is known to be gone.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Give up on a gateway that does not come back: what it held of balances is free, what its journal lacks is given up."""
    config = context.config()
    commander = Commander(config, issuer())
    retirement = commander.lease_retirement(holder, unexpired=unexpired)
    with open_reader(config) as reader:
        commander.give([retirement], reader)
    told = {"holder_id": holder, "command_id": retirement.command_id}
    if json:
        context.output.json(told)
    else:
        context.output.pairs("gateway retired", told)
