"""The columns of a batch say what its events say one by one, however they were encoded."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from billing.usage_columns import UsageColumns
from billing.v1.usage_pb2 import RawUsageBatch, UsageBatch, UsageEvent
from billing.validation import TOKEN_FIELDS
from tests.billing.ledgers import usage

_NUMBER_OF = {name: UsageEvent.DESCRIPTOR.fields_by_name[name].number for name in TOKEN_FIELDS}
_VARINT, _LENGTH = 0, 2


def _varint(value: int, padding: int = 0) -> bytes:
    """`value`, with so many bytes more than it needs."""
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F)
    groups += [0] * padding
    return bytes([group | 0x80 for group in groups[:-1]]) + bytes(groups[-1:])


_fields = st.builds(
    lambda number, wire, value, text, padding: (
        _varint(number << 3 | wire, padding) + (_varint(value, padding) if wire == _VARINT else _varint(len(text)) + text)
    ),
    st.one_of(st.sampled_from(sorted(_NUMBER_OF.values())), st.integers(7, 12), st.integers(23, 30)),
    st.sampled_from([_VARINT, _VARINT, _LENGTH]),
    st.one_of(st.just(0), st.integers(0, 1 << 41)),
    st.sampled_from([b"", b"a", b"\x80", b"\x05", b"\xff\xff\xff"]),
    st.integers(0, 2),
)
_PLAIN = UsageEvent(request_id="r", tenant_id="t", model="m", started_ms=1, ended_ms=2).SerializeToString()


@given(st.lists(st.lists(_fields, max_size=6).map(b"".join), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_an_odd_encoding_hides_nothing(extras: list[bytes]) -> None:
    """Fields that stand twice, explicit zeros after a number, tags and numbers longer than they need be, wrong wire types."""
    value = RawUsageBatch(events=[_PLAIN + extra for extra in extras]).SerializeToString()
    try:
        batch = UsageBatch.FromString(value)
    except Exception:  # noqa: BLE001  such a batch is rejected before anybody looks at its columns
        return
    columns = UsageColumns(value, batch)
    for place, name in enumerate(TOKEN_FIELDS):
        said = tuple(getattr(event, name) for event in batch.events)
        assert columns.tokens.get(place, (0,) * len(said)) == said
    assert columns.outcomes == tuple(event.outcome for event in batch.events)
    assert columns.ended_ms == tuple(event.ended_ms for event in batch.events)


def test_a_number_is_seen_though_the_last_event_says_zero() -> None:
    tag = _varint(_NUMBER_OF["cache_write_tokens"] << 3)
    value = RawUsageBatch(events=[_PLAIN + tag + _varint(7), _PLAIN + tag + b"\0"]).SerializeToString()
    assert UsageColumns(value, UsageBatch.FromString(value)).tokens == {TOKEN_FIELDS.index("cache_write_tokens"): (7, 0)}


def test_units_under_an_overlong_tag_are_seen() -> None:
    value = RawUsageBatch(
        events=[_PLAIN, _PLAIN + _varint(21 << 3 | _LENGTH, 2) + b"\x05\x0a\x01u\x10\x03"]
    ).SerializeToString()
    columns = UsageColumns(value, UsageBatch.FromString(value))
    assert columns.with_units == {1}
    assert not columns.well_formed()


def test_classes_that_no_event_has_are_not_read() -> None:
    value = UsageBatch(events=[usage("r1", "t"), usage("r2", "t", cache_read_tokens=5)]).SerializeToString()
    columns = UsageColumns(value, UsageBatch.FromString(value))
    assert sorted(columns.tokens) == [0, 1, 2]
    assert columns.largest_prompt_tokens() == 105
    assert [columns.prompt_tokens(index) for index in range(2)] == [100, 105]
