"""Keys that were made a moment ago: the ledger and the database have them before a gateway has.

Promise: a gateway that refuses for that is asked again, and only for that: what it says of a key, of an account or of a balance
that it does not know yet was neither forwarded nor charged. Whoever uses a key for long passes the time since it was made, and
a refusal is final after `KNOWN_S`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tritonclient.utils import InferenceServerException

__all__ = ["ASK_AGAIN_S", "KNOWN_S", "may_be_known_soon"]

# What is said of a key holds in every gateway within two seconds, on a machine that has the time for it.
KNOWN_S: Final = 30.0
ASK_AGAIN_S: Final = 0.1
_NOT_KNOWN: Final = frozenset({"StatusCode.UNAUTHENTICATED", "StatusCode.PERMISSION_DENIED", "StatusCode.RESOURCE_EXHAUSTED"})


def may_be_known_soon(error: InferenceServerException, since_s: float) -> bool:
    """Whether the same request may be admitted in a moment, `since_s` after its key and account were in the database."""
    return since_s < KNOWN_S and error.status() in _NOT_KNOWN
