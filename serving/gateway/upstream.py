"""The back end, as the gateway calls it: one channel. A unary answer is parsed; what comes in streams, and what is not metered,
is handed over as bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import grpc
from tritonclient.grpc import service_pb2

from serving.kserve import SERVICE_NAME

if TYPE_CHECKING:
    from serving.gateway.settings import LimitSettings, UpstreamTls

__all__ = ["ASKED_AGAIN", "EOF", "RETRY_DELAY_S", "Upstream"]

# A back end that says so was not there, or is gone: where no response had come, another attempt may find it, or its neighbour.
# It may have begun; the client is billed once all the same.
ASKED_AGAIN: Final = frozenset({grpc.StatusCode.UNAVAILABLE})
RETRY_DELAY_S: Final = 0.1

# What a read gives when the other side has no more; the stubs lack it.
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class Upstream:
    """One channel to the back end; calls start when it can be reached, and fail at once when it cannot."""

    def __init__(self, address: str, tls: UpstreamTls | None, limits: LimitSettings) -> None:
        options = [
            ("grpc.max_receive_message_length", limits.message_bytes_max),
            ("grpc.max_send_message_length", limits.message_bytes_max),
            ("grpc.keepalive_time_ms", limits.keepalive_ms),
            ("grpc.keepalive_permit_without_calls", 1),
            # A back end that comes back is found soon, not after gRPC's two minutes.
            ("grpc.max_reconnect_backoff_ms", 5_000),
        ]
        if tls is None:
            self._channel: Any = grpc.aio.insecure_channel(address, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(tls.root_certificates, tls.key, tls.certificate)
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self.infer = self._channel.unary_unary(
            f"/{SERVICE_NAME}/ModelInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )
        # Of the streams of the protocol this is the half that is needed: each has one request, which goes with the call. Where
        # it goes in a step of its own, and the back end ends the call before that, grpc.aio says so in place of the back end.
        self.stream_infer = self._channel.unary_stream(
            f"/{SERVICE_NAME}/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        )

    def raw(self, service: str, method: str) -> Any:
        """A unary method whose messages stay bytes."""
        return self._channel.unary_unary(f"/{service}/{method}")

    async def close(self) -> None:
        """Cancel what runs and let the connection go."""
        await self._channel.close()
