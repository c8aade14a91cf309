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
from sinks.tables import TOKEN_COLUMNS

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

Read = Callable[[Sequence[UsageEvent]], list[Any]]


def _plain(field: str) -> Read:
    get = attrgetter(field)
    return lambda events: list(map(get, events))


def _named(field: str, names: EnumNames) -> Read:
    get = attrgetter(field)
    return lambda events: [names[get(event)] for event in events]


# Column: the field that it is read from, how, and what it is where no event has the field.
_TEXTS = (
    "tenant_id",
    "request_id",
    "project_id",
    "user_id",
    "api_key_id",
    "model",
    "tokenizer",
    "server_id",
    "region",
    "client_request_id",
)
_NUMBERS = (*TOKEN_COLUMNS, "context_tokens", "time_to_first_token_ms", "latency_ms")
_ENUMS = {
    "operation": OPERATIONS,
    "service_class": SERVICE_CLASSES,
    "outcome": _OUTCOMES,
    "count_source": _COUNT_SOURCES,
    "refusal_reason": _REFUSALS,
}
_READERS: dict[str, tuple[str, Read, object]] = {
    **{name: (name, _plain(name), "") for name in _TEXTS},
    **{name: (name, _plain(name), 0) for name in _NUMBERS},
    **{name: (name, _named(name, names), names[0]) for name, names in _ENUMS.items()},
    "started": ("started_ms", _plain("started_ms"), 0),
    "ended": ("ended_ms", _plain("ended_ms"), 0),
    "backfill": ("backfill", lambda events: [int(event.backfill) for event in events], 0),
    "unit_names": ("units", lambda events: [[unit.unit for unit in event.units] for event in events], ()),
    "unit_quantities": ("units", lambda events: [[unit.quantity for unit in event.units] for event in events], ()),
    "attribute_names": ("attributes", lambda events: [sorted(event.attributes) for event in events], ()),
    "attribute_values": (
        "attributes",
        lambda events: [[event.attributes[name] for name in sorted(event.attributes)] for event in events],
        (),
    ),
}
EVENT_COLUMNS = tuple(_READERS)


class EventColumns:
    """Columns that grow by the events of one batch at a time."""

    def __init__(self) -> None:
        self.columns: dict[str, list[object]] = {name: [] for name in _READERS}

    def extend(self, batch_bytes: bytes, events: Sequence[UsageEvent]) -> None:
        """Add `events`, which are all or some of those in `batch_bytes`."""
        present = {field.name for field, _ in _probe(batch_bytes)}
        count = len(events)
        for name, (field, read, absent) in _READERS.items():
            self.columns[name] += read(events) if field in present else [absent] * count


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
