"""What the parts write to standard error: a line an event, for people or, as JSON, for programs.

Promise: a line of JSON has `time` (UTC), `level`, `part`, `logger` and `message`, what the caller gave as `extra` under its own
name (`request_id`, `tenant_id`, `partition` …), and `exception` where there is one; a text of several lines stays one line. No
secret that the configuration named, and no bearer token or API key, is in any line, whoever wrote it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Final, Literal, TextIO

__all__ = ["LogFormat", "LogLevel", "keep_out", "start_logging"]

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

MASK: Final = "***"
# Shorter ones would mask ordinary words.
_SECRET_CHARS_MIN: Final = 6
# What a client shows, and what `key create` shows once.
_SHOWN: Final = re.compile(r"(?i)(bearer\s+)[^\s\"',;]+|(\btm-)[a-z0-9_-]{20,}")
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_secrets: set[str] = set()


def keep_out(secret: bytes) -> None:
    """Mask this wherever it would be written from now on."""
    text = secret.decode("utf-8", "replace")
    if len(text) >= _SECRET_CHARS_MIN:
        _secrets.add(text)


def start_logging(part: str, level: LogLevel, form: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Write what `level` and above say to standard error."""
    if level != "debug":
        # Faust and what is under it tell of each of their services' every step.
        for name in ("faust", "mode", "aiokafka"):
            logging.getLogger(name).setLevel(logging.WARNING)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter(part) if form == "json" else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return _masked(super().format(record))


class _JsonFormatter(logging.Formatter):
    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "part": self._part,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN and name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: _clean(value) for name, value in line.items()}, ensure_ascii=False)


def _clean(value: object) -> object:
    # Before it is JSON: an escape could take a secret apart.
    return value if isinstance(value, bool | int | float | None) else _masked(str(value))


def _masked(text: str) -> str:
    for secret in _secrets:
        text = text.replace(secret, MASK)
    return _SHOWN.sub(lambda found: f"{found[1] or found[2]}{MASK}", text)
