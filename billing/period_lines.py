"""What tenants' periods came to, gathered while usage is charged: the lines that invoices are drawn from.

A line is summed from windows that were let go and from adjustments; with the windows that are still open it is the period's
cost, to the pico. It has the record that opened it in its name: an invoice takes the lines that there are, and what comes
later for the same period opens others.

Promise: memory is bounded whatever producers name. A tenant's period keeps LINES_MAX lines and LINE_NAMES_BYTES_MAX of names;
what comes under further names is summed in lines of project and model "(other)", with the same prices and amounts, and that of
test keys in such lines of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Self

from billing import line_parts
from billing.amounts import from_amount, to_amount
from billing.limits import LINE_NAMES_BYTES_MAX, LINE_PARTS_MAX, LINES_MAX
from billing.line_parts import Parts
from billing.periods import Period
from billing.v1.invoice_pb2 import PeriodLine, PeriodLineKey
from billing.v1.usage_pb2 import SERVICE_CLASS_TEST

__all__ = ["KEPT_MS", "OTHER_NAME", "Line", "LineKey", "PeriodLines", "line_key_of"]

# A period that has no invoice so long after its end is let go here; ClickHouse keeps its lines. What came after its invoice
# waits for the next one.
KEPT_MS = 400 * 86_400_000
OTHER_NAME = "(other)"


class LineKey(NamedTuple):
    """What is summed together."""

    tenant_id: str
    period: Period
    currency: str
    project_id: str
    model: str
    operation: int
    service_class: int
    # 0: unrated, or an adjustment that no book priced.
    price_version: int
    adjustment_id: str = ""

    @property
    def names_bytes(self) -> int:
        """What its names take in a record."""
        return sum([len(name.encode()) for name in (self.tenant_id, self.project_id, self.model, self.adjustment_id)])


class Line:
    """One line: counts, parts and their sum."""

    __slots__ = ("events", "key", "opened_generation", "opened_sequence", "parts", "refused_events", "unrated_events")

    def __init__(self, key: LineKey, opened_generation: bytes, opened_sequence: int) -> None:
        self.key = key
        self.opened_generation = opened_generation
        self.opened_sequence = opened_sequence
        self.events = 0
        self.refused_events = 0
        self.unrated_events = 0
        self.parts: Parts = {}

    @property
    def cost_pico(self) -> int:
        """The sum of the parts' amounts."""
        return sum(part.amount_pico for part in self.parts.values())

    def add_parts(self, parts: Parts) -> None:
        """Add parts of a window, a line or an adjustment."""
        for key, value in parts.items():
            line_parts.add(self.parts, key, value.units, value.amount_pico, LINE_PARTS_MAX)

    def to_key(self) -> PeriodLineKey:
        """The contract form of its name."""
        key = self.key
        return PeriodLineKey(
            tenant_id=key.tenant_id,
            period_start_ms=key.period.start_ms,
            period_end_ms=key.period.end_ms,
            currency=key.currency,
            project_id=key.project_id,
            model=key.model,
            operation=key.operation,
            service_class=key.service_class,
            price_version=key.price_version,
            adjustment_id=key.adjustment_id,
            opened_sequence=self.opened_sequence,
            opened_generation=self.opened_generation,
        )

    def to_line(self) -> PeriodLine:
        """The absolute state, as a record states it."""
        return PeriodLine(
            key=self.to_key(),
            events=self.events,
            refused_events=self.refused_events,
            unrated_events=self.unrated_events,
            parts=line_parts.to_line_parts(self.parts),
            cost=to_amount(self.cost_pico),
        )

    @classmethod
    def from_line(cls, stated: PeriodLine) -> Self:
        """The line that a record states."""
        line = cls(line_key_of(stated.key), stated.key.opened_generation, stated.key.opened_sequence)
        line.events = stated.events
        line.refused_events = stated.refused_events
        line.unrated_events = stated.unrated_events
        line.parts = line_parts.from_line_parts(stated.parts)
        assert from_amount(stated.cost) == line.cost_pico, stated.key
        return line


def line_key_of(stated: PeriodLineKey) -> LineKey:
    """The key that a contract names, without the record that opened it."""
    return LineKey(
        stated.tenant_id,
        Period(stated.period_start_ms, stated.period_end_ms),
        stated.currency,
        stated.project_id,
        stated.model,
        stated.operation,
        stated.service_class,
        stated.price_version,
        stated.adjustment_id,
    )


class _OnePeriod(dict[LineKey, Line]):
    """One tenant's lines of one period; of those of usage, their number and what their names take."""

    usage_lines = 0
    names_bytes = 0

    def put(self, line: Line) -> None:
        if line.key not in self and not line.key.adjustment_id:
            self.usage_lines += 1
            self.names_bytes += line.key.names_bytes
        self[line.key] = line

    def drop(self, key: LineKey) -> None:
        del self[key]
        if not key.adjustment_id:
            self.usage_lines -= 1
            self.names_bytes -= key.names_bytes

    def is_full(self, key: LineKey) -> bool:
        return self.usage_lines >= LINES_MAX or self.names_bytes + key.names_bytes > LINE_NAMES_BYTES_MAX


class PeriodLines:
    """The lines of one partition's tenants that no invoice has taken."""

    def __init__(self) -> None:
        # Tenants, then periods: an invoice takes one tenant's.
        self._lines: dict[str, dict[Period, _OnePeriod]] = {}
        self._touched: dict[LineKey, Line] = {}

    def _period(self, key: LineKey) -> _OnePeriod:
        return self._lines.setdefault(key.tenant_id, {}).setdefault(key.period, _OnePeriod())

    def line(self, key: LineKey, generation: bytes, sequence: int) -> Line:
        """The line of `key`, to be added to, opened by that record if there is none; it is among the touched ones then."""
        lines = self._period(key)
        found = lines.get(key)
        if found is None and not key.adjustment_id and lines.is_full(key):
            # What test keys used is on no invoice: it is told apart from what is paid for.
            service_class = SERVICE_CLASS_TEST if key.service_class == SERVICE_CLASS_TEST else 0
            key = key._replace(project_id=OTHER_NAME, model=OTHER_NAME, operation=0, service_class=service_class)
            found = lines.get(key)
        if found is None:
            found = Line(key, generation, sequence)
            lines.put(found)
        self._touched[key] = found
        return found

    def take_touched(self) -> list[PeriodLine]:
        """The lines that were added to since the last call, as a record states them, in a stated order."""
        touched = [self._touched[key].to_line() for key in sorted(self._touched)]
        self._touched.clear()
        return touched

    def set(self, stated: PeriodLine) -> None:
        """Take what a record states."""
        line = Line.from_line(stated)
        self._period(line.key).put(line)

    def remove(self, keys: Iterable[LineKey]) -> None:
        """Let go of what an invoice took."""
        for key in keys:
            periods = self._lines[key.tenant_id]
            periods[key.period].drop(key)
            if not periods[key.period]:
                del periods[key.period]
            if not periods:
                del self._lines[key.tenant_id]

    def of(self, tenant_id: str) -> list[Line]:
        """A tenant's lines, by period and name."""
        periods = self._lines.get(tenant_id, {})
        return [periods[period][key] for period in sorted(periods) for key in sorted(periods[period])]

    def __iter__(self) -> Iterator[Line]:
        """Every line, in a stated order."""
        return (line for tenant_id in sorted(self._lines) for line in self.of(tenant_id))

    def forget(self, before_ms: int, invoiced_through_ms: Callable[[str], int]) -> None:
        """Let go of usage of periods that ended before then without an invoice; the function says up to when a tenant has any.

        Adjustments, and what came late for an invoiced period, wait for an invoice, however old their period is.
        """
        self.remove(
            [
                line.key
                for line in list(self)
                if line.key.period.end_ms < before_ms
                and not line.key.adjustment_id
                and line.key.period.end_ms > invoiced_through_ms(line.key.tenant_id)
            ]
        )
