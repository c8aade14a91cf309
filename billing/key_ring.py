"""Keys by ID, so that one can take another's place without a moment in which nothing is believed.

Promise: the first key signs; every key that is there verifies what names it; what names a revoked one is a forgery, and what
names one that is not there is neither: the reader lacks a key, and must say so instead of deciding.

As text, in a secret's file: a line `ID SECRET` for each key, the signing one first. A text of one word is a single key, whose
ID is empty; in a longer text it is `- SECRET`. To rotate: append the new key everywhere, then make it the first where it signs.
`ID revoked` refuses what names it: for an ID that no key of ours has, and for a command key that leaked. A seal key is kept for
as long as there are records that it sealed.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import overload

from billing.limits import KEY_ID_CHARS_MAX, KEYS_MAX

_REVOKED = b"revoked"


class UnknownKey(LookupError):
    """What is to be verified names a key that is not in the ring."""


@dataclass(frozen=True, slots=True)
class KeyRing:
    """Keys by ID, the one that signs first; None in place of a key: revoked."""

    keys: Mapping[str, bytes | None] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.keys or next(iter(self.keys.values())) is None:
            raise ValueError("keys: the first one signs, and must be there")

    @property
    def signing(self) -> tuple[str, bytes]:
        """The ID and the key that sign."""
        key_id, key = next(iter(self.keys.items()))
        assert key is not None
        return key_id, key

    def find(self, key_id: str) -> bytes | None:
        """The key, or None where it is revoked. Raises UnknownKey."""
        if key_id not in self.keys:
            raise UnknownKey(key_id)
        return self.keys[key_id]

    def all(self) -> list[bytes]:
        """Every key that is not revoked."""
        return [key for key in self.keys.values() if key is not None]


# A key alone is a ring of one, whose ID is empty.
Keys = bytes | KeyRing


def as_ring(keys: Keys) -> KeyRing:
    """The ring."""
    return keys if isinstance(keys, KeyRing) else KeyRing({"": keys})


@overload
def derived(keys: bytes, purpose: bytes) -> bytes: ...
@overload
def derived(keys: Keys, purpose: bytes) -> Keys: ...
def derived(keys: Keys, purpose: bytes) -> Keys:
    """Keys for one purpose, of which each is good for nothing else: made from these, under the same IDs."""
    if isinstance(keys, bytes):
        return hmac.digest(keys, purpose, "sha256")
    made = {key_id: None if key is None else hmac.digest(key, purpose, "sha256") for key_id, key in keys.keys.items()}
    return KeyRing(made)


def to_hex(keys: Keys) -> str:
    """As text for a secret's file that `from_hex` reads: these keys are bytes, not words."""
    if isinstance(keys, bytes):
        return keys.hex()
    lines = [f"{key_id or '-'} {_REVOKED.decode() if key is None else key.hex()}" for key_id, key in keys.keys.items()]
    return "\n".join(lines)


def from_hex(text: bytes) -> Keys:
    """The keys that `to_hex` wrote. Raises ValueError, which never shows a secret."""
    keys = parse(text)
    try:
        if isinstance(keys, bytes):
            return bytes.fromhex(keys.decode())
        return KeyRing({key_id: None if key is None else bytes.fromhex(key.decode()) for key_id, key in keys.keys.items()})
    except ValueError:
        raise ValueError("is not hexadecimal") from None


def parse(text: bytes) -> Keys:
    """The keys of a secret's text. Raises ValueError, which never shows a secret."""
    words = text.split()
    if len(words) < 2:
        return text
    keys: dict[str, bytes | None] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2:
            raise ValueError(f"line {number}: has {len(parts)} words; write ID SECRET, or ID revoked")
        key_id = parts[0].decode(errors="replace")
        if len(key_id) > KEY_ID_CHARS_MAX or key_id in keys:
            raise ValueError(f"line {number}: give each key an ID of its own, of at most {KEY_ID_CHARS_MAX} characters")
        # "-" names the key that had no ID when it was alone.
        keys["" if key_id == "-" else key_id] = None if parts[1] == _REVOKED else parts[1]
    if len(keys) > KEYS_MAX:
        raise ValueError(f"has {len(keys)} keys; keep at most {KEYS_MAX}")
    return KeyRing(keys)
