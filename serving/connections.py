"""How long a connection may say nothing: whoever only connects holds a descriptor, and each process has a number of those."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ConnectionLimits"]


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Of one server."""

    opening_s: float = 20.0
    """For the handshakes of TLS and HTTP/2, or for the head of an HTTP request."""
    idle_s: float = 600.0
    """Of gRPC, without a call, whatever is answered to pings; clients connect again when they have something to ask."""

    def grpc_options(self) -> list[tuple[str, int]]:
        """As gRPC takes them."""
        return [
            ("grpc.server_handshake_timeout_ms", int(self.opening_s * 1_000)),
            ("grpc.max_connection_idle_ms", int(self.idle_s * 1_000)),
        ]
