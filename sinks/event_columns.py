"""Usage events as columns, read where they are: which fields a batch has at all is found first, the others are never touched.

A batch's bytes are parsed a second time as a message in which `events` is one event whose fields are all repeated. Protobuf
merges what stands several times into one, so each field then lists what any event of the batch says, and a field whose list is
empty is said by none. That holds for every encoding, explicit zeros and doubled fields included. It costs a tenth of reading
the fields that are mostly absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor

from billing.v1.usage_pb2 import CountSource, Operation, Outcome, RefusalReason, ServiceClass, UsageBatch, UsageEvent
from sinks.coded import Coded
from sinks.engine import Columns, whole
from sinks.tables import TOKEN_COLUMNS, USAGE_EVENTS

__all__ = ["EVENT_COLUMNS", "OPERATIONS", "SERVICE_CLASSES", "EnumNames", "EventColumns"]


class EnumNames(dict[int, str]):
    """An enum's numbers as people write them: OUTCOME_BACKEND_ERROR is backend_error. A number of a later version stays one."""

    def __init__(self, enum: Iterable[tuple[str, int]], prefix: str) -> None:
        super().__init__({number: name.removeprefix(prefix).lower() for name, number in enum})

    def __missing__(self, number: int) -> str:
        return f"unknown_{number}"


OPERATIONS = EnumNames(Operation.items(), "OPERATION_")
SERVICE_CLASSES = EnumNames(ServiceClass.items(), "SERVICE_CLASS_")
_OUTCOMES = EnumNames(Outcome.items(), "OUTCOME_")
_COUNT_SOURCES = EnumNames(CountSource.items(), "COUNT_SOURCE_")
_REFUSALS = EnumNames(RefusalReason.items(), "REFUSAL_REASON_")

Read = Callable[[Sequence[UsageEvent]], Iterable[Any]]


def _plain(field: str) -> Read:
    get = attrgetter(field)
    return lambda events: map(get, events)


def _named(field: str, names: EnumNames) -> Read:
    get = attrgetter(field)
    return lambda events: map(names.__getitem__, map(get, events))


# Texts of which many events have the same, and those of which each has its own.
_COMMON_TEXTS = ("tenant_id", "project_id", "api_key_id", "model", "tokenizer", "server_id", "region")
_OWN_TEXTS = ("request_id", "user_id", "client_request_id")
_NUMBERS = (*TOKEN_COLUMNS, "context_tokens", "time_to_first_token_ms", "latency_ms")
_ENUMS = {
    "operation": OPERATIONS,
    "service_class": SERVICE_CLASSES,
    "outcome": _OUTCOMES,
    "count_source": _COUNT_SOURCES,
    "refusal_reason": _REFUSALS,
}
# Column: the field that it is read from, how, and what it is where no event has the field.
_CODED: dict[str, tuple[str, Read, str]] = {
    **{name: (name, _plain(name), "") for name in _COMMON_TEXTS},
    **{name: (name, _named(name, names), names[0]) for name, names in _ENUMS.items()},
}
_WHOLE: dict[str, tuple[str, Read]] = {
    **{name: (name, _plain(name)) for name in _NUMBERS},
    "started": ("started_ms", _plain("started_ms")),
    "ended": ("ended_ms", _plain("ended_ms")),
    "backfill": ("backfill", _plain("backfill")),
}
_LISTED: dict[str, tuple[str, Read, object]] = {
    **{name: (name, _plain(name), "") for name in _OWN_TEXTS},
    "unit_names": ("units", lambda events: [[unit.unit for unit in event.units] for event in events], ()),
    "unit_quantities": ("units", lambda events: [[unit.quantity for unit in event.units] for event in events], ()),
    "attribute_names": ("attributes", lambda events: [sorted(event.attributes) for event in events], ()),
    "attribute_values": (
        "attributes",
        lambda events: [[event.attributes[name] for name in sorted(event.attributes)] for event in events],
        (),
    ),
}
EVENT_COLUMNS = (*_CODED, *_WHOLE, *_LISTED)


class EventColumns:
    """Columns that grow by the events of one batch at a time."""

    def __init__(self) -> None:
        self._coded = {name: Coded() for name in _CODED}
        self._whole = {name: whole(USAGE_EVENTS.columns[name]) for name in _WHOLE}
        self._listed: dict[str, list[object]] = {name: [] for name in _LISTED}

    @property
    def columns(self) -> Columns:
        """Each column under its name."""
        return {**self._coded, **self._whole, **self._listed}

    def extend(self, batch_bytes: bytes, events: Sequence[UsageEvent]) -> None:
        """Add `events`, which are all or some of those in `batch_bytes`."""
        present = {field.name for field, _ in _probe(batch_bytes)}
        count = len(events)
        for name, (field, read, text) in _CODED.items():
            if field in present:
                self._coded[name].extend(read(events))
            else:
                self._coded[name].repeat(text, count)
        for name, (field, read) in _WHOLE.items():
            numbers = self._whole[name]
            if field in present:
                numbers.extend(read(events))
            else:
                numbers.frombytes(bytes(numbers.itemsize * count))
        for name, (field, read, absent) in _LISTED.items():
            self._listed[name] += read(events) if field in present else [absent] * count


def _probe_class() -> Any:
    """UsageBatch with one event, whose fields are all repeated."""
    file = descriptor_pb2.FileDescriptorProto(name="sinks/probe.proto", package="taximeter.sinks", syntax="proto3")
    batch = file.message_type.add(name="BatchProbe")
    batch.field.add(
        name="events",
        number=UsageBatch.DESCRIPTOR.fields_by_name["events"].number,
        type=FieldDescriptor.TYPE_MESSAGE,
        type_name=".taximeter.sinks.EventProbe",
        label=FieldDescriptor.LABEL_OPTIONAL,
    )
    event = file.message_type.add(name="EventProbe")
    for field in UsageEvent.DESCRIPTOR.fields:
        # Of texts, messages and maps only their presence is asked: as bytes they need no check and no types of their own.
        kind = field.type
        if kind in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE):
            kind = FieldDescriptor.TYPE_BYTES
        elif kind == FieldDescriptor.TYPE_ENUM:
            kind = FieldDescriptor.TYPE_INT32
        event.field.add(name=field.name, number=field.number, type=kind, label=FieldDescriptor.LABEL_REPEATED)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("taximeter.sinks.BatchProbe"))


_PROBE = _probe_class()


def _probe(batch_bytes: bytes) -> Any:
    return _PROBE.FromString(batch_bytes).events.ListFields()
