"""Values go into SQL here and nowhere else: `{name:Type}` in a query takes the value of that name, written as a literal.

Promise: a value of the declared type reads back as itself on every engine, whatever characters it holds, and can never end
its literal; anything else raises ParameterError and no query is sent. ClickHouse can bind parameters itself, but only newer
servers do, and their clients escape them in different ways; one writer of literals for all engines is what a test can cover.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sinks.errors import ParameterError

__all__ = ["TEXT_CHARS_MAX", "VALUES_MAX", "Parameter", "bind"]

Parameter = int | str | Sequence[str]

TEXT_CHARS_MAX = 4_096
VALUES_MAX = 4_000

_PLACEHOLDER = re.compile(r"\{(\w+):([A-Za-z0-9()]+)\}")
_INTEGERS = {
    "Int64": (-(2**63), 2**63 - 1),
    "UInt64": (0, 2**64 - 1),
    "UInt32": (0, 2**32 - 1),
}
# ClickHouse's string literals know these escapes in every version.
_ESCAPES = str.maketrans({"\\": "\\\\", "'": "\\'", "\0": "\\0", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def bind(sql: str, parameters: Mapping[str, Parameter] | None = None) -> str:
    """`sql` with a literal for each placeholder. Every placeholder needs a value, every value a placeholder."""
    values = parameters or {}
    used = set()

    def literal(match: re.Match[str]) -> str:
        name, kind = match.groups()
        if name not in values:
            raise ParameterError(f"parameter {name}: the query asks for it ({kind}), and no value was given")
        used.add(name)
        return _literal(name, kind, values[name])

    bound = _PLACEHOLDER.sub(literal, sql)
    if len(used) != len(values):
        raise ParameterError(f"parameters {sorted(values.keys() - used)}: the query has no place for them")
    return bound


def _literal(name: str, kind: str, value: Parameter) -> str:
    if kind == "String":
        return _text(name, value)
    if kind == "Array(String)":
        if isinstance(value, str | int):
            raise ParameterError(f"parameter {name}: {value!r} is not a list of texts")
        if len(value) > VALUES_MAX:
            raise ParameterError(f"parameter {name}: {len(value)} values; ask for at most {VALUES_MAX} at a time")
        return f"[{','.join(_text(name, item) for item in value)}]"
    if kind in _INTEGERS:
        lowest, highest = _INTEGERS[kind]
        if type(value) is not int or not lowest <= value <= highest:
            raise ParameterError(f"parameter {name}: {value!r} is not a number from {lowest} to {highest} ({kind})")
        return str(value)
    raise ParameterError(f"parameter {name}: type {kind} is not one of String, Array(String), {', '.join(_INTEGERS)}")


def _text(name: str, value: Parameter) -> str:
    if not isinstance(value, str):
        raise ParameterError(f"parameter {name}: {value!r} is not text")
    if len(value) > TEXT_CHARS_MAX:
        raise ParameterError(f"parameter {name}: {len(value)} characters; at most {TEXT_CHARS_MAX}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ParameterError(f"parameter {name}: {value!r} holds half a surrogate pair; send valid Unicode") from error
    return f"'{value.translate(_ESCAPES)}'"
