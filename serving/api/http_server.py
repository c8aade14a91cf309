"""The billing API over HTTP: each route of the table of policies is its RPC, with the same messages as JSON.

Promise: a request that does not fit the published document is refused before anything is done, and every refusal is RFC 9457
problem details. Nothing is cached without being asked about again, nothing is embedded in another's page, and no other origin's
scripts may read an answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import cache
from http import HTTPStatus
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from jsonschema import Draft202012Validator
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from billing.v1.billing_service_pb2 import (
    GetInvoiceDocumentResponse,
    WatchAlertsRequest,
    WatchAlertsResponse,
    WatchOverviewRequest,
    WatchOverviewResponse,
)
from serving.api import openapi
from serving.api.access import POLICIES, SERVICE
from serving.api.errors import ApiError, Problem
from serving.api.fields import IDEMPOTENT
from serving.api.traffic import OTHER
from serving.dashboard import dashboard_routes
from serving.gateway.credentials import find_secret

if TYPE_CHECKING:
    from google.protobuf.descriptor import MethodDescriptor
    from starlette.types import ASGIApp, Receive, Scope, Send

    from serving.api.calls import Calls
    from serving.api.traffic import Traffic

__all__ = ["make_http_app", "to_json"]

_LOG = logging.getLogger(__name__)

_KEEP_ALIVE_S: Final = 15.0
# As servers write it of whoever went before the request was there; nobody gets it.
_CLIENT_GONE: Final = 499
_HEADERS: Final = {
    "cache-control": "private, no-cache",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
# An invoice as HTML brings its own styles and fonts, and nothing else.
_DOCUMENT_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; font-src data:; img-src data:; frame-ancestors 'none'; sandbox"
)

Endpoint = Callable[[Request], Awaitable[Response]]


def make_http_app(calls: Calls, more_routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The ASGI application; `more_routes` stand beside the API's own."""
    described = json.dumps(openapi.document(version("taximeter")), ensure_ascii=False).encode()

    async def describe(request: Request) -> Response:
        return _cacheable(request, Response(described, media_type="application/json"))

    async def live(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        waits_for = calls.waiting_for
        return JSONResponse({"status": waits_for or "ok"}, 503 if waits_for else 200)

    # What is named in full before what has a part that may be anything.
    methods = sorted(SERVICE.methods, key=lambda method: "{" in POLICIES[method.name].path)
    endpoints = {method.name: _endpoint(calls, method) for method in methods}
    routes: list[BaseRoute] = [
        Route(POLICIES[name].path, endpoint, methods=[POLICIES[name].verb]) for name, endpoint in endpoints.items()
    ]
    names = {endpoint: name for name, endpoint in endpoints.items()}
    routes += [Route("/openapi.json", describe), Route("/healthz", live), Route("/readyz", ready), *dashboard_routes()]
    return Starlette(
        routes=[*routes, *more_routes],
        middleware=[
            Middleware(_Counting, traffic=calls.traffic, names=names),
            Middleware(_SecurityHeaders, is_tls=calls.settings.tls is not None),
        ],
        exception_handlers={HTTPException: _http_error, ApiError: _api_error, Exception: _bug},
    )


def to_json(message: Message) -> dict[str, Any]:
    """A message as every answer has it."""
    values: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return values


def _endpoint(calls: Calls, method: MethodDescriptor) -> Endpoint:
    if method.server_streaming:
        return _stream_endpoint(calls, method)

    async def endpoint(request: Request) -> Response:
        secret = find_secret(request.headers.items())
        # Who may not call learns nothing of what a call may be.
        calls.authenticate(method.name, secret)
        message = await _message(request, method, calls.settings.limits.request_bytes_max)
        answer = await calls.call(method.name, message, secret)
        if isinstance(answer, GetInvoiceDocumentResponse):
            headers = {"content-security-policy": _DOCUMENT_POLICY}
            return _cacheable(request, Response(answer.content, media_type=answer.content_type, headers=headers))
        content = json.dumps(to_json(answer), ensure_ascii=False, separators=(",", ":")).encode()
        return _cacheable(request, Response(content, media_type="application/json"))

    return endpoint


def _stream_endpoint(calls: Calls, method: MethodDescriptor) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        secret = find_secret(request.headers.items())
        calls.authenticate(method.name, secret)
        message = await _message(request, method, 0)
        assert isinstance(message, WatchAlertsRequest | WatchOverviewRequest), "every stream goes on where one stopped"
        # How a browser goes on after a connection was lost.
        message.after = request.headers.get("last-event-id", message.after)
        answers = calls.watch(method.name, message, secret)
        # Refused, if it is, before the answer begins.
        first = await anext(answers)
        return StreamingResponse(_events(first, answers), media_type="text/event-stream")

    return endpoint


async def _events(first: Message, answers: AsyncIterator[Message]) -> AsyncIterator[str]:
    """Server-sent events: the position is the event's ID, a comment now and then keeps the connection."""
    yield _event(first)
    pending: asyncio.Task[Message] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(_next(answers))
            done, _ = await asyncio.wait({pending}, timeout=_KEEP_ALIVE_S)
            if not done:
                yield ": still there\n\n"
                continue
            answer, pending = pending.result(), None
            yield _event(answer)
    except ApiError as error:
        yield f"event: problem\ndata: {json.dumps(error.problem.values())}\n\n"
    finally:
        if pending is not None:
            pending.cancel()


async def _next(answers: AsyncIterator[Message]) -> Message:
    return await anext(answers)


def _event(answer: Message) -> str:
    assert isinstance(answer, WatchAlertsResponse | WatchOverviewResponse), "every stream says where it is"
    kind = next((field.name for field, _ in answer.ListFields() if field.name != "position"), "position")
    return f"id: {answer.position}\nevent: {kind}\ndata: {json.dumps(to_json(answer))}\n\n"


async def _message(request: Request, method: MethodDescriptor, bytes_max: int) -> Message:
    """The request as its RPC takes it. Raises ApiError for what does not fit the published document."""
    policy = POLICIES[method.name]
    values = await _body(request, bytes_max) if policy.writes else _query(request, method)
    if policy.writes and request.query_params:
        raise ApiError.malformed(f"query: {next(iter(request.query_params))!r} is not known here; send it in the body")
    _validate(values, _validator(method.name))
    if policy.writes and (key := request.headers.get("idempotency-key")) is not None:
        if not key:
            raise ApiError.malformed("Idempotency-Key: is empty; leave it out, or send one")
        values[IDEMPOTENT] = key
    message = GetMessageClass(method.input_type)()
    try:
        return json_format.ParseDict(values, message)
    except (json_format.ParseError, UnicodeError) as error:
        raise ApiError.malformed(str(error)) from None


async def _body(request: Request, bytes_max: int) -> dict[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "content-type: send application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > bytes_max:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body: send at most {bytes_max} bytes")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError.malformed(f"body: is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise ApiError.malformed("body: is no object; send one")
    return values


def _query(request: Request, method: MethodDescriptor) -> dict[str, Any]:
    """What stands in path and query, each by the type that the document says."""
    fields = method.input_type.fields_by_name
    schemas = {**openapi.query_schemas(method), **openapi.path_schemas(method)}
    values: dict[str, Any] = {}
    given = [*request.query_params.multi_items(), *request.path_params.items()]
    for name, text in given:
        if name not in schemas:
            raise ApiError.malformed(f"query: {name[:40]!r} is not known here; leave it out")
        schema = schemas[name]
        is_number = schema["type"] == "integer"
        value = int(text) if is_number and text.isascii() and text.isdigit() and len(text) < 20 else text
        if fields[name].is_repeated:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise ApiError.malformed(f"query: {name!r} stands there twice; send it once")
        else:
            values[name] = value
    return values


@cache
def _validator(name: str) -> Draft202012Validator:
    method = SERVICE.methods_by_name[name]
    if POLICIES[name].writes:
        return Draft202012Validator(openapi.body_schema(method))
    schemas = {**openapi.query_schemas(method), **openapi.path_schemas(method)}
    return Draft202012Validator({"type": "object", "properties": schemas})


def _validate(values: dict[str, Any], validator: Draft202012Validator) -> None:
    try:
        # The first alone: there may be as many as a body has bytes.
        error = next(validator.iter_errors(values), None)
    except RecursionError:
        raise ApiError.malformed("body: is nested too deeply; send what the document says") from None
    if error is not None:
        where = ".".join(map(str, error.absolute_path)) or "body"
        raise ApiError.malformed(f"{where}: {error.message[:300]}")


def _cacheable(request: Request, response: Response) -> Response:
    """The answer, or that it is still the one that the caller has."""
    if request.method != "GET":
        return response
    tag = f'"{hashlib.blake2b(response.body, digest_size=16).hexdigest()}"'
    response.headers["etag"] = tag
    if tag in [given.strip() for given in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"etag": tag})
    return response


def _problem(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    content = json.dumps(problem.values(), ensure_ascii=False).encode()
    return Response(content, problem.status, headers, media_type=openapi.PROBLEM_TYPE)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "Starlette hands on what it was told to"
    headers = {}
    if error.http_status is HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if error.retry_after_s:
        headers["retry-after"] = str(error.retry_after_s)
    return _problem(error.problem, headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "Starlette hands on what it was told to"
    status = HTTPStatus(error.status_code)
    detail = error.detail if error.detail != status.phrase else "see /openapi.json for what there is"
    return _problem(Problem(status.value, status.phrase, detail), dict(error.headers or {}))


async def _bug(request: Request, error: Exception) -> Response:
    _LOG.error("%s", request.url.path, exc_info=error)
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return _problem(Problem(status.value, status.phrase, "the call failed; the API's log says why"))


class _Counting:
    """Counts each request under its route's method, and the status that the client got."""

    def __init__(self, app: ASGIApp, *, traffic: Traffic, names: Mapping[Any, str]) -> None:
        self._app, self._traffic, self._names = app, traffic, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        # Where nothing is answered: what the server makes of an error that nobody expected.
        status: int = HTTPStatus.INTERNAL_SERVER_ERROR

        async def send_and_see(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_see)
        except ClientDisconnect:
            status = _CLIENT_GONE
            raise
        finally:
            method = self._names.get(scope.get("endpoint"), OTHER)
            self._traffic.ended("http", method, str(int(status)), time.perf_counter() - began_s)


class _SecurityHeaders:
    """What every answer says to a browser, whoever made it."""

    def __init__(self, app: ASGIApp, *, is_tls: bool) -> None:
        self._app = app
        self._headers = _HEADERS | ({"strict-transport-security": "max-age=31536000"} if is_tls else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)
