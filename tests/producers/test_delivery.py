"""What moves a partition's delivery on, and what moves it back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from producers.delivery import Delivery


def test_only_the_ledgers_word_moves_coverage() -> None:
    delivery = Delivery.begin(0, freed=10)
    delivery.on_sent(20, now=1.0)
    assert delivery.on_acknowledged(20, delivery.epoch, 5, now=1.0)
    assert (delivery.covered, delivery.acknowledged, delivery.sent) == (10, 20, 20)
    assert delivery.on_progress(15, b"g", highest=20, freed=10, now=2.0)
    assert delivery.covered == 15
    assert delivery.on_progress(12, b"g", highest=20, freed=10, now=3.0), "an old word of the same ledger"
    assert delivery.covered == 15


def test_more_is_gathered_while_the_ledger_is_at_work() -> None:
    delivery = Delivery.begin(0, freed=0)
    assert delivery.linger_s(20) == 0.02
    delivery.on_sent(20, now=1.0)
    delivery.on_acknowledged(20, delivery.epoch, 5, now=1.0)
    assert delivery.linger_s(20) == 0.1, "Kafka has it, the ledger has not"
    delivery.on_progress(20, b"g", highest=20, freed=0, now=2.0)
    assert delivery.linger_s(20) == 0.02


def test_an_offset_that_goes_back_is_another_log() -> None:
    delivery = Delivery.begin(0, freed=0)
    assert delivery.on_acknowledged(0, 0, 7, now=1.0)
    assert delivery.on_acknowledged(0, 0, 8, now=1.0)
    assert delivery.on_acknowledged(0, 0, -1, now=1.0), "not told is not back"
    assert not delivery.on_acknowledged(0, 0, 0, now=1.0)
    assert delivery.on_acknowledged(0, 0, 1, now=1.0)


def test_what_was_in_flight_before_going_back_acknowledges_nothing() -> None:
    delivery = Delivery.begin(0, freed=0)
    delivery.on_sent(30, now=1.0)
    epoch = delivery.epoch
    assert delivery.go_back(9)
    delivery.on_acknowledged(30, epoch, 3, now=1.0)
    assert delivery.acknowledged == 0
    assert not delivery.go_back(9), "it is there already"


def test_the_bound_doubles_until_the_ledger_moves() -> None:
    delivery = Delivery.begin(0, freed=0)
    now, bounds = 0.0, []
    for _ in range(8):
        delivery.on_sent(5, now)
        delivery.on_acknowledged(5, delivery.epoch, -1, now)
        waited = 0.0
        while not delivery.is_overdue(1.0, now + waited):
            waited += 0.5
        bounds.append(waited)
        now += waited
        delivery.on_overdue()
        delivery.go_back(delivery.covered)
    assert bounds == [1, 2, 4, 8, 16, 32, 32, 32]
    delivery.on_sent(5, now)
    delivery.on_acknowledged(5, delivery.epoch, -1, now)
    delivery.on_progress(3, b"g", highest=5, freed=0, now=now)
    assert delivery.is_overdue(1.0, now + 1.0)


def test_nothing_is_overdue_that_kafka_has_not_acknowledged() -> None:
    delivery = Delivery.begin(0, freed=0)
    delivery.on_sent(5, now=0.0)
    assert not delivery.is_overdue(1.0, now=1_000.0)


def test_another_ledger_may_know_less() -> None:
    delivery = Delivery.begin(0, freed=0)
    delivery.on_sent(50, now=1.0)
    delivery.on_acknowledged(50, delivery.epoch, 1, now=1.0)
    assert delivery.on_progress(40, b"one", highest=50, freed=0, now=2.0)
    assert not delivery.on_progress(10, b"two", highest=50, freed=25, now=3.0)
    assert delivery.covered == 25, "what is freed cannot go out again"
    assert delivery.go_back(delivery.covered)
    assert (delivery.sent, delivery.acknowledged) == (25, 25)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.integers(1, 20)),
            st.tuples(st.just("acknowledge"), st.integers(0, 3)),
            st.tuples(st.just("progress"), st.integers(0, 300), st.sampled_from([b"a", b"b"])),
            st.tuples(st.just("back"), st.integers(0, 300)),
            st.tuples(st.just("free")),
        )
    )
)
def test_the_order_of_the_marks_holds_whatever_happens(actions: list[tuple[object, ...]]) -> None:
    highest, freed = 200, 5
    delivery = Delivery.begin(0, freed)
    in_flight: list[tuple[int, int]] = []
    for now, action in enumerate(actions):
        match action:
            case ("send", int(count)):
                last = min(highest, delivery.sent + count)
                if last > delivery.sent:
                    delivery.on_sent(last, float(now))
                    in_flight.append((last, delivery.epoch))
            case ("acknowledge", int(index)) if index < len(in_flight):
                # Kafka acknowledges in the order of sending.
                for last, epoch in in_flight[: index + 1]:
                    delivery.on_acknowledged(last, epoch, -1, float(now))
                del in_flight[: index + 1]
            case ("progress", int(covered), bytes(generation)):
                if not delivery.on_progress(min(covered, highest), generation, highest, freed, float(now)):
                    delivery.go_back(delivery.covered)
            case ("back", int(sequence)):
                delivery.go_back(max(sequence, delivery.covered))
            case ("free",):
                freed = max(freed, delivery.covered)
                delivery.on_freed(freed)
        assert freed <= delivery.sent
        assert delivery.covered <= delivery.acknowledged <= delivery.sent <= highest
        assert delivery.furthest <= highest
