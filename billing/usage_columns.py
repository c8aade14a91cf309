"""A batch of usage by columns: each field of all its events at once, and the checks that one look over a column settles.

A field of an event costs 50 ns to read from Python, so a field that no event has is not read: the batch's bytes, decoded once
more as one merged event (`MergedUsageBatch`), tell which those are, exactly, whatever the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter, gt
from typing import Any

from billing.limits import ID_CHARS_MAX, PLAIN_EVENT_BYTES_MAX, QUANTITY_MAX, TIME_MS_MAX
from billing.v1.usage_pb2 import MergedUsageBatch, RawUsageBatch, UsageBatch, UsageEvent
from billing.validation import OPTIONAL_IDS, TOKEN_FIELDS

_INPUT, _CACHE_READ = TOKEN_FIELDS.index("uncached_input_tokens"), TOKEN_FIELDS.index("cache_read_tokens")
# Of those that no sum looks at; only long events can hold one over its bound.
_OTHER_TEXTS = [name for name in OPTIONAL_IDS if name != "project_id"]


# What is read of every event; the classes of tokens that the batch has follow.
_READ = (
    "tenant_id",
    "request_id",
    "project_id",
    "model",
    "operation",
    "service_class",
    "outcome",
    "started_ms",
    "ended_ms",
)


@lru_cache(maxsize=1 << len(TOKEN_FIELDS))
def _reader(places: tuple[int, ...]) -> attrgetter[tuple[Any, ...]]:
    """What reads an event's row. An event at a time: a column at a time would fetch each event into the cache as often."""
    return attrgetter(*_READ, *[TOKEN_FIELDS[place] for place in places])


class UsageColumns:
    """A decoded batch (its bytes: `value`) by columns, one entry an event."""

    def __init__(self, value: bytes, batch: UsageBatch) -> None:
        self.raws: Sequence[bytes] = RawUsageBatch.FromString(value).events[:]
        self.events: Sequence[UsageEvent] = batch.events[:]
        merged = MergedUsageBatch.FromString(value).events
        places = tuple([place for place, name in enumerate(TOKEN_FIELDS) if merged.HasField(name)])  # type: ignore[arg-type]
        columns: list[tuple[Any, ...]] = list(zip(*map(_reader(places), self.events), strict=True)) or [()] * len(_READ)
        self.tenant_ids: tuple[str, ...] = columns[0]
        self.request_ids: tuple[str, ...] = columns[1]
        self.projects: tuple[str, ...] = columns[2]
        self.models: tuple[str, ...] = columns[3]
        self.operations: tuple[int, ...] = columns[4]
        self.service_classes: tuple[int, ...] = columns[5]
        self.outcomes: tuple[int, ...] = columns[6]
        self.started_ms: tuple[int, ...] = columns[7]
        self.ended_ms: tuple[int, ...] = columns[8]
        # The classes of tokens that any event has, by their place in TOKEN_FIELDS.
        self.tokens: dict[int, tuple[int, ...]] = dict(zip(places, columns[len(_READ) :], strict=True))
        self.first_ended_ms = min(self.ended_ms, default=0)
        self.last_ended_ms = max(self.ended_ms, default=0)
        self._largest = {place: max(column) for place, column in self.tokens.items()}
        self.with_units = {index for index, event in enumerate(self.events) if event.units} if merged.units else set()
        self._any_attributes = bool(merged.attributes)
        self.any_keys = merged.HasField("api_key_id")

    def _read(self, name: str) -> list[Any]:
        return list(map(attrgetter(name), self.events))

    def __len__(self) -> int:
        return len(self.raws)

    def well_formed(self) -> bool:
        """Whether no event can have a problem; False means only that each must be looked at. There is at least one."""
        return (
            self._texts_bounded()
            and min(self.started_ms) > 0
            and self.last_ended_ms <= TIME_MS_MAX
            and not any(map(gt, self.started_ms, self.ended_ms))
            and max(self._largest.values(), default=0) <= QUANTITY_MAX
            and all(self.tenant_ids)
            and all(self.request_ids)
            and all(self.models)
            and not self.with_units
        )

    def _texts_bounded(self) -> bool:
        if max(map(len, self.raws)) <= PLAIN_EVENT_BYTES_MAX:
            return True
        if self._any_attributes:
            return False
        columns = (self.tenant_ids, self.request_ids, self.projects, self.models, *map(self._read, _OTHER_TEXTS))
        return all(max(map(len, column)) <= ID_CHARS_MAX for column in columns)

    def prompt_tokens(self, index: int) -> int:
        """What an event's prompt has, cached or not."""
        return sum(column[index] for place in (_INPUT, _CACHE_READ) if (column := self.tokens.get(place)))

    def largest_prompt_tokens(self) -> int:
        """No prompt of the batch has more."""
        return self._largest.get(_INPUT, 0) + self._largest.get(_CACHE_READ, 0)
