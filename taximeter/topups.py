"""Top-ups from a payment provider: one call that may be made again, with the same answer.

Promise: `top_up` returns when the ledger has the credit and the database shows it. The grant's ID (the payment's at the
provider) is what makes a repeat harmless, for 400 days after the grant was used up; another amount under the same ID raises, in
the ledger's words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sinks import account_queries, queries
from taximeter.commanding import CreditTerms
from taximeter.errors import TaximeterError

if TYPE_CHECKING:
    from sinks.engine import Reader
    from taximeter.commanding import Commander

__all__ = ["TopUp", "top_up"]


@dataclass(frozen=True, slots=True)
class TopUp:
    """What a top-up came to: the same however often it was asked for."""

    tenant_id: str
    grant_id: str
    amount_pico: int
    currency: str
    granted_ms: int
    expires_ms: int


def top_up(
    commander: Commander, reader: Reader, tenant_id: str, amount_pico: int, terms: CreditTerms, reason: str = ""
) -> TopUp:
    """Grant what was paid, once. Raises TaximeterError where the ledger refuses, NotReadyError where it does not answer."""
    account = next(iter(queries.balances(reader, tenant_id)), None)
    if account is None:
        raise TaximeterError(f"tenant {tenant_id!r} is not known: create it with `taximeter tenant create {tenant_id}`")
    commander.give([commander.credit(tenant_id, amount_pico, account.currency, reason, terms)], reader)
    [grant] = account_queries.grants(reader, tenant_id, terms.grant_id)
    return TopUp(tenant_id, grant.grant_id, grant.amount_pico, account.currency, grant.granted_ms, grant.expires_ms)
