"""A ledger topic in memory: partitions of `tests.billing.ledgers`, as the port that readers take."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from billing.founding import LedgerSettings
from tests.billing.ledgers import Ledger, batch, tenants_in, usage

TOPIC = "usage.ledger"
PARTITIONS = 2
SETTINGS = LedgerSettings(partitions=PARTITIONS, dedupe_key=b"k" * 32)


class LedgerPort:
    """Those that are given, or two that have seen prices, a tenant each and some usage."""

    def __init__(self, ledgers: Sequence[Ledger] = ()) -> None:
        self.ledgers = ledgers or [Ledger(number, SETTINGS) for number in range(PARTITIONS)]
        self.first = 0
        # An offset that no reader gets.
        self.hole = -1
        if ledgers:
            return
        for number, ledger in enumerate(self.ledgers):
            ledger.price()
            ledger.tenant(self.tenant(number))
        self.more(3)

    def tenant(self, partition: int) -> str:
        return tenants_in(partition, partitions=PARTITIONS)[0]

    @property
    def stored(self) -> list[list[bytes]]:
        """What the topic holds."""
        return [ledger.stored for ledger in self.ledgers]

    def more(self, messages: int) -> None:
        """Usage in each partition."""
        for number, ledger in enumerate(self.ledgers):
            for _ in range(messages):
                # Behind founding, prices and tenant; a forged message leaves a number out.
                sequence = len(ledger.stored) - 2
                ledger.usage(batch([usage(f"{sequence}", self.tenant(number))], "p", sequence, sequence))

    def forge(self) -> None:
        """Somebody else writes to partition 0; the ledger goes on behind it."""
        self.ledgers[0].stored.append(self.ledgers[0].stored[-1][:-1] + b"x")
        self.more(1)

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        assert topic == TOPIC
        return self.first, len(self.ledgers[partition].stored)

    async def read(self, topic: str, partition: int, start: int, end: int) -> AsyncIterator[Sequence[tuple[int, bytes]]]:
        assert topic == TOPIC
        stored = self.ledgers[partition].stored
        messages = [(offset, stored[offset]) for offset in range(start, min(end, len(stored))) if offset != self.hole]
        for place in range(0, len(messages), 2):
            yield messages[place : place + 2]
