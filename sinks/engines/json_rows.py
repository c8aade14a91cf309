"""ClickHouse's JSONCompact answers as rows of plain Python values; nothing passes through a float that was not one."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal

from sinks.engine import Rows
from sinks.errors import EngineError

__all__ = ["decode_rows"]


def decode_rows(answer: bytes) -> Rows:
    """The rows of an answer in which decimals are quoted. Raises EngineError for what is no such answer."""
    if not answer:
        return Rows((), [])
    try:
        return _decode(answer)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise EngineError(
            f"{len(answer)} bytes are no answer of ClickHouse in JSONCompact ({error!r}); does another service listen there?"
        ) from error


def _decode(answer: bytes) -> Rows:
    document = json.loads(answer)
    names = tuple(column["name"] for column in document["meta"])
    converters = {
        index: converter
        for index, column in enumerate(document["meta"])
        if (converter := _converter(column["type"])) is not None
    }
    data: list[list[object]] = document["data"]
    for index, converter in converters.items():
        for row in data:
            row[index] = converter(row[index])
    return Rows(names, [tuple(row) for row in data])


def _converter(kind: str) -> Callable[[object], object] | None:
    if kind.startswith("Decimal"):
        return lambda value: Decimal(str(value))
    if kind.startswith("Array(Decimal"):
        return lambda value: [Decimal(str(item)) for item in value] if isinstance(value, list) else value
    return None
