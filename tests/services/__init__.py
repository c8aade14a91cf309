"""Real services for tests: brokers and databases as plain processes, each with its own folder and ports on loopback."""

from __future__ import annotations

import os

import pytest

__all__ = ["require"]


def require(available: object, reason: str) -> None:
    """Go on if `available` is true; else skip on a laptop, and fail in CI, where a skip would hide a missing test."""
    if available:
        return
    if os.environ.get("CI"):
        pytest.fail(f"needed in CI: {reason}", pytrace=False)
    pytest.skip(reason)
