"""uvicorn's connections, with a bound on how long the head of a request may take.

uvicorn looks at the time behind an answer alone, and only until the next byte: whoever connects and says nothing, or a byte now
and then, would hold a descriptor for good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

__all__ = ["bounded_connection"]


def bounded_connection(opening_s: float) -> type[asyncio.Protocol]:
    """A protocol for uvicorn: a connection on which no request has begun is closed so long after it began, or was answered."""

    class Connection(H11Protocol):
        _head_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            self._look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._look()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _look(self) -> None:
            # None before the first request, whatever its annotation says.
            under_way = self.cycle and not self.cycle.response_complete  # type: ignore[truthy-bool]
            if under_way or self.transport.is_closing():
                self._forget()
            elif self._head_due is None:
                self._head_due = self.loop.call_later(opening_s, self.timeout_keep_alive_handler)

        def _forget(self) -> None:
            if self._head_due is not None:
                self._head_due.cancel()
                self._head_due = None

    return Connection
