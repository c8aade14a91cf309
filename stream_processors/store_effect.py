"""What records leave behind in a local store, and what time lets go of there.

Promise: of everything that records state in full the last statement alone is written, and what a day's first tick lets go of is
gone from the store and from what is about to be written: a restart knows what the state knows that never stopped.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rocksdict import WriteBatch

from billing import credit
from billing.key_places import HOUR_MS
from billing.leases import Asked
from billing.period_lines import KEPT_MS as LINES_KEPT_MS
from billing.quantities import KEPT_MS
from billing.state import CORRECTED_KEPT_MS
from billing.v1.account_pb2 import Account
from billing.v1.invoice_pb2 import PeriodLine
from billing.v1.ledger_pb2 import CorrectedEvent, CreditState, Founding, KeyPlaces, PeriodQuantities, WindowTotal
from stream_processors.store_names import Stated, account_name

__all__ = ["ASKED", "TOUCHED", "Effect"]

# Before a window, in its value, the log time that touched it; of a command when it was issued.
TOUCHED = struct.Struct("<q")
# Of a holder's last request for a lease: its epoch, its number, and the log time.
ASKED = struct.Struct("<QQq")

# What a store has under a prefix: names and values.
Stored = Callable[[bytes], Iterator[tuple[bytes, bytes]]]


@dataclass(slots=True)
class Effect:
    """What some records leave behind: of everything that they state in full, the last statement only."""

    # By name; None: let go. With the log time that touched it.
    windows: dict[bytes, tuple[int, WindowTotal] | None] = field(default_factory=dict)
    states: dict[bytes, Stated | None] = field(default_factory=dict)
    commands: dict[bytes, int | None] = field(default_factory=dict)
    asked: dict[bytes, Asked | None] = field(default_factory=dict)
    values: dict[bytes, bytes] = field(default_factory=dict)
    remembered: list[tuple[int, list[tuple[int, bytes]]]] = field(default_factory=list)

    def write(self, batch: WriteBatch) -> None:
        put, delete = batch.put, batch.delete
        for name, window in self.windows.items():
            if window is None:
                delete(name)
            else:
                put(name, TOUCHED.pack(window[0]) + window[1].SerializeToString())
        for name, state in self.states.items():
            if state is None:
                delete(name)
            else:
                put(name, state.SerializeToString())
        for name, issued_ms in self.commands.items():
            if issued_ms is None:
                delete(name)
            else:
                put(name, TOUCHED.pack(issued_ms))
        for name, asked in self.asked.items():
            if asked is None:
                delete(name)
            else:
                put(name, ASKED.pack(*asked))
        for name, value in self.values.items():
            put(name, value)

    def forget(self, stored: Stored, log_time_ms: int, settings: Founding) -> None:
        """Let go of what is too old at `log_time_ms`, in the store (`stored` reads it) and of what is not written yet."""
        before_ms = log_time_ms - settings.dedupe_horizon_ms
        self._forget_commands(stored, before_ms)
        self._forget_asked(stored, before_ms - settings.future_reject_ms)
        self._forget_grants(stored, log_time_ms)
        self._forget_periods(stored, log_time_ms)
        self._forget_corrected(stored, log_time_ms)
        self._forget_places(stored, log_time_ms)

    def _forget_commands(self, stored: Stored, before_ms: int) -> None:
        known = {name: TOUCHED.unpack(value)[0] for name, value in stored(b"c")} | self.commands
        for name, issued_ms in known.items():
            if issued_ms is not None and issued_ms < before_ms:
                self.commands[name] = None

    def _forget_asked(self, stored: Stored, before_ms: int) -> None:
        known = {name: Asked._make(ASKED.unpack(value)) for name, value in stored(b"L")} | self.asked
        for name, asked in known.items():
            if asked is not None and asked.log_time_ms < before_ms:
                self.asked[name] = None

    def _forget_periods(self, stored: Stored, log_time_ms: int) -> None:
        for name, value in stored(b"q"):
            if PeriodQuantities.FromString(value).period_end_ms < log_time_ms - KEPT_MS:
                self.states[name] = None
        lines = {name: PeriodLine.FromString(value) for name, value in stored(b"i")}
        lines |= {name: state for name, state in self.states.items() if isinstance(state, PeriodLine)}
        for name, line in lines.items():
            end_ms = line.key.period_end_ms
            if end_ms >= log_time_ms - LINES_KEPT_MS or line.key.adjustment_id:
                continue
            # What came late for an invoiced period waits for the next invoice.
            if end_ms > self._invoiced_through_ms(stored, line.key.tenant_id):
                self.states[name] = None
        for name, state in self.states.items():
            if isinstance(state, PeriodQuantities) and state.period_end_ms < log_time_ms - KEPT_MS:
                self.states[name] = None

    def _invoiced_through_ms(self, stored: Stored, tenant_id: str) -> int:
        name = account_name(tenant_id)
        account = self.states.get(name)
        if isinstance(account, Account):
            return account.invoiced_through_ms
        # The first under a name is the one of just that name.
        value = next((value for found, value in stored(name) if found == name), b"")
        return Account.FromString(value).invoiced_through_ms

    def _forget_grants(self, stored: Stored, log_time_ms: int) -> None:
        kept = {name: CreditState.FromString(value) for name, value in stored(b"g")}
        changed = {name: state for name, state in self.states.items() if isinstance(state, CreditState) and state.grants}
        for name, state in (kept | changed).items():
            if 0 < state.grants[0].ended_ms < log_time_ms - credit.KEPT_MS:
                self.states[name] = None

    def _forget_corrected(self, stored: Stored, log_time_ms: int) -> None:
        known = {name: CorrectedEvent.FromString(value) for name, value in stored(b"x")}
        known |= {name: state for name, state in self.states.items() if isinstance(state, CorrectedEvent)}
        for name, entry in known.items():
            if entry.corrected_ms < log_time_ms - CORRECTED_KEPT_MS:
                self.states[name] = None

    def _forget_places(self, stored: Stored, log_time_ms: int) -> None:
        known = {name: KeyPlaces.FromString(value) for name, value in stored(b"y")}
        known |= {name: state for name, state in self.states.items() if isinstance(state, KeyPlaces)}
        for name, places in known.items():
            if places.hour < log_time_ms // HOUR_MS - 1:
                self.states[name] = None
