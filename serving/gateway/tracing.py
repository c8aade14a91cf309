"""W3C trace context through the gateway: a request's trace reaches the back end, and stands on its usage event.

A client's valid `traceparent` is taken up: the gateway is a span of its own in that trace, the back end is called in its name,
and the event keeps it as the attribute `traceparent`, which the ledger and the database carry on. `tracestate` passes as it is.
A value that is not valid counts as none, as the standard says. Without one, a trace begins only where the gateway is told to
trace.

Each request of a stream is a span of its own. Which span is its parent is kept in the context of the task that serves it, and
of those that it starts: nothing else of the gateway needs it, but who tells a collector does.
"""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from serving.gateway.calls import Metadata

__all__ = ["TRACEPARENT", "another_span", "own_span", "parent_span_id", "with_span"]

TRACEPARENT: Final = "traceparent"
_FORM: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_TRACE: Final = "0" * 32
_NO_SPAN: Final = "0" * 16
_SAMPLED: Final = "01"
_PARENT_ID: Final = ContextVar("parent_span_id", default="")


def own_span(metadata: Metadata, *, begin: bool) -> str:
    """The gateway's span for a call, as a `traceparent`; empty where there is no trace, and none is to `begin`."""
    for key, value in metadata:
        if key == TRACEPARENT and isinstance(value, str) and (found := _parse(value)) is not None:
            trace_id, parent_id, flags = found
            _PARENT_ID.set(parent_id)
            return f"00-{trace_id}-{secrets.token_hex(8)}-{flags}"
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{_SAMPLED}" if begin else ""


def another_span(span: str) -> str:
    """One more of the same trace and parent."""
    version, trace_id, _, flags = span.split("-")
    return f"{version}-{trace_id}-{secrets.token_hex(8)}-{flags}"


def parent_span_id() -> str:
    """The client's span of the call that this task serves; empty: the gateway's is the first of its trace."""
    return _PARENT_ID.get()


def with_span(metadata: Metadata, span: str) -> Metadata:
    """What the back end is called with."""
    return (*metadata, (TRACEPARENT, span)) if span else metadata


def _parse(value: str) -> tuple[str, str, str] | None:
    """Trace, span and flags; None for what is not valid. Later versions may have more behind the flags, this one may not."""
    match = _FORM.fullmatch(value.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return trace_id, span_id, flags
