"""A batch of usage by columns: each field of all its events at once, and the checks that one look over a column settles.

A field of an event costs 50 ns to read from Python, so a field that no event has is not read: the batch's bytes, decoded once
more as one merged event (`MergedUsageBatch`), tell which those are, exactly, whatever the encoder.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from operator import attrgetter, gt
from typing import Any

from billing.limits import ID_CHARS_MAX, PLAIN_EVENT_BYTES_MAX, QUANTITY_MAX, TIME_MS_MAX
from billing.v1.usage_pb2 import MergedUsageBatch, RawUsageBatch, UsageBatch, UsageEvent
from billing.validation import OPTIONAL_IDS, TOKEN_FIELDS
from billing.windows import MINUTE_MS

# Of what a prompt has, cached or not.
PROMPT_PLACES = TOKEN_FIELDS.index("uncached_input_tokens"), TOKEN_FIELDS.index("cache_read_tokens")
# Of those that no sum looks at; only long events can hold one over its bound.
_OTHER_TEXTS = [name for name in OPTIONAL_IDS if name != "project_id"]

# What is summed in one window, whatever prices it: tenant, project, model, operation, service class, minute.
WindowName = tuple[str, str, str, int, int, int]

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
        self.any_attributes = bool(merged.attributes)
        # The events of each window, the windows in the order in which the batch names them.
        self.windows: Mapping[WindowName, list[int]] = _grouped(enumerate(self._window_names()))
        self.tenants = frozenset([name[0] for name in self.windows])
        self.any_keys = merged.HasField("api_key_id")

    def _read(self, name: str) -> list[Any]:
        return list(map(attrgetter(name), self.events))

    def __len__(self) -> int:
        return len(self.raws)

    def windows_of(self, indexes: Sequence[int]) -> Mapping[WindowName, list[int]]:
        """The windows of some of the events."""
        if len(indexes) == len(self):
            return self.windows
        names = list(self._window_names())
        return _grouped((index, names[index]) for index in indexes)

    def _window_names(self) -> Iterator[WindowName]:
        first, last = self.first_ended_ms // MINUTE_MS, self.last_ended_ms // MINUTE_MS
        minutes = repeat(first, len(self)) if first == last else [ended_ms // MINUTE_MS for ended_ms in self.ended_ms]
        return zip(self.tenant_ids, self.projects, self.models, self.operations, self.service_classes, minutes, strict=True)

    def well_formed(self) -> bool:
        """Whether no event can have a problem; False means only that each must be looked at. There is at least one."""
        return (
            self._texts_bounded()
            and min(self.started_ms) > 0
            and self.last_ended_ms <= TIME_MS_MAX
            and not any(map(gt, self.started_ms, self.ended_ms))
            and max(self._largest.values(), default=0) <= QUANTITY_MAX
            and all(self.request_ids)
            and all(name[0] and name[2] for name in self.windows)
            and not self.with_units
        )

    def _texts_bounded(self) -> bool:
        if max(map(len, self.raws)) <= PLAIN_EVENT_BYTES_MAX:
            return True
        if self.any_attributes:
            return False
        columns = (self.tenant_ids, self.request_ids, self.projects, self.models, *map(self._read, _OTHER_TEXTS))
        return all(max(map(len, column)) <= ID_CHARS_MAX for column in columns)

    def prompt_tokens(self, index: int) -> int:
        """What an event's prompt has, cached or not."""
        return sum(column[index] for place in PROMPT_PLACES if (column := self.tokens.get(place)))

    def largest_prompt_tokens(self) -> int:
        """No prompt of the batch has more."""
        return sum([self._largest.get(place, 0) for place in PROMPT_PLACES])


def _grouped(named: Iterable[tuple[int, WindowName]]) -> Mapping[WindowName, list[int]]:
    windows: defaultdict[WindowName, list[int]] = defaultdict(list)
    for index, name in named:
        windows[name].append(index)
    return windows
