"""How much of a tenant's, a key's or a model's traffic one gateway lets through: requests and tokens in any minute, and
requests at the same time. In memory, without a clock of its own, and every question costs the same however much has passed.

A minute is a moving window of seconds: in no span of 60 s does more pass than the limit. A request's tokens are reserved before
it is forwarded (its prompt's bound and the longest answer that it asks for, but never more than the whole limit, so that an
idle tenant is always served) and corrected when it is over. The library `limits` was looked at: it keeps an entry a token,
reads the wall clock itself, and cannot give back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from billing.v1.account_pb2 import Limits

__all__ = ["NO_LIMITS", "UNLIMITED", "Breach", "LimitsView", "RateLimits", "RequestSlot", "Scope", "limits_view"]

_WINDOW_S: Final = 60
# Before windows that have nothing in them are let go.
_WINDOWS_KEPT: Final = 4_096


@dataclass(frozen=True, slots=True)
class LimitsView:
    """Zero is no limit."""

    prompt_tokens_max: int = 0
    output_tokens_max: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent_requests_max: int = 0

    @property
    def is_rated(self) -> bool:
        """Whether there is anything to count."""
        return bool(self.requests_per_minute or self.tokens_per_minute or self.concurrent_requests_max)


NO_LIMITS: Final = LimitsView()


def limits_view(limits: Limits) -> LimitsView:
    """What the ledger says, as a value; where it says nothing, `NO_LIMITS` itself."""
    view = LimitsView(
        limits.prompt_tokens_max,
        limits.output_tokens_max,
        limits.requests_per_minute,
        limits.tokens_per_minute,
        limits.concurrent_requests_max,
    )
    return NO_LIMITS if view == NO_LIMITS else view


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose limits they are: of a key, a tenant, or a tenant's use of a model."""

    kind: str
    name: str
    limits: LimitsView


@dataclass(frozen=True, slots=True)
class Breach:
    """A limit that would be passed."""

    what: str
    """"requests per minute", "tokens per minute" or "concurrent requests"."""
    whose: str
    limit: int
    retry_after_s: int


class _Minute:
    """What has passed in the last 60 seconds, by second."""

    __slots__ = ("_seconds", "total")

    def __init__(self) -> None:
        self._seconds: deque[list[int]] = deque()
        self.total = 0

    def forget(self, now_s: int) -> None:
        """What is older than the window."""
        while self._seconds and self._seconds[0][0] <= now_s - _WINDOW_S:
            self.total -= self._seconds.popleft()[1]

    def add(self, now_s: int, amount: int) -> None:
        # Also where nobody asks what has passed: one scope may limit tokens and not requests.
        self.forget(now_s)
        if not self._seconds or self._seconds[-1][0] != now_s:
            self._seconds.append([now_s, 0])
        self._seconds[-1][1] += amount
        self.total += amount

    def give_back(self, second: int, amount: int) -> None:
        """Of what was added in that second; if it is over, so is what it held."""
        for entry in self._seconds:
            if entry[0] == second:
                entry[1] -= amount
                self.total -= amount
                return

    def wait_s(self, now_s: int, amount: int, limit: int) -> int:
        """How long until `amount` fits; 0: now."""
        excess = self.total + amount - limit
        if excess <= 0:
            return 0
        for second, held in self._seconds:
            excess -= held
            if excess <= 0:
                return second + _WINDOW_S - now_s
        return _WINDOW_S


class _Counters:
    """One scope's."""

    __slots__ = ("requests", "running", "tokens")

    def __init__(self) -> None:
        self.requests = _Minute()
        self.tokens = _Minute()
        self.running = 0

    def is_idle(self, now_s: int) -> bool:
        self.requests.forget(now_s)
        self.tokens.forget(now_s)
        return not (self.running or self.requests.total or self.tokens.total)


class RequestSlot:
    """One request's place in all of its scopes."""

    __slots__ = ("_counters", "_ended", "_reserved", "_second")

    def __init__(self, counters: Sequence[tuple[Scope, _Counters, int]]) -> None:
        self._counters = counters
        self._reserved: list[int] = []
        self._second = 0
        self._ended = False

    def reserve(self, tokens: int, now_s: float) -> Breach | None:
        """Take the tokens that it may use; nothing of them where one scope has not enough."""
        second = math.floor(now_s)
        limited = [(scope, counters, limit) for scope, counters, limit in self._counters if limit]
        for scope, counters, limit in limited:
            counters.tokens.forget(second)
            wait_s = counters.tokens.wait_s(second, min(tokens, limit), limit)
            if wait_s:
                return Breach("tokens per minute", f"{scope.kind} {scope.name}", limit, wait_s)
        self._second = second
        self._reserved = [min(tokens, limit) for _, _, limit in limited]
        for (_, counters, _), amount in zip(limited, self._reserved, strict=True):
            counters.tokens.add(second, amount)
        return None

    def end(self, tokens: int, now_s: float) -> None:
        """It is over, and used so many. Does nothing the second time."""
        if self._ended:
            return
        self._ended = True
        limited = [counters for _, counters, limit in self._counters if limit]
        for counters, reserved in zip(limited, self._reserved, strict=False):
            if tokens > reserved:
                counters.tokens.add(math.floor(now_s), tokens - reserved)
            else:
                counters.tokens.give_back(self._second, reserved - tokens)
        for _, counters, _ in self._counters:
            counters.running -= 1


# Of requests that no limit holds for.
UNLIMITED: Final = RequestSlot(())


class RateLimits:
    """All scopes of one gateway. Belongs to one event loop."""

    def __init__(self, replicas: int = 1) -> None:
        """`replicas`: so many gateways share each limit evenly."""
        self._replicas = replicas
        self._scopes: dict[tuple[str, str], _Counters] = {}

    def admit(self, scopes: Sequence[Scope], now_s: float) -> RequestSlot | Breach:
        """Count a request that begins; `end` the slot when it is over."""
        second = math.floor(now_s)
        found = []
        for scope in scopes:
            if not scope.limits.is_rated:
                continue
            counters = self._counters(scope, second)
            breach = self._breach(scope, counters, second)
            if breach is not None:
                return breach
            found.append((scope, counters, self._share(scope.limits.tokens_per_minute)))
        for _, counters, _ in found:
            counters.requests.add(second, 1)
            counters.running += 1
        return RequestSlot(found)

    def _share(self, limit: int) -> int:
        return -(-limit // self._replicas)

    def _counters(self, scope: Scope, now_s: int) -> _Counters:
        key = scope.kind, scope.name
        counters = self._scopes.get(key)
        if counters is None:
            if len(self._scopes) >= _WINDOWS_KEPT:
                self._scopes = {name: kept for name, kept in self._scopes.items() if not kept.is_idle(now_s)}
            counters = self._scopes[key] = _Counters()
        return counters

    def _breach(self, scope: Scope, counters: _Counters, now_s: int) -> Breach | None:
        whose = f"{scope.kind} {scope.name}"
        limit = self._share(scope.limits.concurrent_requests_max)
        if limit and counters.running >= limit:
            return Breach("concurrent requests", whose, limit, 1)
        limit = self._share(scope.limits.requests_per_minute)
        if limit:
            counters.requests.forget(now_s)
            if wait_s := counters.requests.wait_s(now_s, 1, limit):
                return Breach("requests per minute", whose, limit, wait_s)
        return None
