"""A tenant's users: erasing one, without a change of what anybody owes.

Promise: it shows first which rows name the user, and changes nothing; with --apply it gives the command to the ledger, which
keeps who asked and why but never the user's ID, and returns when nothing in ClickHouse names the user any more. Given again, it
changes nothing, or finishes what came in between.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Final

import typer

from billing.erasures import user_digests
from billing.limits import ERASED_KEYS_MAX, ID_CHARS_MAX
from billing.v1.command_pb2 import BudgetUpsert, Command
from sinks import account_queries
from sinks.engine import Reader
from sinks.erasing import Erasure, erasure_of_user, rows_of_user
from taximeter.commanding import Commander
from taximeter.commands.accounts import issuer
from taximeter.commands.common import Context, JsonOption, command
from taximeter.commands.tenants import known_account
from taximeter.compose import key_ring, open_reader
from taximeter.errors import MisuseError, TaximeterError

__all__ = ["erase_user"]

_LOOK_S: Final = 0.5


@command
def erase_user(
    context: Context,
    tenant: Annotated[str, typer.Argument(help="The tenant.")],
    user: Annotated[str, typer.Argument(help="The user's ID, as it stands on usage.")],
    reason: Annotated[str, typer.Option(help="Why: stands on the command for ever; do not name the user.")],
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without: only show which rows name the user.")] = False,
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait until it is over; then it goes on by itself.")] = 300.0,
    json: JsonOption = False,
) -> None:
    """Put a pseudonym in the place of a user everywhere in ClickHouse, the archived ledger included. It cannot be undone."""
    if not reason.strip():
        raise MisuseError("--reason: is empty; it stands on the command for ever, say why")
    if user in reason:
        raise MisuseError("--reason: names the user; it stands in the ledger for ever, say it without")
    if not 0 < len(user) <= ID_CHARS_MAX:
        raise MisuseError(f"USER: give 1 to {ID_CHARS_MAX} characters")
    config = context.config()
    seal_keys = key_ring(config, "seal_key", needed_for="knowing an erased user again")
    with open_reader(config) as reader:
        known_account(reader, tenant)
        before = erasure_of_user(reader, seal_keys, tenant, user)
        rows = rows_of_user(reader, tenant, user)
        done = False
        if apply:
            pseudonym = before.pseudonym if before is not None else f"erased-{secrets.token_hex(16)}"
            commander = Commander(config, issuer())
            digest = user_digests(seal_keys, tenant, user)[0]
            for said in _commands(commander, reader, tenant, user, digest, pseudonym, reason):
                commander.give([said], reader)
            before = _until_over(lambda: erasure_of_user(reader, seal_keys, tenant, user), wait)
            done = before.done
    if json:
        context.output.json(
            {
                "tenant_id": tenant,
                "pseudonym": before.pseudonym if before is not None else None,
                "applied": apply,
                "done": done,
                "rows": rows,
            }
        )
        return
    context.output.pairs("Rows that name the user" + (" (before)" if apply else ""), dict(rows))
    if before is not None:
        context.output.say(f"{'erased' if apply else 'was erased before'}: {before.pseudonym} stands in the user's place")
    if not apply:
        context.output.say("nothing was changed: say --apply to do it")


def _commands(
    commander: Commander, reader: Reader, tenant: str, user: str, digest: bytes, pseudonym: str, reason: str
) -> Iterator[Command]:
    """What the ledger must be told, one after the other: it cannot find a budget by a digest, so that ends first."""
    names = user, pseudonym
    if any(row.user_id in names for row in account_queries.budgets(reader, tenant)):
        yield commander.budget(BudgetUpsert(tenant_id=tenant, user_id=user))
    key_ids = [row.key_id for row in account_queries.keys(reader, tenant) if row.user_id in names]
    for begin in range(0, max(len(key_ids), 1), ERASED_KEYS_MAX):
        yield commander.erasure(tenant, digest, pseudonym, key_ids[begin : begin + ERASED_KEYS_MAX], reason)


def _until_over(look: Callable[[], Erasure | None], wait_s: float) -> Erasure:
    deadline_s = time.monotonic() + wait_s
    while (found := look()) is None or not found.done:
        if time.monotonic() >= deadline_s:
            raise TaximeterError(
                f"the ledger has taken it, and the sink was not through after {wait_s:g} s: it goes on by itself; the same "
                "command says when it is over, the sink's log why it is not"
            )
        time.sleep(_LOOK_S)
    return found
