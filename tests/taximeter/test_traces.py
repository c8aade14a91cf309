"""Traces: the same replay is the same events, the sums are the file's, and a bad row is named."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

import pytest

from billing.validation import event_problem
from taximeter.errors import InputFileError
from taximeter.traces import read_trace, tenant_names

if TYPE_CHECKING:
    from pathlib import Path

SAMPLE = resources.files("taximeter") / "data" / "azure_trace_sample.csv"
START_MS = 1_700_000_000_000
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.csv"
    path.write_bytes(SAMPLE.read_bytes())
    return path


def test_the_sums_are_those_of_the_file(sample: Path) -> None:
    trace = read_trace(sample)
    rows = [line.split(",") for line in sample.read_text().splitlines()[1:]]
    events = list(trace.events(tenants=5, start_ms=START_MS, model="trace"))
    assert len(events) == len(rows) == 200
    assert sum(event.uncached_input_tokens for event in events) == sum(int(row[1]) for row in rows) == trace.context_tokens
    assert sum(event.output_tokens for event in events) == sum(int(row[2]) for row in rows) == trace.generated_tokens
    assert not any(event_problem(event) for event in events)


def test_a_second_replay_is_the_same_events_to_the_byte(sample: Path, tmp_path: Path) -> None:
    def replay(path: Path, start_ms: int) -> list[bytes]:
        trace = read_trace(path)
        return [
            event.SerializeToString(deterministic=True) for event in trace.events(tenants=7, start_ms=start_ms, model="trace")
        ]

    renamed = tmp_path / "another-name.csv"
    renamed.write_bytes(sample.read_bytes())
    assert replay(sample, START_MS) == replay(renamed, START_MS)
    assert not set(replay(sample, START_MS)) & set(replay(sample, START_MS + 1))


def test_request_ids_are_unique_and_another_start_has_others(sample: Path) -> None:
    trace = read_trace(sample)
    ids = [trace.request_id(row, start_ms) for row in trace.rows for start_ms in (START_MS, START_MS + 1)]
    assert len(set(ids)) == len(ids)


def test_times_keep_their_distances_from_the_start(sample: Path) -> None:
    events = list(read_trace(sample).events(tenants=3, start_ms=START_MS, model="trace"))
    assert events[0].ended_ms == START_MS
    # 18:15:46.6805900 and 18:15:50.9951690 in the file.
    assert events[1].ended_ms - events[0].ended_ms == 4_315


def test_every_tenant_gets_some(sample: Path) -> None:
    trace = read_trace(sample)
    assert {trace.tenant(row, 10) for row in trace.rows} == set(tenant_names(10))


def test_skipping_leaves_the_rest_as_it_was(sample: Path) -> None:
    trace = read_trace(sample)
    whole = list(trace.events(tenants=3, start_ms=START_MS, model="trace"))
    assert list(trace.events(tenants=3, start_ms=START_MS, model="trace", skip=150)) == whole[150:]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b,c\n", "line 1: columns are 'a,b,c'"),
        ("", "line 1: columns are ''"),
        (HEADER + "2023-11-16 18:15:46.68,1\n", "line 2: has 2 columns"),
        (HEADER + "yesterday,1,2\n", "line 2: TIMESTAMP 'yesterday' is no time"),
        (HEADER + "2023-11-16 18:15:46.68,-1,2\n", "line 2: ContextTokens '-1' is no count"),
        (HEADER + "2023-11-16 18:15:46.68,1,2.5\n", "line 2: GeneratedTokens '2.5' is no count"),
        (
            HEADER + "2023-11-16 18:15:46.68,1,2\n2023-11-16 18:15:45.68,1,2\n",
            "line 3: TIMESTAMP '2023-11-16 18:15:45.68' is before the first",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InputFileError) as caught:
        read_trace(path)
    assert problem in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="cannot be read"):
        read_trace(tmp_path / "absent.csv")
