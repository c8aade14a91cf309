"""Asks the process that owns chDB, over loopback.

Promise: the same rows as in that process, read-only. The answer is bounded in bytes and time; a wrong token, an owner that is
away or a slow one each raise with what to do.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from urllib.parse import urlsplit

from sinks.engine import Parameter, Rows
from sinks.engines.json_rows import decode_rows
from sinks.errors import EngineError, EngineUnavailable
from sinks.parameters import bind

__all__ = ["ANSWER_BYTES_MAX", "LoopbackEngine"]

ANSWER_BYTES_MAX = 256 * 1024 * 1024
# Beyond the time that the query itself is given.
_MARGIN_S = 2.0


class LoopbackEngine:
    """A Reader of the database behind `url` (http://127.0.0.1:port), with the bearer token of that process."""

    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname not in ("127.0.0.1", "localhost", "::1") or parts.port is None:
            raise EngineError(
                f"loopback url: {url!r}; write http://127.0.0.1:PORT (the token would travel in the clear elsewhere)"
            )
        self._host = parts.hostname
        self._port = parts.port
        self._token = token

    def __repr__(self) -> str:
        return f"LoopbackEngine(http://{self._host}:{self._port})"

    def query(self, sql: str, parameters: Mapping[str, Parameter] | None = None, *, timeout_s: float = 30.0) -> Rows:
        body = json.dumps({"sql": bind(sql, parameters), "timeout_s": timeout_s}).encode()
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s + _MARGIN_S)
        try:
            connection.request(
                "POST",
                "/query",
                body,
                {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
            )
            response = connection.getresponse()
            answer = response.read(ANSWER_BYTES_MAX + 1)
        except (OSError, http.client.HTTPException) as error:
            raise EngineUnavailable(
                f"the sink at {self._host}:{self._port} does not answer ({error}); is it running?"
            ) from error
        finally:
            connection.close()
        if len(answer) > ANSWER_BYTES_MAX:
            raise EngineError(f"the answer is over {ANSWER_BYTES_MAX} bytes; ask for less")
        if response.status == 200:
            return decode_rows(answer)
        text = answer[:4096].decode(errors="replace")
        if response.status == 503:
            raise EngineUnavailable(text)
        raise EngineError(text)

    def close(self) -> None:
        """Nothing is held between queries."""
