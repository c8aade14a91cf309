"""The event loop of a process that serves or sends many calls."""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

__all__ = ["new_event_loop"]


def new_event_loop() -> asyncio.AbstractEventLoop:
    """The fastest event loop at hand: uvloop where it is installed."""
    try:
        uvloop: Any = importlib.import_module("uvloop")
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
