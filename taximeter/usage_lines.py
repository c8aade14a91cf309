"""Usage as JSON lines: one event a line, with the names of `UsageEvent`.

Promise: a line becomes exactly the event that it states, or `LineError`, which names the line, the field, the value
and the mend. Nothing is guessed: an unknown field is refused, a number that is no whole number is refused, a field
that stands twice is refused. What may be left out: outcome (completed), service_class (standard), count_source
(backend), started_ms (ended_ms).

    {"request_id": "r-1", "tenant_id": "acme", "model": "smollm2", "ended_at": "2026-01-31T12:00:00Z",
     "uncached_input_tokens": 812, "output_tokens": 64, "units": {"requests": 1}, "attributes": {"team": "search"}}
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from billing.v1 import usage_pb2
from billing.v1.usage_pb2 import UsageEvent
from billing.validation import event_problem
from taximeter.errors import InputFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["Line", "LineError", "parse_line", "read_lines"]

LINE_BYTES_MAX: Final = 1_000_000
_SHOWN_CHARS: Final = 60
_UINT64_MAX: Final = 2**64 - 1
_TIMES: Final = {"started_at": "started_ms", "ended_at": "ended_ms"}
_ENUMS: Final[dict[str, tuple[Any, str]]] = {
    "operation": (usage_pb2.Operation, "OPERATION_"),
    "service_class": (usage_pb2.ServiceClass, "SERVICE_CLASS_"),
    "outcome": (usage_pb2.Outcome, "OUTCOME_"),
    "count_source": (usage_pb2.CountSource, "COUNT_SOURCE_"),
    "refusal_reason": (usage_pb2.RefusalReason, "REFUSAL_REASON_"),
}
_TEXTS: Final = frozenset(
    {
        "request_id",
        "tenant_id",
        "project_id",
        "user_id",
        "api_key_id",
        "model",
        "tokenizer",
        "server_id",
        "region",
        "client_request_id",
    }
)
_NUMBERS_32: Final = frozenset({"time_to_first_token_ms", "latency_ms"})
_KNOWN: Final = sorted({field.name for field in UsageEvent.DESCRIPTOR.fields} | set(_TIMES))
_DEFAULTS: Final = {
    "outcome": usage_pb2.OUTCOME_COMPLETED,
    "service_class": usage_pb2.SERVICE_CLASS_STANDARD,
    "count_source": usage_pb2.COUNT_SOURCE_BACKEND,
}


class LineError(ValueError):
    """A line that cannot be taken: field, value, mend."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the file: its number, its bytes, and the event or what is wrong with it."""

    number: int
    raw: bytes
    event: UsageEvent | None
    problem: str = ""


def read_lines(path: Path) -> Iterator[Line]:
    """Every line that is not blank, in order."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(LINE_BYTES_MAX + 1):
                number += 1
                if len(raw) > LINE_BYTES_MAX:
                    raise InputFileError(f"{path}, line {number}: has over {LINE_BYTES_MAX} bytes: write one event a line")
                if not raw.strip():
                    continue
                try:
                    yield Line(number, raw, parse_line(raw))
                except LineError as problem:
                    yield Line(number, raw, None, f"line {number}: {problem}")
    except OSError as error:
        raise InputFileError(f"{path} cannot be read ({error.strerror}): correct the path") from None


def parse_line(raw: bytes) -> UsageEvent:
    """The event that the line states. Raises LineError."""
    try:
        return _parse_event(raw)
    except RecursionError:
        raise LineError("is nested too deeply; an event is a flat object") from None


def _parse_event(raw: bytes) -> UsageEvent:
    values = _parse_object(raw)
    event = UsageEvent()
    for name, value in values.items():
        _set(event, name, value)
    for name, default in _DEFAULTS.items():
        if name not in values:
            setattr(event, name, default)
    if not event.started_ms:
        event.started_ms = event.ended_ms
    if problem := event_problem(event):
        raise LineError(problem)
    return event


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        values = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise LineError(f"byte {error.start}: is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise LineError(f"column {error.colno}: is not JSON ({error.msg}); write one JSON object a line") from None
    except LineError:
        raise
    except ValueError as error:
        # Python refuses to read numbers of thousands of digits.
        raise LineError(f"holds a number that cannot be read ({error}); a count has at most 20 digits") from None
    if not isinstance(values, dict):
        raise LineError(f"is {_shown(values)}; write a JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise LineError(f"{_printable(twice[:_SHOWN_CHARS])}: stands twice; keep one")
    return values


def _set(event: UsageEvent, name: str, value: Any) -> None:
    if name in _TIMES:
        target = _TIMES[name]
        if getattr(event, target):
            raise LineError(f"{name}: {target} is there too; keep one")
        setattr(event, target, _parse_time(name, value))
    elif name in _ENUMS:
        setattr(event, name, _parse_enum(name, value))
    elif name in _TEXTS:
        setattr(event, name, _parse_text(name, value))
    elif name == "units":
        for unit, quantity in _parse_map(name, value, _parse_number).items():
            event.units.add(unit=unit, quantity=quantity)
    elif name == "attributes":
        event.attributes.update(_parse_map(name, value, _parse_text))
    elif name == "backfill":
        if not isinstance(value, bool):
            raise LineError(f"{name}: {_shown(value)} is not true or false; write one of them")
        event.backfill = value
    elif name in _KNOWN:
        number = _parse_number(name, value)
        if name in _NUMBERS_32 and number >= 2**32:
            raise LineError(f"{name}: {number} does not fit in 32 bits; is it milliseconds?")
        if name.endswith("ed_ms") and number >= 2**63:
            raise LineError(f"{name}: {number} is not a Unix time in milliseconds; send one")
        if name.endswith("ed_ms") and getattr(event, name):
            raise LineError(f"{name}: {name.replace('_ms', '_at')} is there too; keep one")
        setattr(event, name, number)
    else:
        nearest = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.0)[0]
        raise LineError(f"{_printable(name[:_SHOWN_CHARS])}: is no field; the nearest is {nearest}")


def _parse_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise LineError(f"{name}: {_shown(value)} is no text; write it in quotation marks")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise LineError(f"{name}: holds half a surrogate pair; write the character whole") from None
    return value


def _parse_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise LineError(f"{name}: {_shown(value)} is no whole number; write one without quotation marks or a point")
    if not 0 <= value <= _UINT64_MAX:
        raise LineError(f"{name}: {value} is negative or too large; write a number from 0")
    return value


def _parse_map(name: str, value: Any, parse: Callable[[str, Any], Any]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LineError(f'{name}: {_shown(value)} is no object; write {{"name": …}}')
    return {_parse_text(name, key): parse(f"{name}[{_printable(key[:32])}]", item) for key, item in value.items()}


def _parse_enum(name: str, value: Any) -> int:
    enum, prefix = _ENUMS[name]
    names = [full.removeprefix(prefix).lower() for full, _ in enum.items() if not full.endswith("_UNSPECIFIED")]
    if isinstance(value, str) and value.removeprefix(prefix).lower() in names:
        return int(enum.Value(prefix + value.removeprefix(prefix).upper()))
    raise LineError(f"{name}: {_shown(value)} is not known; write one of {', '.join(names)}")


def _parse_time(name: str, value: Any) -> int:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise LineError(f"{name}: {_shown(value)} is no time; write it like 2026-01-31T12:00:00Z") from None
    if moment.tzinfo is None:
        raise LineError(f"{name}: {_shown(value)} names no time zone; add Z or an offset")
    # Whole numbers: a float of a Unix time in seconds loses milliseconds to rounding.
    return int(moment.replace(microsecond=0).timestamp()) * 1_000 + moment.microsecond // 1_000


def _printable(text: str) -> str:
    """Half a surrogate pair cannot be written anywhere."""
    return text.encode(errors="backslashreplace").decode()


def _shown(value: Any) -> str:
    text = _printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
