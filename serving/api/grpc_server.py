"""The billing API over gRPC: health for everybody, every other RPC behind its policy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2_grpc

from serving.api.access import SERVICE
from serving.api.errors import ApiError
from serving.gateway.credentials import find_secret

if TYPE_CHECKING:
    from google.protobuf.descriptor import MethodDescriptor

    from serving.api.calls import Calls

__all__ = ["make_grpc_server"]

# Probes, and calls that end with a refusal at once.
_CONTROL_CALLS: Final = 32


def make_grpc_server(calls: Calls) -> Any:
    """A server with everything registered, and no port yet."""
    limits = calls.settings.limits
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limits.request_bytes_max),
            ("grpc.max_send_message_length", limits.response_bytes_max),
            ("grpc.max_metadata_size", 16 * 1024),
            *limits.connections.grpc_options(),
        ],
        maximum_concurrent_rpcs=limits.calls_max + limits.watches_max + _CONTROL_CALLS,
    )
    handlers = {method.name: _handler(calls, method) for method in SERVICE.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
    health_servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    return server


def _handler(calls: Calls, method: MethodDescriptor) -> Any:
    request_class, response_class = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    kwargs: dict[str, Any] = {
        "request_deserializer": request_class.FromString,
        "response_serializer": response_class.SerializeToString,
    }
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(_stream(calls, method.name), **kwargs)
    return grpc.unary_unary_rpc_method_handler(_unary(calls, method.name), **kwargs)


def _unary(calls: Calls, name: str) -> Callable[[Message, Any], Awaitable[Message]]:
    async def answer(request: Message, context: Any) -> Message:
        try:
            with _counted(calls, name):
                secret = find_secret(context.invocation_metadata() or ())
                return await calls.call(name, request, secret, context.time_remaining())
        except ApiError as error:
            return await _abort(context, error)

    return answer


def _stream(calls: Calls, name: str) -> Callable[[Message, Any], AsyncIterator[Message]]:
    async def answers(request: Message, context: Any) -> AsyncIterator[Message]:
        try:
            with _counted(calls, name):
                async for message in calls.watch(name, request, find_secret(context.invocation_metadata() or ())):
                    yield message
        except ApiError as error:
            await _abort(context, error)

    return answers


@contextmanager
def _counted(calls: Calls, name: str) -> Iterator[None]:
    """Count the call under the status with which it ends; one that its client or its deadline cut off is CANCELLED."""
    began_s = time.perf_counter()
    status = grpc.StatusCode.UNKNOWN
    try:
        yield
        status = grpc.StatusCode.OK
    except ApiError as error:
        status = error.status
        raise
    except (asyncio.CancelledError, GeneratorExit):
        status = grpc.StatusCode.CANCELLED
        raise
    finally:
        calls.traffic.ended("grpc", name, status.name, time.perf_counter() - began_s)


async def _abort(context: Any, error: ApiError) -> Message:
    trailers = (("retry-after", str(error.retry_after_s)),) if error.retry_after_s else ()
    await context.abort(error.status, error.message, trailers)
    raise AssertionError("abort raises") from error
