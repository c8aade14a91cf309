"""A real HTTP receiver that answers as it is told, alerts to send, and endpoints that lead there."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from billing.v1.account_pb2 import LedgerPosition
from billing.v1.alert_pb2 import (
    ALERT_RULE_TOKEN_BURST,
    ALERT_STATE_RAISED,
    SEVERITY_WARNING,
    Alert,
    AlertRule,
    AlertState,
    Severity,
)
from serving.notifier.settings import Endpoint, NotifierLimits

__all__ = ["QUICK", "SECRET", "Answer", "Receiver", "Request", "alert", "endpoint"]

SECRET = bytes(range(32))
# Pauses as short as a test wants them. An attempt that a busy machine holds up is not given up and made again.
QUICK = NotifierLimits(attempt_timeout_s=120.0, wait_initial_s=0.01, wait_max_s=0.05, wait_jitter_s=0.01)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the receiver answers."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    # Waits for this before it answers.
    gate: threading.Event | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def webhook_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def values(self) -> Any:
        return json.loads(self.body)


class Receiver:
    """Keeps what comes. `answer` decides; else each request takes the next of `answers`, and 200 when there is none."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.answers: deque[Answer] = deque()
        self.answer: Callable[[Request], Answer] | None = None
        self._lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                body = self.rfile.read(length)
                if len(body) < length:
                    # Who sent it was killed within it: a request that never came.
                    self.close_connection = True
                    return
                headers = {name.lower(): value for name, value in self.headers.items()}
                answer = receiver.take(Request(self.path, headers, body))
                if answer.gate is not None:
                    answer.gate.wait(60)
                with contextlib.suppress(OSError):
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(answer.body)))
                    self.end_headers()
                    self.wfile.write(answer.body)

            def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  its name is the library's
                """Requests are kept, not told."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that is gone is what some tests want."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._scheme = "http" if tls is None else "https"
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}/hook"

    def take(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            scripted = self.answers.popleft() if self.answers else Answer()
        return scripted if self.answer is None else self.answer(request)

    def has(self, count: int) -> Callable[[], bool]:
        """Asks whether so many requests came."""
        return lambda: len(self.requests) >= count

    def ids(self) -> list[str]:
        with self._lock:
            return [request.webhook_id for request in self.requests]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@contextlib.contextmanager
def receiving(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver(tls)
    try:
        yield receiver
    finally:
        receiver.close()


def alert(
    sequence: int,
    *,
    name: str = "",
    revision: int = 1,
    state: AlertState.ValueType = ALERT_STATE_RAISED,
    severity: Severity.ValueType = SEVERITY_WARNING,
    rule: AlertRule.ValueType = ALERT_RULE_TOKEN_BURST,
    tenant_id: str = "acme",
    told_ms: int = 0,
) -> Alert:
    """An alert as the ledger's record `sequence` tells it."""
    told_ms = told_ms or time.time_ns() // 1_000_000
    return Alert(
        alert_id=name or f"abc-0-{sequence}-0",
        rule=rule,
        severity=severity,
        tenant_id=tenant_id,
        raised_ms=told_ms - 1_000,
        summary="many tokens — in a minute",
        request_ids=["r1", "r2"],
        figures={"tokens": 5},
        labels={"model": "llama"},
        position=LedgerPosition(generation=b"g", sequence=sequence),
        state=state,
        revision=revision,
        updated_ms=told_ms,
        told_ms=told_ms,
        subject="llama",
    )


def endpoint(url: str, name: str = "ops", **changes: Any) -> Endpoint:
    """One that may be on this machine."""
    return Endpoint(**{"name": name, "url": url, "secrets": (SECRET,), "allow_private": True, **changes})


def secret_line(secret: bytes = SECRET) -> str:
    return f"whsec_{base64.b64encode(secret).decode()}"
