"""What a period's usage would have cost under another price book: tenant by tenant, from the requests that there were.

Promise: both sides are computed, the one that was charged too, and what was charged must be what its own books say; if it is
not, the error says to run the audit. Volume tiers, packages and commitments count as after the period's close, on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

from billing.periods import Period, period_start_ms
from billing.v1.command_pb2 import PriceBook
from sinks.engine import Reader, decimal_to_pico
from sinks.errors import SinkError
from sinks.price_books import alone, price_books
from sinks.queries import CHARGED
from sinks.rated_usage import Offer, Payer, payers, rated_usage

__all__ = ["Difference", "RatingDiffers", "events_between", "month_of_payer", "simulate"]


class RatingDiffers(SinkError):
    """What was charged is not what the price books say."""


class Difference(NamedTuple):
    """One tenant's period under two sets of books."""

    payer: Payer
    period: Period
    events: int
    unrated_events_before: int
    unrated_events_after: int
    # As after the close.
    before_pico: int
    after_pico: int

    @property
    def difference_pico(self) -> int:
        return self.after_pico - self.before_pico


def month_of_payer(payer: Payer, month: int) -> Period:
    """The period of a month (counted from 1970-01), as the tenant's calendar has it."""
    return Period(period_start_ms(payer.calendar, month), period_start_ms(payer.calendar, month + 1))


def simulate(
    reader: Reader,
    book: PriceBook,
    month: int,
    tenant_id: str | None = None,
    on_progress: Callable[[int], None] = lambda events: None,
) -> Iterator[Difference]:
    """What a month would have cost under `book`, for each tenant that is billed in its currency."""
    offers = Offer(price_books(reader), as_charged=True), Offer(alone(book))
    for payer in payers(reader, tenant_id):
        if payer.currency == book.currency:
            yield _difference(reader, payer, month_of_payer(payer, month), offers, on_progress)


def _difference(
    reader: Reader, payer: Payer, period: Period, offers: tuple[Offer, Offer], on_progress: Callable[[int], None]
) -> Difference:
    before, after = rated_usage(reader, payer, offers, *period, on_progress)
    charged = sum(line.cost_pico for line in before.lines.values())
    stated = _charged(reader, payer, period)
    if (before.events, charged) != stated:
        raise RatingDiffers(
            f"tenant {payer.tenant_id}: {stated[0]} requests were charged {stated[1]} pico, and by the price books "
            f"{before.events} cost {charged}; run `taximeter audit`"
        )
    return Difference(
        payer,
        period,
        before.events,
        before.unrated_events,
        after.unrated_events,
        before.cost_pico,
        after.cost_pico,
    )


def _charged(reader: Reader, payer: Payer, period: Period) -> tuple[int, int]:
    """How many requests the tenant's events of a period are, free ones left out, and what they say that they cost."""
    [[events, cost]] = reader.query(
        f"SELECT countIf({CHARGED}), sum(cost) FROM usage_events FINAL "  # noqa: S608 - names of ours
        "WHERE tenant_id = {tenant:String} AND currency = {currency:String} "
        "AND ended >= fromUnixTimestamp64Milli({start:Int64}) AND ended < fromUnixTimestamp64Milli({end:Int64})",
        {"tenant": payer.tenant_id, "currency": payer.currency, "start": period.start_ms, "end": period.end_ms},
        timeout_s=120.0,
    ).rows
    return cast("int", events), decimal_to_pico(cost)  # type: ignore[arg-type]  # a sum of decimals


def events_between(reader: Reader, currency: str, start_ms: int, end_ms: int) -> int:
    """About how many events there are to rate: for a progress bar."""
    [[events]] = reader.query(
        "SELECT sum(events - refused_events) FROM usage_totals FINAL WHERE currency = {currency:String} "
        "AND minute >= toDateTime({start:Int64}, 'UTC') AND minute < toDateTime({end:Int64}, 'UTC')",
        {"currency": currency, "start": start_ms // 1_000, "end": end_ms // 1_000},
    ).rows
    return cast("int", events)
