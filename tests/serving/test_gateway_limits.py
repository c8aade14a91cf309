"""Limits: against a naive log of what passed, at any times; and through a gateway, with the status and the time to wait."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.limits import Breach, LimitsView, RateLimits, RequestSlot, Scope

STEP = st.tuples(st.integers(0, 200), st.integers(0, 60), st.integers(0, 60))


def scope(**limits: int) -> Scope:
    return Scope("tenant", "acme", LimitsView(**limits))


@given(st.lists(STEP, max_size=40), st.integers(1, 5), st.integers(1, 100))
def test_in_no_minute_does_more_pass_than_the_limits(steps: list[tuple[int, int, int]], requests: int, tokens: int) -> None:
    limits = RateLimits()
    scopes = [scope(requests_per_minute=requests, tokens_per_minute=tokens)]
    now_s = 1_000.0
    began: list[int] = []
    used: list[tuple[int, int]] = []
    for quarter_s, asked, took in steps:
        now_s += quarter_s / 4
        second = math.floor(now_s)
        slot = limits.admit(scopes, now_s)
        recent = [at for at in began if at > second - 60]
        assert isinstance(slot, Breach) == (len(recent) >= requests)
        if isinstance(slot, Breach):
            # Exactly when the oldest has left the window.
            assert slot.retry_after_s == recent[len(recent) - requests] + 60 - second
            continue
        began.append(second)
        passed = sum(amount for at, amount in used if at > second - 60)
        breach = slot.reserve(asked, now_s)
        assert (breach is not None) == (passed + min(asked, tokens) > tokens)
        if breach is not None:
            later = second + breach.retry_after_s
            assert sum(amount for at, amount in used if at > later - 60) + min(asked, tokens) <= tokens
            slot.end(0, now_s)
            continue
        slot.end(took, now_s)
        used.append((second, took))


@pytest.mark.parametrize("limited", ["requests_per_minute", "tokens_per_minute", "concurrent_requests_max"])
def test_what_is_kept_of_a_scope_does_not_grow_with_time(limited: str) -> None:
    limits = RateLimits()
    scopes = [scope(**{limited: 1_000})]

    def kept_bytes(seconds: range) -> int:
        for second in seconds:
            slot = limits.admit(scopes, float(second))
            assert isinstance(slot, RequestSlot)
            assert slot.reserve(10, float(second)) is None
            slot.end(12, float(second))
        return len(pickle.dumps(limits))

    # The numbers themselves get longer.
    assert kept_bytes(range(1_000, 1_100)) * 2 > kept_bytes(range(1_100, 4_000))


def test_what_runs_is_counted_until_it_ends() -> None:
    limits = RateLimits()
    scopes = [scope(concurrent_requests_max=2)]
    first, second = (limits.admit(scopes, 0.0) for _ in range(2))
    assert limits.admit(scopes, 0.0) == Breach("concurrent requests", "tenant acme", 2, 1)
    assert isinstance(first, RequestSlot)
    first.end(0, 0.0)
    first.end(0, 0.0)
    assert isinstance(limits.admit(scopes, 0.0), RequestSlot)
    assert isinstance(limits.admit(scopes, 0.0), Breach)
    assert isinstance(second, RequestSlot)


def test_a_request_that_one_scope_refuses_counts_in_none() -> None:
    limits = RateLimits()
    tenant, key = scope(requests_per_minute=5), Scope("key", "k", LimitsView(requests_per_minute=1))
    assert isinstance(limits.admit([tenant, key], 0.0), RequestSlot)
    for _ in range(9):
        assert isinstance(limits.admit([tenant, key], 0.0), Breach)
    assert all(isinstance(limits.admit([tenant], 0.0), RequestSlot) for _ in range(4))
    assert isinstance(limits.admit([tenant], 0.0), Breach)


def test_gateways_share_a_limit() -> None:
    limits = RateLimits(replicas=2)
    assert [isinstance(limits.admit([scope(requests_per_minute=5)], 0.0), Breach) for _ in range(4)] == [False] * 3 + [True]
