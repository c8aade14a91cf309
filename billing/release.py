"""Lets windows go: what each came to is summed in the lines of its tenant's period, which the record states.

A window's usage is of the period in which its minute lies, in the tenant's calendar. The hot path knows nothing of this.
"""

from __future__ import annotations

from collections.abc import Iterable

from billing import line_parts
from billing.limits import (
    BUSY_RECORD_WINDOWS,
    LINE_PART_BYTES,
    LINES_BYTES_BESIDE_USAGE_MAX,
    LINES_BYTES_MAX,
    WINDOW_PARTS_HARD_MAX,
)
from billing.line_parts import Parts
from billing.period_lines import Line, LineKey, PeriodLines
from billing.periods import period_at
from billing.rating import flat_parts
from billing.state import LedgerState
from billing.v1.ledger_pb2 import LedgerRecord
from billing.windows import MINUTE_MS, Key, Window, window_key


def release_due(state: LedgerState, record: LedgerRecord) -> None:
    """Let go of the windows that are due when `record` is written, as many as it has room for; more wait for the next."""
    if record.invoiced:
        # An invoice has what room there is.
        return
    room = LINES_BYTES_MAX if len(record.totals) <= BUSY_RECORD_WINDOWS else LINES_BYTES_BESIDE_USAGE_MAX
    gone: list[Key] = []
    sizes: dict[LineKey, int] = {}
    for key in state.due_windows(record.log_time_ms):
        if room < 0:
            break
        line = release(state, state.windows[key], record)
        size = line.key.names_bytes + LINE_PART_BYTES * (len(line.parts) + 1)
        room -= size - sizes.get(line.key, 0)
        sizes[line.key] = size
        gone.append(key)
    state.remove_windows(gone)


def release(state: LedgerState, window: Window, record: LedgerRecord) -> Line:
    """State that `window` is let go and sum it; the caller removes it. Returns the line that it went to."""
    record.released.append(window_key(window.key, window.opened_sequence))
    return fold(state, state.lines, window, record.generation, record.sequence)


def fold(state: LedgerState, lines: PeriodLines, window: Window, generation: bytes, sequence: int) -> Line:
    """Add what `window` came to to its line in `lines`."""
    line = lines.line(line_key(state, window), generation, sequence)
    line.events += window.events
    line.refused_events += window.refused_events
    line.unrated_events += window.unrated_events
    line.add_parts(window_parts(state, window))
    return line


def line_key(state: LedgerState, window: Window) -> LineKey:
    """The line that `window` belongs to."""
    key = window.key
    return LineKey(
        key.tenant_id,
        period_at(state.accounts[key.tenant_id].calendar, key.minute * MINUTE_MS),
        window.currency,
        key.project_id,
        key.model,
        key.operation,
        key.service_class,
        key.price_version,
    )


def window_parts(state: LedgerState, window: Window) -> Parts:
    """What a window's cost is made of: kept where its price has terms, else its quantities at the flat prices."""
    key = window.key
    rate = state.books.rate_of_version(
        window.currency, key.price_version, key.model, key.operation, key.service_class, key.tenant_id
    )
    if rate is None or rate.terms is not None:
        return window.parts
    parts: Parts = {}
    line_parts.add_rated(parts, flat_parts(window.tokens, window.units, rate), WINDOW_PARTS_HARD_MAX)
    return parts


def folded(state: LedgerState, generation: bytes, keys: Iterable[Key]) -> PeriodLines:
    """The lines of `state` and what the windows `keys` came to, as a founding record of `generation` carries them on."""
    lines = PeriodLines()
    for line in state.lines:
        lines.set(line.to_line())
    for key in sorted(keys):
        fold(state, lines, state.windows[key], generation, 0)
    return lines
