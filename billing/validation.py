"""Whether a usage event can be taken. Every refusal names the field, the value and the mend."""

from __future__ import annotations

from operator import attrgetter

from billing.limits import (
    ATTRIBUTE_CHARS_MAX,
    ATTRIBUTES_MAX,
    ID_CHARS_MAX,
    QUANTITY_MAX,
    TIME_MS_MAX,
    UNIT_CHARS_MAX,
    UNITS_MAX,
)
from billing.v1.usage_pb2 import UsageEvent

REQUIRED_IDS = ("request_id", "tenant_id", "model")
OPTIONAL_IDS = ("project_id", "user_id", "api_key_id", "tokenizer", "server_id", "region", "client_request_id")
TOKEN_FIELDS = (
    "uncached_input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "image_input_tokens",
    "audio_input_tokens",
    "audio_output_tokens",
)


def _text_problem(name: str, value: str, chars_max: int) -> str | None:
    if len(value) > chars_max:
        return f"{name}: {len(value)} characters ({value[:32]!r}…); send at most {chars_max}"
    return None


_tokens = attrgetter(*TOKEN_FIELDS)


def event_problem(event: UsageEvent, size_bytes: int | None = None) -> str | None:
    """What is wrong with `event`, for a person, or None. Bounds only: whether it is too old is the ledger's to say.

    `size_bytes`: of the event on the wire, where that is known.
    """
    if not (event.request_id and event.tenant_id and event.model):
        name = next(name for name in REQUIRED_IDS if not getattr(event, name))
        return f"{name}: is empty; every usage event needs one"
    # An event that is no longer as a whole has no text that is too long.
    if (event.ByteSize() if size_bytes is None else size_bytes) > ID_CHARS_MAX:
        for name in REQUIRED_IDS + OPTIONAL_IDS:
            if problem := _text_problem(name, getattr(event, name), ID_CHARS_MAX):
                return problem
    if not 0 < event.started_ms <= event.ended_ms <= TIME_MS_MAX:
        return _times_problem(event)
    # None is negative, so none is over the bound where all of them together are not.
    if sum(_tokens(event)) > QUANTITY_MAX:
        for name, value in zip(TOKEN_FIELDS, _tokens(event), strict=True):
            if value > QUANTITY_MAX:
                return f"{name}: {value} is over {QUANTITY_MAX}; a negative number sent as unsigned looks like this"
    return _extras_problem(event) if event.units or event.attributes else None


def _times_problem(event: UsageEvent) -> str:
    for name, value in (("started_ms", event.started_ms), ("ended_ms", event.ended_ms)):
        if not 0 < value <= TIME_MS_MAX:
            return f"{name}: {value} is not a Unix time in milliseconds; send one between 1 and {TIME_MS_MAX}"
    return f"started_ms: {event.started_ms} is after ended_ms {event.ended_ms}; a request ends when it started or later"


def _extras_problem(event: UsageEvent) -> str | None:
    units = event.units
    if len(units) > UNITS_MAX:
        return f"units: {len(units)} entries; send at most {UNITS_MAX}"
    seen: set[str] = set()
    for entry in units:
        if not entry.unit or entry.unit in seen:
            return f"units: {entry.unit[:UNIT_CHARS_MAX]!r} is empty or stands twice; name each unit once"
        seen.add(entry.unit)
        if problem := _text_problem("units", entry.unit, UNIT_CHARS_MAX):
            return problem
        if entry.quantity > QUANTITY_MAX:
            return f"units[{entry.unit}]: {entry.quantity} is over {QUANTITY_MAX}"
    if len(event.attributes) > ATTRIBUTES_MAX:
        return f"attributes: {len(event.attributes)} entries; send at most {ATTRIBUTES_MAX}"
    for key, value in event.attributes.items():
        if problem := _text_problem(f"attributes[{key[:32]}]", key + value, ATTRIBUTE_CHARS_MAX):
            return problem
    return None
