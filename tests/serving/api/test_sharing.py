"""What many ask for is made once, in a bounded share of the time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from serving.api.sharing import QUICK_S, REST, Shared


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def costly(clock: Clock, value: object, cost_s: float) -> Callable[[], object]:
    def make() -> object:
        clock.now_s += cost_s
        return value

    return make


def nothing() -> object:
    raise AssertionError("nothing is to be made")


def test_a_value_serves_until_its_mark_is_another(clock: Clock) -> None:
    shared = Shared(monotonic_s=clock)
    assert shared.peek("a") is None
    assert shared.get("a", 1, lambda: "one") == "one"
    assert shared.get("a", 1, nothing) == "one"
    assert shared.get("a", 2, lambda: "two") == "two"
    assert shared.get("b", 2, lambda: "other") == "other"
    assert (shared.peek("a"), shared.peek("b")) == ("two", "other")


def test_what_is_costly_is_made_seldom(clock: Clock) -> None:
    shared = Shared(monotonic_s=clock)
    shared.get("a", 1, costly(clock, "one", QUICK_S + 0.5))
    clock.now_s += 0.5 * REST - 0.01
    assert shared.get("a", 2, nothing) == "one"
    clock.now_s += 0.02
    assert shared.get("a", 2, costly(clock, "two", 0.0)) == "two"
    assert shared.get("a", 3, nothing, rest_s=5) == "two"
    clock.now_s += 5
    assert shared.get("a", 3, lambda: "three", rest_s=5) == "three"


def test_what_is_quick_is_made_whenever_it_is_another(clock: Clock) -> None:
    shared = Shared(monotonic_s=clock)
    for mark in range(3):
        assert shared.get("a", mark, costly(clock, mark, QUICK_S - 0.01)) == mark


def test_who_comes_meanwhile_waits_for_the_first_and_has_the_older_one_later() -> None:
    shared, going, release = Shared(), threading.Event(), threading.Event()

    def slow(value: str) -> Callable[[], str]:
        def make() -> str:
            going.set()
            assert release.wait(60)
            return value

        return make

    with ThreadPoolExecutor() as pool:
        first: Future[object] = pool.submit(shared.get, "a", 1, slow("one"))
        assert going.wait(60)
        with pytest.raises(TimeoutError, match="another call"):
            shared.get("a", 1, nothing, wait_s=0.01)
        others = [pool.submit(shared.get, "a", 1, nothing) for _ in range(3)]
        release.set()
        assert [future.result(60) for future in (first, *others)] == ["one"] * 4
        going.clear()
        release.clear()
        # The first one took as long as the test let it.
        shared._values["a"].cost_s = 0.0
        second = pool.submit(shared.get, "a", 2, slow("two"))
        assert going.wait(60)
        assert shared.get("a", 2, nothing) == "one"
        release.set()
        assert second.result(60) == "two"


def test_what_is_being_made_is_not_forgotten_however_much_else_is_asked_for() -> None:
    """Another call would make it beside the first, and what the first made would be nobody's."""
    shared, going, release = Shared(values_max=1), threading.Event(), threading.Event()

    def slow() -> str:
        going.set()
        assert release.wait(60)
        return "one"

    with ThreadPoolExecutor() as pool:
        first: Future[object] = pool.submit(shared.get, "a", 1, slow)
        assert going.wait(60)
        assert [shared.get(key, 1, lambda: "other") for key in "bcd"] == ["other"] * 3
        second = pool.submit(shared.get, "a", 1, nothing)
        release.set()
        assert [first.result(60), second.result(60)] == ["one", "one"]
    assert shared.peek("a") == "one"
    shared.get("b", 1, lambda: "other")
    assert (shared.peek("a"), len(shared._values)) == (None, 1)


def test_what_fails_is_asked_again_and_keeps_nothing(clock: Clock) -> None:
    shared = Shared(values_max=2, monotonic_s=clock)
    with pytest.raises(AssertionError):
        shared.get("a", 1, nothing)
    assert shared.get("a", 1, lambda: "one") == "one"
    # The one that was asked for longest ago goes.
    shared.get("b", 1, lambda: "two")
    shared.get("a", 1, nothing)
    shared.get("c", 1, lambda: "three")
    assert (shared.peek("a"), shared.peek("b"), shared.peek("c")) == ("one", None, "three")
