"""docs/outcomes.md has every outcome of the contract, a test for each row, and is right about what is free.

That the tests which it names exist is checked with those of all other pages: test_named_tests.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from billing.rating import FREE_OUTCOMES
from billing.v1.usage_pb2 import Outcome

PAGE = Path(__file__).parents[2] / "docs/outcomes.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if line.startswith("| ")
][1:]
# What metering.md's table and the issue ask for, in the words of the page.
ASKED = {
    "completed",
    "the client cancels mid-stream",
    "the client cancels mid-stream, and the end of the call is all that the back end hears",
    "the client disconnects mid-stream",
    "deadline exceeded",
    "back end error before the first token",
    "back end error mid-stream",
    "back end error mid-stream, `bill_partial_answers` off",
    "refused: key that is revoked, expired or lacks the scope",
    "refused: key that is missing or unknown",
    "refused: size",
    "refused: rate",
    "refused: balance, account",
    "refused: model",
    "gateway's own retry",
    "client's own retry, even with its last request's ID",
    "the same usage event delivered again",
    "another payload under the same request ID",
    "prompt truncated by the back end",
    "the answer is longer than its key, tenant or model may have",
    "the same, of an answer in one piece, whose back end was told the limit and went on",
    "the gateway is killed mid-stream",
    "the gateway is stopped mid-stream",
    "the money ends mid-stream",
}


def events(cell: str) -> set[int]:
    return {Outcome.Value(f"OUTCOME_{name}") for name in re.findall(r"`([A-Z_]+)`", cell)}


def test_every_row_that_is_asked_for_is_there_and_names_its_test() -> None:
    assert {name for name, *_ in ROWS} == ASKED
    for name, _, rule, test in ROWS:
        assert rule, name
        assert re.fullmatch(r"(`tests/[\w/.]+\.py::\w+`(, )?)+", test), name


def test_every_outcome_of_the_contract_is_there() -> None:
    assert set().union(*(events(cell) for _, cell, _, _ in ROWS)) == set(Outcome.values()) - {0}


def test_what_is_said_to_be_free_is_free() -> None:
    for name, cell, rule, _ in ROWS:
        assert bool(events(cell)) is (cell not in ("none", "as it was", "as the first")), name
        if events(cell):
            assert ("price 0" in rule) is bool(events(cell) & FREE_OUTCOMES), name
