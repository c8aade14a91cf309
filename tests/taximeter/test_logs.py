"""Lines of the parts' logs: one JSON document each, with what the caller named, and never a secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taximeter import logs
from taximeter.config import load, read_secret

SECRET = 'seal"key\\with-odd äöü-letters'
KEY = "tm-" + "aB3_x-9" * 5


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """As a part's, without touching how pytest itself catches logs."""
    found = logging.getLogger("tests.logs")
    found.propagate, found.level = False, logging.DEBUG
    yield found
    found.handlers.clear()
    logs._secrets.clear()


def lines(logger: logging.Logger, formatter: logging.Formatter) -> io.StringIO:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    return stream


def parsed(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_a_document_with_what_the_caller_named(logger: logging.Logger) -> None:
    stream = lines(logger, logs._JsonFormatter("gateway"))
    logger.info("request %s\nof %s", "r1", "acme", extra={"request_id": "r1", "tenant_id": "acme", "partition": 3})
    try:
        raise ValueError("what\nhappened")
    except ValueError:
        logger.exception("it failed")
    told, failed = parsed(stream)
    time = told.pop("time")
    assert time.endswith("+00:00")
    assert told == {
        "level": "info",
        "part": "gateway",
        "logger": "tests.logs",
        "message": "request r1\nof acme",
        "request_id": "r1",
        "tenant_id": "acme",
        "partition": 3,
    }
    assert failed["level"] == "error"
    assert failed["exception"].endswith("ValueError: what\nhappened")


@pytest.mark.parametrize("formatter", [logs._JsonFormatter("sink"), logs._TextFormatter()], ids=["json", "text"])
def test_no_secret_is_in_any_line(logger: logging.Logger, formatter: logging.Formatter, tmp_path: Path) -> None:
    (tmp_path / "seal_key").write_text(SECRET)
    (tmp_path / "taximeter.toml").write_text(f'[ledger]\nseal_key_file = "{tmp_path}/seal_key"\n')
    config = load(tmp_path / "taximeter.toml")
    assert read_secret(config.ledger, "seal_key", needed_for="this test").decode() == SECRET
    stream = lines(logger, formatter)
    logger.info("plainly %s", SECRET, extra={"odd": SECRET})
    logger.info("authorization: Bearer %s, and %s", "abc.def.ghi", KEY)
    try:
        raise ValueError(f"refused {SECRET}")
    except ValueError:
        logger.exception("with a trace")
    written = stream.getvalue()
    shown = "\n".join(str(line) for line in parsed(stream)) if isinstance(formatter, logs._JsonFormatter) else written
    for secret in (SECRET, SECRET[:12], "abc.def.ghi", KEY):
        assert secret not in written
        assert secret not in shown
    assert "plainly ***" in shown
    assert "Bearer ***" in shown
    assert "tm-***" in shown
    # What is no secret stays as it was.
    assert "with a trace" in shown
