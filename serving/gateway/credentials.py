"""API keys as clients send them, and as they are stored: only a keyed hash of a secret is ever kept or compared."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CREDENTIAL_METADATA", "SecretHasher", "find_secret", "hash_secret"]

CREDENTIAL_METADATA: Final = frozenset({"authorization", "x-api-key"})
_SECRET_CHARS_MAX: Final = 512


def hash_secret(pepper: bytes, secret: str) -> bytes:
    """What stands in `billing.keys` for a secret: HMAC-SHA256 under the installation's pepper."""
    return hmac.digest(pepper, secret.encode(), "sha256")


class SecretHasher:
    """`hash_secret` for a pepper that stays: its part is done once. hmac.digest gives up the interpreter for every call,
    which costs more than the hash while other threads work."""

    __slots__ = ("_peppered",)

    def __init__(self, pepper: bytes) -> None:
        self._peppered = hmac.new(pepper, digestmod="sha256")

    def __call__(self, secret: str) -> bytes:
        mac = self._peppered.copy()
        mac.update(secret.encode())
        return mac.digest()


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
