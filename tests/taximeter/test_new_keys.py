"""What a gateway says of a key that it does not know yet. Who meets it: test_up.py, on a machine that is slow enough."""

from __future__ import annotations

import pytest
from tritonclient.utils import InferenceServerException

from taximeter.new_keys import KNOWN_S, may_be_known_soon


@pytest.mark.parametrize(
    ("status", "again"),
    [("UNAUTHENTICATED", True), ("PERMISSION_DENIED", True), ("RESOURCE_EXHAUSTED", True), ("UNAVAILABLE", False)],
)
def test_what_was_not_forwarded_is_asked_again_for_a_while(status: str, again: bool) -> None:
    error = InferenceServerException("refused", status=f"StatusCode.{status}")
    assert may_be_known_soon(error, 0.0) is again
    assert may_be_known_soon(error, KNOWN_S - 1.0) is again
    assert not may_be_known_soon(error, KNOWN_S)
