"""Credit as one would keep it on paper: every unit of spend is a coin that knows which grant paid for it.

It shares nothing with `billing.credit` but the meaning: amounts are small whole numbers, paid at once and one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["CoinGrant", "Coins"]


@dataclass
class CoinGrant:
    name: str
    coins: int
    # Priority, not promotional, expiry, age.
    order: tuple[int, bool, float, int]
    expires_ms: int = 0
    used: int = 0
    expired: int = 0

    @property
    def left(self) -> int:
        return self.coins - self.used - self.expired


@dataclass
class Coins:
    """One tenant: its grants, the coins spent that no invoice has ("": unpaid), and what is owed or given back beside."""

    grants: dict[str, CoinGrant] = field(default_factory=dict)
    spent: list[str] = field(default_factory=list)
    due: int = 0
    # Given back after it was invoiced.
    returned: int = 0

    @property
    def owed(self) -> int:
        return self.due + self.spent.count("") - self.returned

    @property
    def left(self) -> int:
        return sum(grant.left for grant in self.grants.values())

    def _pay(self, grants: Iterable[CoinGrant]) -> None:
        for grant in sorted(grants, key=lambda each: each.order):
            while grant.left and self.owed > 0:
                grant.used += 1
                if self.due:
                    self.due -= 1
                else:
                    self.spent[self.spent.index("")] = grant.name

    def _spend_coin(self) -> None:
        if self.returned:
            self.returned -= 1
        else:
            self.spent.append("")

    def spend(self, coins: int) -> None:
        for _ in range(coins):
            self._spend_coin()
            self._pay(self.grants.values())

    def take_back(self, coins: int, now_ms: int) -> None:
        for _ in range(coins):
            if self.returned or not self.spent:
                self.returned += 1
            elif name := self.spent.pop():
                grant = self.grants[name]
                grant.used -= 1
                grant.expired += 0 < grant.expires_ms <= now_ms

    def add(self, grant: CoinGrant) -> None:
        self.grants[grant.name] = grant
        self._pay([grant])

    def expire(self, now_ms: int) -> None:
        for grant in self.grants.values():
            if 0 < grant.expires_ms <= now_ms:
                grant.expired += grant.left

    def invoice(self, net: int, name: str, age: int) -> Counter[str]:
        """Which grants pay for `net` of the oldest coins."""
        paid = Counter[str]()
        for _ in range(net):
            coin = self.spent.pop(0) if self.spent else None
            if coin:
                paid[coin] += 1
            else:
                self.due += 1
                self.returned += coin is None
        if net < 0:
            for _ in range(-net):
                self._spend_coin()
            self.add(CoinGrant(name, -net, (0, True, float("inf"), age)))
        return paid
