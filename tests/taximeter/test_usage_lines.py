"""JSON lines of usage: a line is the event that it states, or it is named with its field, its value and the mend."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.v1 import usage_pb2
from taximeter.errors import InputFileError
from taximeter.usage_lines import LineError, parse_line, read_lines

if TYPE_CHECKING:
    from pathlib import Path

GOOD: dict[str, Any] = {
    "request_id": "r-1",
    "tenant_id": "acme",
    "model": "smollm2",
    "ended_at": "2026-01-31T12:00:00.250Z",
    "uncached_input_tokens": 812,
    "output_tokens": 64,
}


def line(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def test_a_line_becomes_the_event_that_it_states() -> None:
    event = parse_line(
        line(
            operation="chat",
            outcome="OUTCOME_CANCELLED",
            units={"characters": 12},
            attributes={"team": "検索"},
            backfill=True,
            latency_ms=7,
        )
    )
    assert event.ended_ms == event.started_ms == 1_769_860_800_250
    assert (event.uncached_input_tokens, event.output_tokens, event.latency_ms) == (812, 64, 7)
    assert event.operation == usage_pb2.OPERATION_CHAT
    assert event.outcome == usage_pb2.OUTCOME_CANCELLED
    assert event.service_class == usage_pb2.SERVICE_CLASS_STANDARD
    assert event.count_source == usage_pb2.COUNT_SOURCE_BACKEND
    assert [(unit.unit, unit.quantity) for unit in event.units] == [("characters", 12)]
    assert dict(event.attributes) == {"team": "検索"}
    assert event.backfill


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"output_tokens": 1.5}, "output_tokens: 1.5 is no whole number"),
        ({"output_tokens": "64"}, 'output_tokens: "64" is no whole number'),
        ({"output_tokens": True}, "output_tokens: true is no whole number"),
        ({"output_tokens": -1}, "output_tokens: -1 is negative"),
        ({"output_tokens": 2**41}, f"output_tokens: {2**41} is over"),
        ({"output_tokens": 2**70}, "is negative or too large"),
        ({"latency_ms": 2**32}, "latency_ms: 4294967296 does not fit"),
        ({"request_id": 7}, "request_id: 7 is no text"),
        ({"request_id": ""}, "request_id: is empty"),
        ({"tenant": "x"}, "tenant: is no field; the nearest is tenant_id"),
        ({"outcome": "fine"}, 'outcome: "fine" is not known; write one of completed, cancelled'),
        ({"ended_at": "2026-01-31T12:00:00"}, "names no time zone"),
        ({"ended_at": "today"}, 'ended_at: "today" is no time'),
        ({"ended_ms": 5}, "keep one"),
        ({"started_at": "2027-01-31T12:00:00Z"}, "started_ms: 1801396800000 is after ended_ms"),
        ({"units": [1]}, "units: [1] is no object"),
        ({"units": {"x": -1}}, "units[x]: -1 is negative"),
        ({"attributes": {"a": 1}}, "attributes[a]: 1 is no text"),
        ({"backfill": "yes"}, "backfill: "),
        ({"model": "\ud800"}, "model: holds half a surrogate pair"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_the_mend(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(LineError) as caught:
        parse_line(line(**changes))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"{", "column 2: is not JSON"),
        (b"[]", "is []; write a JSON object"),
        (b'{"model": "\xff"}', "is not UTF-8"),
        (b'{"model": "a", "model": "b"}', "model: stands twice"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_object_is_refused(raw: bytes, problem: str) -> None:
    with pytest.raises(LineError) as caught:
        parse_line(raw)
    assert problem in str(caught.value)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_line_raises_anything_else(raw: bytes) -> None:
    with pytest.raises(LineError):
        parse_line(raw)


@given(
    st.dictionaries(
        st.sampled_from([field.name for field in usage_pb2.UsageEvent.DESCRIPTOR.fields]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.lists(st.integers()),
        max_size=6,
    )
)
def test_no_object_raises_anything_else(changes: dict[str, object]) -> None:
    try:
        parse_line(json.dumps({**GOOD, **changes}).encode())
    except LineError as error:
        assert str(error)  # noqa: PT017  # both ways are right; what matters is that nothing else comes


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_bytes(line() + b"\n\n" + b"oops\n" + line(request_id="r-2"))
    lines = list(read_lines(path))
    assert [(item.number, item.event is not None) for item in lines] == [(1, True), (3, False), (4, True)]
    assert lines[1].problem.startswith("line 3: column 1: is not JSON")
    assert lines[1].raw == b"oops\n"


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_bytes(b"x" * 1_000_001)
    with pytest.raises(InputFileError, match="line 1: has over"):
        list(read_lines(path))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="cannot be read"):
        list(read_lines(tmp_path / "absent"))
