"""The middlewares: nothing runs that cannot be billed, nothing leaves that is not durable, and every end has its bill."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    COUNT_SOURCE_ESTIMATE,
    OUTCOME_BACKEND_ERROR,
    OUTCOME_BACKEND_ERROR_PARTIAL,
    OUTCOME_CANCELLED,
    OUTCOME_COMPLETED,
    UsageEvent,
)
from producers.asgi import AsgiMetering
from producers.calls import CallMeter, Identity, Used, bearer_secret
from producers.meter import UsageMeter
from producers.openai_http import OpenAIMetering
from producers.wsgi import WsgiMetering
from tests.producers.support import journaled, open_meter

CHUNK = b'data: {"choices":[{"index":0}]}\n\n'
COUNTED = b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"
ASK = b'{"model": "small", "stream": true}'
EVENTS, DOCUMENT = "text/event-stream", "application/json"


class GoneError(OSError):
    """What a server's `send` says when the connection is."""


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[UsageMeter]:
    made = open_meter(tmp_path)
    yield made
    made.close()


def events_of(meter: UsageMeter) -> list[UsageEvent]:
    return [event for numbers in journaled(meter.journal).values() for event in numbers.values()]


class Server:
    """An application that answers with the parts that it is given, as ASGI and as WSGI; an exception among them is raised."""

    def __init__(self, *parts: bytes | Exception, status: int = 200, kind: str = EVENTS) -> None:
        self._parts, self._status, self._kind = parts, status, kind
        self.bodies: list[bytes] = []

    async def asgi(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": self._status, "headers": [(b"content-type", self._kind.encode())]})
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    def wsgi(self, environ: Any, start_response: Any) -> Iterator[bytes]:
        self.bodies.append(environ["wsgi.input"].read())
        start_response(f"{self._status} so", [("content-type", self._kind)])
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            yield part


def ask_asgi(
    server: Server,
    metering: OpenAIMetering,
    body: bytes,
    on_part: Callable[[bytes], None],
    *,
    path: str = "/v1/chat/completions",
) -> int:
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        if "status" in message:
            statuses.append(message["status"])
        if message.get("body"):
            on_part(message["body"])

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"Authorization", b"Bearer secret")]}
    asyncio.run(AsgiMetering(server.asgi, metering)(scope, receive, send))
    return statuses[0]


def ask_wsgi(
    server: Server,
    metering: OpenAIMetering,
    body: bytes,
    on_part: Callable[[bytes], None],
    *,
    path: str = "/v1/chat/completions",
) -> int:
    statuses: list[str] = []
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": path, "HTTP_AUTHORIZATION": "Bearer secret"}
    environ |= {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}  # type: ignore[dict-item]
    answer = WsgiMetering(server.wsgi, metering)(environ, lambda status, headers, exc_info=None: statuses.append(status))
    try:
        for part in answer:
            on_part(part)
    finally:
        if close := getattr(answer, "close", None):
            close()
    return int(statuses[0][:3])


ASKS = {"asgi": ask_asgi, "wsgi": ask_wsgi}
both = pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)


def metering(meter: UsageMeter, **fields: Any) -> OpenAIMetering:
    def identify(headers: Mapping[str, str]) -> Identity | None:
        return Identity("acme") if bearer_secret(headers) == "secret" else None

    return OpenAIMetering(CallMeter(meter), fields.pop("identify", identify), **fields)


@both
def test_a_stream_s_usage_is_durable_before_its_last_event_leaves(ask: Any, meter: UsageMeter) -> None:
    held: list[tuple[bytes, int]] = []
    server = Server(CHUNK, CHUNK, USAGE, DONE)
    assert ask(server, metering(meter), ASK, lambda part: held.append((part, len(events_of(meter))))) == 200
    assert held == [(CHUNK, 0), (CHUNK, 0), (DONE, 1)]
    assert json.loads(server.bodies[0])["stream_options"] == {"include_usage": True}
    (event,) = events_of(meter)
    assert (event.uncached_input_tokens, event.output_tokens, event.outcome) == (7, 3, OUTCOME_COMPLETED)
    assert (event.tenant_id, event.model, event.count_source) == ("acme", "small", COUNT_SOURCE_BACKEND)


@both
def test_a_document_leaves_when_its_usage_is_durable(ask: Any, meter: UsageMeter) -> None:
    held: list[int] = []
    answer = b'{"usage":{"prompt_tokens":7,"completion_tokens":3}}'
    server = Server(answer[:9], answer[9:], kind=DOCUMENT)
    assert ask(server, metering(meter), b'{"model": "small"}', lambda part: held.append(len(events_of(meter)))) == 200
    assert held == [1]


@both
def test_a_full_journal_refuses_before_the_server_is_asked(ask: Any, tmp_path: Path) -> None:
    meter = open_meter(tmp_path, journal_bytes_max=1)
    server, told = Server(DONE), bytearray()
    assert ask(server, metering(meter), ASK, told.extend) == 503
    assert b"journal_bytes_max" in told
    assert not server.bodies
    meter.close()


@both
def test_who_is_not_known_and_what_cannot_be_billed_are_refused(ask: Any, meter: UsageMeter) -> None:
    server = Server(DONE)
    assert ask(server, metering(meter, identify=lambda headers: None), ASK, bytes) == 401
    assert ask(server, metering(meter, request_bytes_max=10), ASK, bytes) == 413
    assert ask(server, metering(meter), b'{"model": "%s"}' % (b"m" * 300), bytes) == 400
    assert not server.bodies
    assert not events_of(meter)


@both
def test_other_paths_pass_as_they_are(ask: Any, meter: UsageMeter) -> None:
    server, seen = Server(USAGE), bytearray()
    assert ask(server, metering(meter), ASK, seen.extend, path="/v1/models") == 200
    assert (bytes(seen), server.bodies) == (USAGE, [ASK])
    assert not events_of(meter)


@both
def test_a_path_with_a_slash_behind_it_is_billed_too(ask: Any, meter: UsageMeter) -> None:
    """As Django's, and those of servers that take both."""
    assert ask(Server(USAGE), metering(meter), ASK, lambda _: None, path="/v1/chat/completions/") == 200
    assert len(events_of(meter)) == 1


@both
@pytest.mark.parametrize(
    ("parts", "status", "outcome", "tokens"),
    [
        ((b'{"error":{}}',), 500, OUTCOME_BACKEND_ERROR, 0),
        ((ValueError("broken"),), 200, OUTCOME_BACKEND_ERROR, 0),
        ((COUNTED, ValueError("broken")), 200, OUTCOME_BACKEND_ERROR_PARTIAL, 2),
        ((COUNTED, b'data: {"error":{"message":"out of memory"}}\n\n', DONE), 200, OUTCOME_BACKEND_ERROR_PARTIAL, 2),
    ],
    ids=["status", "before", "midstream", "in_band"],
)
def test_what_the_server_fails_at_is_billed_as_far_as_it_came(
    ask: Any, meter: UsageMeter, parts: tuple[Any, ...], status: int, outcome: int, tokens: int
) -> None:
    broken = any(isinstance(part, Exception) for part in parts)
    server = Server(*parts, status=status)
    if broken:
        with pytest.raises(ValueError, match="broken"):
            ask(server, metering(meter), ASK, bytes)
    else:
        assert ask(server, metering(meter), ASK, bytes) == status
    meter.close()
    meter.journal.close()
    again = open_meter(meter.settings.journal_path.parent)
    (event,) = events_of(again)
    again.close()
    assert (event.outcome, event.output_tokens) == (outcome, tokens)


@both
@pytest.mark.parametrize("said", [True, False], ids=["counted", "estimated"])
def test_a_client_that_leaves_pays_for_what_was_made(ask: Any, tmp_path: Path, said: bool) -> None:
    meter = open_meter(tmp_path)
    seen = 0

    def on_part(part: bytes) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise GoneError

    settings = metering(meter, continuous_usage=said, estimate=lambda body, made: Used(output_tokens=made.count(b"index")))
    with pytest.raises(GoneError):
        ask(Server(*[COUNTED if said else CHUNK] * 9), settings, ASK, on_part)
    meter.close()
    again = open_meter(tmp_path)
    (event,) = events_of(again)
    again.close()
    assert (event.outcome, event.output_tokens) == (OUTCOME_CANCELLED, 2)
    assert event.count_source == (COUNT_SOURCE_BACKEND if said else COUNT_SOURCE_ESTIMATE)


@both
def test_an_answer_without_usage_is_said_to_be_billed_nothing(
    ask: Any, meter: UsageMeter, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(Server(CHUNK, DONE), metering(meter), ASK, bytes) == 200
    (event,) = events_of(meter)
    assert (event.output_tokens, event.count_source) == (0, COUNT_SOURCE_ESTIMATE)
    assert event.request_id in caplog.text
