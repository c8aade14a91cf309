"""API keys as clients send them, and as they are stored: only a keyed hash of a secret is ever kept or compared."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CREDENTIAL_METADATA", "SecretHasher", "find_secret", "hash_secret"]

CREDENTIAL_METADATA: Final = frozenset({"authorization", "x-api-key"})
_SECRET_CHARS_MAX: Final = 512
# Of SHA-256.
_BLOCK_BYTES: Final = 64


def hash_secret(pepper: bytes, secret: str) -> bytes:
    """What stands in `billing.keys` for a secret: HMAC-SHA256 under the installation's pepper."""
    return hmac.digest(pepper, secret.encode(), "sha256")


class SecretHasher:
    """`hash_secret` for a pepper that stays: its part is done once, in both of HMAC's hashes. hmac.digest gives up the
    interpreter for every call, which costs more than the hash while other threads work."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, pepper: bytes) -> None:
        key = (hashlib.sha256(pepper).digest() if len(pepper) > _BLOCK_BYTES else pepper).ljust(_BLOCK_BYTES, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in key))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in key))

    def __call__(self, secret: str) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(secret.encode())
        outer.update(inner.digest())
        return outer.digest()


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
