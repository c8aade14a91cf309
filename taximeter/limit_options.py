"""Limits as they stand on the command line: NAME=NUMBER, and MODEL:NAME=NUMBER for those of one model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final

import typer

from billing.limits import ID_CHARS_MAX
from billing.v1.account_pb2 import Limits
from taximeter.errors import MisuseError

__all__ = ["LimitOption", "parse_limits", "parse_model_limits"]

_NAMES: Final = tuple(field.name for field in Limits.DESCRIPTOR.fields)
_HIGHEST: Final = 2**31 - 1
LimitOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=NUMBER", help=f"Any of {', '.join(_NAMES)}; may be repeated."),
]


def parse_limits(option: str, texts: Iterable[str]) -> Limits | None:
    """Those that are named; None: none is. Raises MisuseError."""
    limits = Limits()
    for text in texts:
        _set(limits, option, text, text)
    return limits if limits.ByteSize() else None


def parse_model_limits(option: str, texts: Iterable[str]) -> dict[str, Limits]:
    """By model. Raises MisuseError."""
    found: dict[str, Limits] = {}
    for text in texts:
        model, colon, limit = text.rpartition(":")
        if not colon or not 0 < len(model) <= ID_CHARS_MAX:
            raise MisuseError(f"{option} {text[:80]!r}: write MODEL:NAME=NUMBER, such as small:requests_per_minute=60")
        _set(found.setdefault(model, Limits()), option, limit, text)
    return found


def _set(limits: Limits, option: str, limit: str, text: str) -> None:
    name, _, number = limit.partition("=")
    if name not in _NAMES or not number.isascii() or not number.isdigit() or int(number[:12]) > _HIGHEST:
        raise MisuseError(f"{option} {text[:80]!r}: write NAME=NUMBER with one of {', '.join(_NAMES)}, and up to {_HIGHEST}")
    setattr(limits, name, int(number))
