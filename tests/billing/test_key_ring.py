"""Keys by ID: how they are written, and who signs."""

from __future__ import annotations

import pytest

from billing import key_ring
from billing.key_ring import KeyRing, UnknownKey


def test_one_word_is_a_key_and_lines_are_a_ring() -> None:
    assert key_ring.parse(b"secret") == b"secret"
    ring = key_ring.parse(b"2 new\n- old\n\nnever revoked\n")
    assert isinstance(ring, KeyRing)
    assert ring.signing == ("2", b"new")
    assert (ring.find(""), ring.find("never")) == (b"old", None)
    with pytest.raises(UnknownKey):
        ring.find("3")


@pytest.mark.parametrize(
    "text", [b"1 secret\n1 secret2", b"1 secret more", b"1 revoked\n2 secret", b"i" * 65 + b" secret\n2 s"]
)
def test_a_wrong_ring_is_refused_and_no_secret_is_shown(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"line|keys") as caught:
        key_ring.parse(text)
    assert "secret" not in str(caught.value).replace("ID SECRET", "")


def test_derived_keys_are_good_for_their_purpose_alone_and_travel_as_text() -> None:
    ring = KeyRing({"2": b"new", "": b"old", "x": None})
    made = key_ring.derived(ring, b"one purpose")
    assert made != key_ring.derived(ring, b"another purpose")
    assert key_ring.from_hex(key_ring.to_hex(made).encode()) == made
    assert key_ring.from_hex(key_ring.to_hex(key_ring.derived(b"old", b"p")).encode()) == key_ring.derived(b"old", b"p")
    assert "new" not in repr(ring)
    with pytest.raises(ValueError, match="hexadecimal"):
        key_ring.from_hex(b"2 secret\n3 secret")
