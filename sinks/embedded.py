"""The process that owns chDB answers everyone else's queries, over loopback.

Promise: only 127.0.0.1 is listened on, only the holder of the token is answered, only SELECTs run (the engine itself is told to
refuse anything else), and each request is bounded in bytes, time and number. It keeps no state: a client asks again.
"""

from __future__ import annotations

import hmac
import json
import logging
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol, Self

from sinks.errors import EngineUnavailable, SinkError

__all__ = ["JsonReader", "LoopbackServer"]

_LOG = logging.getLogger(__name__)

_BODY_BYTES_MAX = 1_000_000
_LENGTH_CHARS_MAX = 20
_TIMEOUT_MAX_S = 300.0
_SOCKET_TIMEOUT_S = 30.0
_REQUESTS_MAX = 32
_TOKEN_CHARS_MIN = 22


class JsonReader(Protocol):
    """An engine that gives answers as ClickHouse's JSONCompact."""

    def query_json(self, bound_sql: str, *, timeout_s: float) -> bytes: ...


class LoopbackServer:
    """Serves `reader` on 127.0.0.1:`port` (0: any free one, then in `url`) from `start` to `close`."""

    def __init__(
        self, reader: JsonReader, token: str, port: int = 0, *, status: Callable[[], dict[str, object]] | None = None
    ) -> None:
        if len(token) < _TOKEN_CHARS_MIN:
            raise SinkError(f"loopback token: {len(token)} characters; give at least {_TOKEN_CHARS_MIN} random ones")
        running = threading.BoundedSemaphore(_REQUESTS_MAX)
        expected = f"Bearer {token}".encode()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = _SOCKET_TIMEOUT_S

            def do_GET(self) -> None:
                if self.path != "/status":
                    self._answer(404, b"there are GET /status and POST /query")
                elif self._admitted():
                    self._answer(200, json.dumps(status() if status is not None else {}).encode())

            def do_POST(self) -> None:
                if self.path != "/query":
                    self._answer(404, b"there are GET /status and POST /query")
                elif self._admitted():
                    self._query()

            def _admitted(self) -> bool:
                given = self.headers.get("Authorization", "").encode("latin-1", "replace")
                if hmac.compare_digest(given, expected):
                    return True
                self._answer(401, b"the token is not this sink's; it stands in the state folder of the process that runs it")
                return False

            def _query(self) -> None:
                length = self.headers.get("Content-Length", "")
                if not (length.isdecimal() and len(length) <= _LENGTH_CHARS_MAX) or int(length) > _BODY_BYTES_MAX:
                    self._answer(
                        413, f"Content-Length: {length[:_LENGTH_CHARS_MAX]!r}; send at most {_BODY_BYTES_MAX} bytes".encode()
                    )
                    return
                try:
                    request = json.loads(self.rfile.read(int(length)))
                    sql, timeout_s = str(request["sql"]), float(request["timeout_s"])
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                    self._answer(400, f'body: {error!r}; send {{"sql": ..., "timeout_s": ...}}'.encode())
                    return
                if not 0 < timeout_s <= _TIMEOUT_MAX_S:
                    self._answer(400, f"timeout_s: {timeout_s}; between 0 and {_TIMEOUT_MAX_S:g}".encode())
                    return
                if not running.acquire(blocking=False):
                    self._answer(503, f"{_REQUESTS_MAX} queries are running already; try again".encode())
                    return
                try:
                    answer = reader.query_json(sql, timeout_s=timeout_s)
                except EngineUnavailable as error:
                    self._answer(503, str(error).encode())
                except SinkError as error:
                    self._answer(400, str(error).encode())
                else:
                    self._answer(200, answer)
                finally:
                    running.release()

            def _answer(self, code: int, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                # One request a connection: nobody holds a thread while asking nothing.
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                _LOG.debug(format, *args)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            # A client that asks at the same moment as others must not be turned away by the backlog.
            request_queue_size = 64

        self._server = Server(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="sink-loopback", daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> Self:
        """Answer from now on."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop answering; running queries are let go with the process."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(timeout=5.0)
        self._server.server_close()
