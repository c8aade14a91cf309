"""ASGI middleware: meters OpenAI-shaped endpoints of the application that it wraps. See `openai_http` for what it promises.

    app = AsgiMetering(app, OpenAIMetering(CallMeter(UsageMeter(settings)), identify))

It belongs around the application and inside of whatever compresses answers. Needs nothing but the standard library.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from producers.errors import ProducerError
from producers.openai_http import NOT_HANDED_ON, MeteredAnswer, Refusal
from producers.openai_usage import prepare

if TYPE_CHECKING:
    from producers.calls import Identity
    from producers.openai_http import OpenAIMetering

__all__ = ["AsgiMetering"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class AsgiMetering:
    """The application, metered."""

    def __init__(self, app: Application, metering: OpenAIMetering) -> None:
        self._app = app
        self._metering = metering

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        found = self._metering.operation(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        identity = await self._identify(scope)
        if identity is None:
            await _refuse(send, Refusal.unknown())
            return
        body = await self._read(receive, send)
        if body is not None:
            await self._serve(scope, receive, send, identity, *found, body)

    async def _identify(self, scope: MutableMapping[str, Any]) -> Identity | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        identity = self._metering.identify(headers)
        return await identity if inspect.isawaitable(identity) else identity

    async def _read(self, receive: Receive, send: Send) -> bytes | None:
        """The whole body; None where the client has left, or was told that it is too large."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self._metering.request_bytes_max:
                await _refuse(send, Refusal.too_large(self._metering.request_bytes_max))
                return None
            if not message.get("more_body", False):
                return bytes(body)

    async def _serve(
        self,
        scope: MutableMapping[str, Any],
        receive: Receive,
        send: Send,
        identity: Identity,
        endpoint: str,
        operation: int,
        body: bytes,
    ) -> None:
        metering = self._metering
        timeout_s = metering.calls.durable_timeout_s
        request = prepare(endpoint, body, continuous=metering.continuous_usage)
        try:
            call = metering.calls.begin(identity, request.model or metering.model or "-", operation)
            await call.receipt.wait(timeout_s)
        except ProducerError as error:
            await _refuse(send, Refusal.unrecorded(error))
            return
        answer = _Answer(MeteredAnswer(metering, call, request), send, timeout_s)
        pending = [request.body]
        is_gone = False

        async def receive_inner() -> Message:
            nonlocal is_gone
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            message = await receive()
            is_gone |= message["type"] == "http.disconnect"
            return message

        headers = [(name, value) for name, value in scope["headers"] if name.lower().decode("latin-1") not in NOT_HANDED_ON]
        headers.append((b"content-length", str(len(request.body)).encode()))
        try:
            await self._app({**scope, "headers": headers}, receive_inner, answer.send)
        except asyncio.CancelledError:
            answer.meter.leave()
            raise
        finally:
            # Whatever is not billed by now did not come to its end.
            if is_gone or answer.is_broken:
                answer.meter.leave()
            answer.meter.fail()


class _Answer:
    """What the application sends, held until its usage is durable."""

    def __init__(self, meter: MeteredAnswer, send: Send, timeout_s: float) -> None:
        self.meter = meter
        self.is_broken = False
        """The connection is, as the server has told."""
        self._server_send = send
        self._timeout_s = timeout_s
        self._start: Message = {}

    async def _send(self, message: Message) -> None:
        try:
            await self._server_send(message)
        except OSError:
            self.is_broken = True
            raise

    async def send(self, message: Message) -> None:
        """What the application calls."""
        if message["type"] == "http.response.start":
            kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            self.meter.start(message["status"], kinds[0].decode("latin-1") if kinds else "")
            if self.meter.streams:
                # What was injected is taken out again, so its length is not known.
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"content-length"]
                await self._send({**message, "headers": headers})
            else:
                self._start = message
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        more = message.get("more_body", False)
        data, receipt = self.meter.feed(message.get("body", b""), last=not more)
        if receipt is not None:
            try:
                await receipt.wait(self._timeout_s)
            except ProducerError as error:
                if self.meter.streams:
                    raise
                await _refuse(self._send, Refusal.unrecorded(error))
                return
        if not self.meter.streams and not more:
            await self._send(self._start)
        if data or not more:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})


async def _refuse(send: Send, refusal: Refusal) -> None:
    headers = [(name.encode(), value.encode()) for name, value in refusal.all_headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": refusal.body})
