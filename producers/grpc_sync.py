"""A server interceptor for `grpc.server`: meters what the readers of `GrpcMetering` can read. See `grpc_calls` for its promise.

grpc.server(pool, interceptors=[MeteringInterceptor(GrpcMetering(CallMeter(meter), identify, readers))])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from producers.errors import ProducerError
from producers.grpc_calls import GrpcMetering, MeteredRpc

if TYPE_CHECKING:
    from producers.receipt import Receipt

__all__ = ["MeteringInterceptor"]


class MeteringInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # it takes none when it runs
    """Safe for every thread of the server's pool."""

    def __init__(self, metering: GrpcMetering) -> None:
        self._metering = metering

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """The method's handler, metered."""
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method not in self._metering.readers:
            return handler
        kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
        behavior = getattr(handler, kind)
        answer = _answer_stream if handler.response_streaming else _answer_once

        def metered(request: Any, context: Any) -> Any:
            rpc = MeteredRpc(self._metering, method, context)
            return answer(behavior, request, context, _Flow(rpc, context), handler.request_streaming)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(metered, handler.request_deserializer, handler.response_serializer)


class _Flow:
    """One RPC's messages, each waiting for the journal."""

    def __init__(self, rpc: MeteredRpc, context: Any) -> None:
        self.rpc = rpc
        self._context = context

    def admit(self, request: Any, *, streaming: bool) -> Any:
        """What the server's own code gets; the first request is open in the journal before it runs."""
        identity = self.rpc.metering.identify(self.rpc.credentials())
        if inspect.isawaitable(identity):
            raise TypeError("identify: returns an awaitable: give the interceptor of grpc.server a plain function")
        self.rpc.know(identity)
        if not streaming:
            return self._request(request)
        incoming = iter(request)
        first = [self._request(message) for message in islice(incoming, 1)]
        return chain(first, self._requests(incoming))

    def _request(self, request: Any) -> Any:
        request, receipt = self.rpc.take_request(request)
        self.wait(receipt)
        return request

    def _requests(self, incoming: Iterator[Any]) -> Iterator[Any]:
        try:
            for request in incoming:
                yield self._request(request)
        except ProducerError as error:
            # Whatever thread reads it: gRPC ends the call with this status.
            self.abort(error)

    def response(self, response: Any) -> Any:
        response, receipt = self.rpc.take_response(response)
        self.wait(receipt)
        return response

    def wait(self, receipt: Receipt | None) -> None:
        if receipt is not None:
            receipt.durable(self.rpc.timeout_s)

    def abort(self, error: ProducerError) -> NoReturn:
        refused = self.rpc.refusal(error)
        self._context.abort(refused.status, refused.message)
        raise AssertionError("abort raises") from error


def _answer_once(behavior: Any, request: Any, context: Any, flow: _Flow, streaming: bool) -> Any:
    try:
        response = flow.response(behavior(flow.admit(request, streaming=streaming), context))
        # Whoever has left meanwhile is billed for what was made, and the bill says that it left.
        if not context.is_active():
            flow.rpc.leave()
        flow.wait(flow.rpc.finish())
    except ProducerError as error:
        flow.rpc.fail()
        flow.abort(error)
    except BaseException:
        flow.rpc.fail()
        raise
    return response


def _answer_stream(behavior: Any, request: Any, context: Any, flow: _Flow, streaming: bool) -> Generator[Any, None, None]:
    try:
        for made in behavior(flow.admit(request, streaming=streaming), context):
            response = flow.response(made)
            if response is not None:
                yield response
        if not context.is_active():
            flow.rpc.leave()
        flow.wait(flow.rpc.finish())
    except GeneratorExit:
        # gRPC lets go of what it cannot send on.
        flow.rpc.leave()
        raise
    except ProducerError as error:
        flow.rpc.fail()
        flow.abort(error)
    except BaseException:
        flow.rpc.fail()
        raise
