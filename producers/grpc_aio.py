"""A server interceptor for `grpc.aio.server`: meters what the readers of `GrpcMetering` can read. See `grpc_calls`.

    grpc.aio.server(interceptors=[AioMeteringInterceptor(GrpcMetering(CallMeter(meter), identify, readers))])

The metered methods must be async: coroutines, or async generators, with `yield` or with `context.read` and `context.write`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from producers.errors import ProducerError
from producers.grpc_calls import GrpcMetering, MeteredRpc

if TYPE_CHECKING:
    from producers.receipt import Receipt

__all__ = ["AioMeteringInterceptor"]

# What a read gives when the client has no more to say; the stubs lack it.
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class AioMeteringInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # it takes none when it runs
    """Belongs to one event loop."""

    def __init__(self, metering: GrpcMetering) -> None:
        self._metering = metering

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """The method's handler, metered."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method not in self._metering.readers:
            return handler
        kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
        behavior = getattr(handler, kind)
        metering = self._metering

        async def metered(request: Any, context: Any) -> Any:
            flow = _Flow(MeteredRpc(metering, method, context), context)
            return await flow.answer(behavior, request, streaming=handler.request_streaming)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(metered, handler.request_deserializer, handler.response_serializer)


class _Flow:
    """One RPC's messages, each waiting for the journal. Stands in for the context that the server's own code sees."""

    def __init__(self, rpc: MeteredRpc, context: Any) -> None:
        self._rpc = rpc
        self._context = context
        self._main = asyncio.current_task()
        self._read_ahead: list[Any] = []
        self._refused: ProducerError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        """The client's next request."""
        if self._read_ahead:
            return self._read_ahead.pop()
        request = await self._context.read()
        try:
            return request if request is _EOF else await self._request(request)
        except ProducerError as error:
            # Whatever task reads it, the call ends.
            self._refused = error
            if self._main is not None:
                self._main.cancel()
            raise

    async def write(self, response: Any) -> None:
        """Hand a response to the client."""
        response = await self._response(response)
        if response is not None:
            await self._context.write(response)

    async def answer(self, behavior: Any, request: Any, *, streaming: bool) -> Any:
        """Run the server's own code; what it returns is the response of a method that does not stream."""
        try:
            made = behavior(await self._admit(request, streaming=streaming), self)
            response = None
            if hasattr(made, "__aiter__"):
                async for part in made:
                    await self.write(part)
            else:
                response = await made
                if response is not None:
                    response = await self._response(response)
            await self._wait(self._rpc.finish())
        except asyncio.CancelledError:
            if self._refused is None or self._main is None:
                self._rpc.leave()
                raise
            self._main.uncancel()
            self._rpc.fail()
            await self._abort(self._refused)
        except ProducerError as error:
            self._rpc.fail()
            await self._abort(error)
        except BaseException:
            self._rpc.fail()
            raise
        return response

    async def _admit(self, request: Any, *, streaming: bool) -> Any:
        """What the server's own code gets; the first request is open in the journal before it runs."""
        identity = self._rpc.metering.identify(self._rpc.credentials())
        self._rpc.know(await identity if inspect.isawaitable(identity) else identity)
        if not streaming:
            return await self._request(request)
        first = await self._context.read()
        self._read_ahead.append(first if first is _EOF else await self._request(first))
        return self._requests()

    async def _requests(self) -> AsyncIterator[Any]:
        while (request := await self.read()) is not _EOF:
            yield request

    async def _request(self, request: Any) -> Any:
        request, receipt = self._rpc.take_request(request)
        await self._wait(receipt)
        return request

    async def _response(self, response: Any) -> Any:
        response, receipt = self._rpc.take_response(response)
        await self._wait(receipt)
        return response

    async def _wait(self, receipt: Receipt | None) -> None:
        if receipt is not None:
            await receipt.wait(self._rpc.timeout_s)

    async def _abort(self, error: ProducerError) -> NoReturn:
        refused = self._rpc.refusal(error)
        await self._context.abort(refused.status, refused.message)
        raise AssertionError("abort raises") from error
