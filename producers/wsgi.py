"""WSGI middleware: meters OpenAI-shaped endpoints of the application that it wraps. See `openai_http` for what it promises.

    app = WsgiMetering(app, OpenAIMetering(CallMeter(UsageMeter(settings)), identify))

It belongs around the application and inside of whatever compresses answers. Needs nothing but the standard library.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Generator, Iterable, MutableMapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from producers.errors import ProducerError
from producers.openai_http import NOT_HANDED_ON, MeteredAnswer, Refusal
from producers.openai_usage import prepare

if TYPE_CHECKING:
    from producers.calls import Identity
    from producers.openai_http import OpenAIMetering

__all__ = ["WsgiMetering"]

Environ = MutableMapping[str, Any]
StartResponse = Callable[..., Any]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]

_TO_ENVIRON = {name: name.upper().replace("-", "_") for name in NOT_HANDED_ON}


class WsgiMetering:
    """The application, metered."""

    def __init__(self, app: Application, metering: OpenAIMetering) -> None:
        self._app = app
        self._metering = metering

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        found = self._metering.operation(environ["REQUEST_METHOD"], environ.get("PATH_INFO", ""))
        if found is None:
            return self._app(environ, start_response)
        identity = self._metering.identify(_headers(environ))
        if inspect.isawaitable(identity):
            raise TypeError("identify: returns an awaitable: give WSGI a plain function")
        if identity is None:
            return _refuse(start_response, Refusal.unknown())
        body = _read(environ, self._metering.request_bytes_max)
        if body is None:
            return _refuse(start_response, Refusal.too_large(self._metering.request_bytes_max))
        return self._serve(environ, start_response, identity, *found, body)

    def _serve(
        self,
        environ: Environ,
        start_response: StartResponse,
        identity: Identity,
        endpoint: str,
        operation: int,
        body: bytes,
    ) -> Iterable[bytes]:
        metering = self._metering
        request = prepare(endpoint, body, continuous=metering.continuous_usage)
        try:
            call = metering.calls.begin(identity, request.model or metering.model or "-", operation)
            call.receipt.durable(metering.calls.durable_timeout_s)
        except ProducerError as error:
            return _refuse(start_response, Refusal.unrecorded(error))
        inner = {key: value for key, value in environ.items() if key.removeprefix("HTTP_") not in _TO_ENVIRON.values()}
        inner |= {"CONTENT_LENGTH": str(len(request.body)), "wsgi.input": io.BytesIO(request.body)}
        answer = _Answer(MeteredAnswer(metering, call, request), start_response, metering.calls.durable_timeout_s)
        return answer.iterate(self._app, inner)


class _Answer:
    """What the application gives, held until its usage is durable."""

    def __init__(self, meter: MeteredAnswer, start_response: StartResponse, timeout_s: float) -> None:
        self._meter = meter
        self._start_response = start_response
        self._timeout_s = timeout_s
        self._start: tuple[Any, ...] = ()
        self._written: list[bytes] = []

    def _take_start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        kind = next((value for name, value in headers if name.lower() == "content-type"), "")
        self._meter.start(int(status[:3]), kind)
        if self._meter.streams:
            # What was injected is taken out again, so its length is not known.
            headers = [pair for pair in headers if pair[0].lower() != "content-length"]
            self._start_response(status, headers, exc_info)
        else:
            self._start = (status, headers, exc_info)
        return self._written.append

    def iterate(self, app: Application, environ: Environ) -> Generator[bytes, None, None]:
        """The answer's parts, each when what it costs is durable."""
        parts: Iterable[bytes] = ()
        try:
            parts = app(environ, self._take_start)
            for part in parts:
                yield from self._feed(b"".join([*self._written, part]), last=False)
                self._written.clear()
            yield from self._feed(b"".join(self._written), last=True)
        except GeneratorExit:
            # The server closes what it cannot send on.
            self._meter.leave()
            raise
        except BaseException:
            self._meter.fail()
            raise
        finally:
            if close := getattr(parts, "close", None):
                close()

    def _feed(self, chunk: bytes, *, last: bool) -> Iterable[bytes]:
        data, receipt = self._meter.feed(chunk, last=last)
        if receipt is not None:
            try:
                receipt.durable(self._timeout_s)
            except ProducerError as error:
                if self._meter.streams:
                    raise
                return _refuse(self._start_response, Refusal.unrecorded(error))
        if last and not self._meter.streams:
            self._start_response(*self._start)
        return [data] if data else []


def _headers(environ: Environ) -> dict[str, str]:
    return {key[5:].lower().replace("_", "-"): value for key, value in environ.items() if key.startswith("HTTP_")}


def _read(environ: Environ, bytes_max: int) -> bytes | None:
    """The body; None where it is too large."""
    try:
        length = int(environ.get("CONTENT_LENGTH") or -1)
    except ValueError:
        length = -1
    if length < 0:
        # Some servers end the input where the body ends, and say so; with others there is no body.
        length = bytes_max + 1 if environ.get("wsgi.input_terminated") else 0
    elif length > bytes_max:
        return None
    body: bytes = environ["wsgi.input"].read(length)
    return None if len(body) > bytes_max else body


def _refuse(start_response: StartResponse, refusal: Refusal) -> list[bytes]:
    start_response(f"{refusal.status} {HTTPStatus(refusal.status).phrase}", refusal.all_headers)
    return [refusal.body]
