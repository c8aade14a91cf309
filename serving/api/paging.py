"""Page tokens and positions: where the answer to one question of one caller goes on.

Promise: a token is good for the question that it came from, the same caller and the same parameters but the page's size, and
for nothing else. It is sealed: nobody can make or change one, or read in it how many records the ledger holds of others. It
names the last row by the row's own key, never by a count of rows, so a row that comes or goes meanwhile neither hides nor
repeats another.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from serving.api.errors import ApiError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from serving.api.access import Principal

__all__ = ["PageTokens"]

# Which page and how much of it is no part of the question.
_PLACES: Final = frozenset({"page_token", "page_size", "after"})


class PageTokens:
    """Seals and opens tokens."""

    def __init__(self, pepper: bytes) -> None:
        """`pepper` is the installation's: every process of the API reads the others' tokens."""
        # AES-SIV gives the same token for the same place, and needs no nonce.
        self._cipher = AESSIV(hmac.digest(pepper, b"taximeter page tokens", "sha512"))

    def seal(self, principal: Principal, request: Message, place: list[str]) -> str:
        """The token of the place behind the row with this key."""
        body = json.dumps(place, ensure_ascii=False, separators=(",", ":")).encode()
        sealed = self._cipher.encrypt(body, _question(principal, request))
        return base64.urlsafe_b64encode(sealed).decode().rstrip("=")

    def open(self, principal: Principal, request: Message, name: str, count: int | None = None) -> list[str] | None:
        """The row's key, of `count` texts, in field `name` of `request`; None where it is empty. Raises ApiError."""
        token: str = getattr(request, name)
        if not token:
            return None
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
            place: list[str] = json.loads(self._cipher.decrypt(raw, _question(principal, request)))
        except (binascii.Error, ValueError, InvalidTag):
            raise ApiError.unacceptable(
                f"{name}: is not this question's; take it from its answer as it is, or leave it out"
            ) from None
        assert count is None or len(place) == count, "what was sealed for a question has that question's form"
        return place


def _question(principal: Principal, request: Message) -> list[bytes]:
    question = type(request)()
    question.CopyFrom(request)
    for field in question.DESCRIPTOR.fields:
        if field.name in _PLACES:
            question.ClearField(field.name)
    return [
        request.DESCRIPTOR.full_name.encode(),
        # Never empty: a caller's name cannot run into what stands beside it.
        b"tenant " + principal.tenant_id.encode(),
        question.SerializeToString(deterministic=True) or b"-",
    ]
