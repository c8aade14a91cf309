"""Answers that many callers wait for are made once.

Promise: of one key, one thread at a time makes a value, and the others have it too. While a value's mark is the mark that is
asked for, nothing is made. A value that is costly is made seldom: what took longer than `QUICK_S` is not made again for `REST`
times what it took beyond that, and the callers have the one that is there. So what everybody watches takes a bounded share of
the database.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Final, TypeVar

__all__ = ["QUICK_S", "REST", "Shared"]

REST: Final = 2.0
# What takes no longer is made whenever it is another: a pause behind it would show in how late everybody sees what is new.
QUICK_S: Final = 0.4
_VALUES_MAX: Final = 2_000

T = TypeVar("T")


class _Value:
    __slots__ = ("cost_s", "made_s", "making", "mark", "users", "value")

    def __init__(self) -> None:
        self.making = threading.Lock()
        self.mark: Hashable = None
        self.value: Any = None
        self.made_s: float | None = None
        self.cost_s = 0.0
        # Calls that are at it.
        self.users = 0


class Shared:
    """For threads. What was asked for longest ago is forgotten first, and nothing while somebody makes it or waits for it."""

    def __init__(self, values_max: int = _VALUES_MAX, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._values: OrderedDict[Hashable, _Value] = OrderedDict()
        self._values_max = values_max
        self._guard = threading.Lock()
        self._monotonic_s = monotonic_s

    def peek(self, key: Hashable) -> Any:
        """The value that is there; None where none is."""
        with self._guard:
            known = self._values.get(key)
        return None if known is None else known.value

    def get(self, key: Hashable, mark: Hashable, make: Callable[[], T], *, rest_s: float = 0.0, wait_s: float = 30.0) -> T:
        """The value of `key` as of `mark`, or an older one that is not to be made again yet, for at least `rest_s`.

        Raises what `make` raises, and TimeoutError where another thread's first value does not come within `wait_s`.
        """
        with self._guard:
            known = self._values.setdefault(key, _Value())
            self._values.move_to_end(key)
            known.users += 1
        try:
            return self._get(known, mark, make, rest_s, wait_s)
        finally:
            with self._guard:
                known.users -= 1
                while len(self._values) > self._values_max and (oldest := self._oldest_idle()) is not None:
                    del self._values[oldest]

    def _oldest_idle(self) -> Hashable:
        return next((key for key, value in self._values.items() if not value.users), None)

    def _get(self, known: _Value, mark: Hashable, make: Callable[[], T], rest_s: float, wait_s: float) -> T:
        if self._serves(known, mark, rest_s):
            return known.value  # type: ignore[no-any-return]
        # Who has an older value does not wait for a newer one: it comes with the next question.
        if not known.making.acquire(timeout=0.001 if known.made_s is not None else max(wait_s, 0.001)):
            if known.made_s is None:
                raise TimeoutError("another call's question is still being answered")
            return known.value  # type: ignore[no-any-return]
        try:
            if not self._serves(known, mark, rest_s):
                began_s = self._monotonic_s()
                value = make()
                known.value, known.mark, known.made_s = value, mark, self._monotonic_s()
                known.cost_s = known.made_s - began_s
            return known.value  # type: ignore[no-any-return]
        finally:
            known.making.release()

    def _serves(self, known: _Value, mark: Hashable, rest_s: float) -> bool:
        if known.made_s is None:
            return False
        return known.mark == mark or self._monotonic_s() - known.made_s < max(rest_s, (known.cost_s - QUICK_S) * REST)
