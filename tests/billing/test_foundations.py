"""Amounts, identities, sequences and the contracts: small things that everything rests on."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.amounts import AmountError, format_pico, from_amount, parse_decimal_to_pico, to_amount
from billing.identity import murmur2, partition_of
from billing.limits import PRODUCER_RANGES_MAX
from billing.sequences import ProducerSequences
from billing.v1 import usage_pb2 as u
from tests.billing.ledgers import batch, usage


@given(st.integers(-(2**127), 2**127 - 1))
def test_an_amount_survives_its_contract_and_its_text(pico: int) -> None:
    assert from_amount(to_amount(pico)) == pico
    if abs(pico) < 10**37:
        assert parse_decimal_to_pico(format_pico(pico).replace(",", "")) == pico


def test_amounts_that_cannot_be_are_refused() -> None:
    with pytest.raises(AmountError):
        to_amount(2**127)
    for text in ("", "1e3", "1.0000000000001", "1,5", "NaN", "0x1"):
        with pytest.raises(AmountError, match="decimal"):
            parse_decimal_to_pico(text)
    assert format_pico(-1_234_500_000_000_000, "USD") == "-1,234.50 USD"
    assert format_pico(12_800_000) == "0.0000128"


def test_partitions_are_those_of_kafkas_default_partitioner() -> None:
    # The vectors of Apache Kafka's UtilsTest.testMurmur2 (clients/src/test/java/org/apache/kafka/common/utils/UtilsTest.java).
    vectors = {
        "21": -973932308,
        "foobar": -790332482,
        "a-little-bit-long-string": -985981536,
        "a-little-bit-longer-string": -1486304829,
        "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
        "abc": 479470107,
    }
    for text, expected in vectors.items():
        assert murmur2(text.encode()) == expected % 2**32
    assert {partition_of(f"tenant-{n}", 7) for n in range(100)} == set(range(7))


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 6)), max_size=30))
def test_marks_know_exactly_what_came(batches: list[tuple[int, int]]) -> None:
    sequences = ProducerSequences("p")
    came: set[int] = set()
    for first, count in batches:
        sequences.take(first, count, 0, 1)
        came.update(range(first, first + count))
        sequences = ProducerSequences.from_mark(sequences.to_mark())
    covered = next(n for n in range(1, 200) if n not in came) - 1
    assert sequences.covered == covered
    missing = {n for first, last, _ in sequences.missing() for n in range(first, last + 1)}
    assert missing == set(range(1, max(came, default=0) + 1)) - came


def test_a_tail_that_does_not_close_is_missing_until_it_does() -> None:
    sequences = ProducerSequences("p")
    sequences.take(1, 5, 8, log_time_ms=10)
    assert (sequences.missing(), sequences.missing_since_ms) == ([(6, 8, 10)], 10)
    sequences.take(6, 3, 8, log_time_ms=20)
    assert (sequences.missing(), sequences.missing_since_ms) == ([], 0)


def test_what_is_remembered_of_a_numbering_is_bounded() -> None:
    sequences = ProducerSequences("p")
    numbers = list(range(3, 1_000, 2))
    random.Random(1).shuffle(numbers)
    for number in numbers:
        sequences.take(number, 1, 0, 1)
    assert len(sequences.beyond) <= PRODUCER_RANGES_MAX
    sequences.take(1, 2, 0, 1)
    assert sequences.covered == 3


def test_unknown_fields_survive_a_round_trip() -> None:
    event = usage("r1", "t")
    newer = event.SerializeToString() + b"\xf8\x7f\x2a"  # field 2047, from a later version of the contract
    value = u.RawUsageBatch(events=[newer]).SerializeToString()
    assert u.RawUsageBatch.FromString(value).events[0] == newer
    assert u.UsageBatch.FromString(value).events[0].SerializeToString().endswith(b"\xf8\x7f\x2a")


def test_the_raw_view_of_a_batch_has_exactly_its_events_bytes() -> None:
    events = [usage(f"r{n}", "t", attributes={"a": "b"}) for n in range(3)]
    raw = u.RawUsageBatch.FromString(batch(events, "p", 1, 3))
    assert [u.UsageEvent.FromString(value) for value in raw.events] == events
