"""API keys as clients send them, and as they are stored: only a keyed hash of a secret is ever kept or compared."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CREDENTIAL_METADATA", "find_secret", "hash_secret"]

CREDENTIAL_METADATA: Final = frozenset({"authorization", "x-api-key"})
_SECRET_CHARS_MAX: Final = 512


def hash_secret(pepper: bytes, secret: str) -> bytes:
    """What stands in `billing.keys` for a secret: HMAC-SHA256 under the installation's pepper."""
    return hmac.digest(pepper, secret.encode(), "sha256")


def find_secret(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The secret in a call's metadata; None if there is none, or something that cannot be one."""
    for key, value in metadata:
        if key not in CREDENTIAL_METADATA or isinstance(value, bytes):
            continue
        secret = value
        if key == "authorization":
            kind, _, secret = value.partition(" ")
            if kind.lower() != "bearer":
                continue
        secret = secret.strip()
        if 0 < len(secret) <= _SECRET_CHARS_MAX:
            return secret
    return None
