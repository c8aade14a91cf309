"""Price books in the database: what the writer puts there, and the same books read back, every term exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from operator import attrgetter
from typing import Any, NamedTuple, cast

from billing.amounts import from_amount, to_amount
from billing.price_checks import PRICE_FIELDS
from billing.prices import PriceBooks
from billing.v1.command_pb2 import (
    SCHEDULE_MODE_PACKAGE,
    ClassFactor,
    Commitment,
    ContextBand,
    Price,
    PriceBook,
    Schedule,
    ScheduleMode,
    Tier,
    UnitPrice,
)
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import Operation, ServiceClass
from sinks.engine import Reader, decimal_to_pico
from sinks.event_columns import OPERATIONS, SERVICE_CLASSES, EnumNames

__all__ = [
    "Unpriced",
    "alone",
    "books_of",
    "commitment_rows",
    "number_of_operation",
    "number_of_service_class",
    "price_books",
    "price_rows",
    "unpriced",
]

_MODES = EnumNames(ScheduleMode.items(), "SCHEDULE_MODE_")
_FLAT = attrgetter(*PRICE_FIELDS)
_FLAT_COLUMNS = tuple(f"{field.removesuffix('_pico')}_price" for field in PRICE_FIELDS)


def books_of(record: LedgerRecord) -> Sequence[PriceBook]:
    """The versions that a record puts into effect."""
    match record.WhichOneof("source"):
        case "founding":
            return record.founding.price_books
        case "command" if record.command.HasField("price_book"):
            return [record.command.price_book]
    return ()


def price_rows(stated: Sequence[tuple[PriceBook, int]]) -> Iterator[tuple[object, ...]]:
    """Rows of `price_books` for books and their rows' versions."""
    for book, version in stated:
        for line, price in enumerate(book.prices, start=1):
            units = sorted(price.unit_pico.items())
            tiers = [tier for schedule in price.schedules for tier in _tiers(schedule)]
            bands = [(band.above_tokens, unit.quantity, unit.unit_pico) for band in price.context_bands for unit in band.prices]
            yield (
                book.currency,
                book.version,
                price.model,
                OPERATIONS[price.operation],
                SERVICE_CLASSES[price.service_class],
                book.effective_ms,
                *_FLAT(price),
                [unit for unit, _ in units],
                [pico for _, pico in units],
                version,
                price.tenant_id,
                line,
                price.minimum_pico,
                *([tier[column] for tier in tiers] for column in range(6)),
                *([band[column] for band in bands] for column in range(3)),
                [SERVICE_CLASSES[entry.service_class] for entry in price.class_factors],
                [entry.factor_millionths for entry in price.class_factors],
            )


def _tiers(schedule: Schedule) -> Iterator[tuple[str, str, int, int, int, int]]:
    head = schedule.quantity, _MODES[schedule.mode], schedule.free_units
    if schedule.mode == SCHEDULE_MODE_PACKAGE:
        yield *head, 0, schedule.package_pico, schedule.package_units
    for tier in schedule.tiers:
        yield *head, tier.up_to_units, tier.unit_pico, 0


def commitment_rows(stated: Sequence[tuple[PriceBook, int]]) -> Iterator[tuple[object, ...]]:
    """Rows of `price_commitments`."""
    for book, version in stated:
        for entry in book.commitments:
            yield book.currency, book.version, entry.tenant_id, from_amount(entry.amount), version


def price_books(reader: Reader) -> PriceBooks:
    """Every version that took effect, as the ledger rates by."""
    lines = reader.query(
        f"SELECT currency, book_version, toUnixTimestamp64Milli(effective) AS effective_ms, model, operation, service_class, "  # noqa: S608 - names of ours
        f"{', '.join(_FLAT_COLUMNS)}, unit_names, unit_prices_pico, tenant_id, minimum_price, tier_quantities, tier_modes, "
        "tier_free_units, tier_up_to_units, tier_prices_pico, tier_package_units, context_above_tokens, context_quantities, "
        "context_prices_pico, factor_classes, factor_millionths FROM price_books FINAL "
        "ORDER BY currency, book_version, line, model, operation, service_class"
    ).dicts()
    books: dict[tuple[str, int], PriceBook] = {}
    for row in lines:
        currency, version, effective_ms = str(row["currency"]), _int(row["book_version"]), _int(row["effective_ms"])
        book = books.setdefault((currency, version), PriceBook(version=version, currency=currency, effective_ms=effective_ms))
        book.prices.append(_price(row))
    commitments = reader.query(
        "SELECT currency, book_version, tenant_id, amount FROM price_commitments FINAL "
        "ORDER BY currency, book_version, tenant_id"
    ).rows
    for entry in commitments:
        # The writer puts commitments before the book that they belong to: one alone is of a version on its way.
        if stated := books.get((str(entry[0]), _int(entry[1]))):
            stated.commitments.append(Commitment(tenant_id=str(entry[2]), amount=to_amount(_pico(entry[3]))))
    return PriceBooks(books.values())


def alone(book: PriceBook) -> PriceBooks:
    """`book` as if it were the only one and had always been in effect."""
    only = PriceBook()
    only.CopyFrom(book)
    only.version, only.effective_ms = 1, 0
    return PriceBooks([only])


class Unpriced(NamedTuple):
    """Usage that a book has no price for."""

    model: str
    operation: str
    service_class: str
    events: int
    tenant_ids: list[str]


def unpriced(reader: Reader, book: PriceBook, since_ms: int) -> list[Unpriced]:
    """What was used since then by tenants that are billed in the book's currency, and is not in the book."""
    books = alone(book)
    rows = reader.query(
        "SELECT model, operation, service_class, tenant_id, sum(events - refused_events) AS charged FROM usage_totals FINAL "
        "WHERE currency = {currency:String} AND minute >= toDateTime({since:Int64}, 'UTC') "
        "GROUP BY model, operation, service_class, tenant_id HAVING charged > 0 "
        "ORDER BY model, operation, service_class, tenant_id",
        {"currency": book.currency, "since": since_ms // 1_000},
    ).rows
    found: dict[tuple[str, str, str], Unpriced] = {}
    for row in rows:
        model, operation, service_class, tenant_id = map(str, row[:4])
        numbers = number_of_operation(operation), number_of_service_class(service_class)
        if books.rate(book.currency, 0, model, *numbers, tenant_id) is None:
            entry = found.get((model, operation, service_class)) or Unpriced(model, operation, service_class, 0, [])
            entry = entry._replace(events=entry.events + _int(row[4]), tenant_ids=[*entry.tenant_ids, tenant_id])
            found[model, operation, service_class] = entry
    return list(found.values())


def _price(row: dict[str, Any]) -> Price:
    price = Price(
        model=row["model"],
        tenant_id=row["tenant_id"],
        operation=number_of_operation(row["operation"]),
        service_class=number_of_service_class(row["service_class"]),
        unit_pico=dict(zip(row["unit_names"], row["unit_prices_pico"], strict=True)),
        minimum_pico=_pico(row["minimum_price"]),
        **{field: _pico(row[column]) for field, column in zip(PRICE_FIELDS, _FLAT_COLUMNS, strict=True)},  # type: ignore[arg-type]
    )
    tiers = ("quantities", "modes", "free_units", "up_to_units", "prices_pico", "package_units")
    for quantity, mode, free, up_to, pico, package in zip(*(row[f"tier_{name}"] for name in tiers), strict=True):
        if not price.schedules or price.schedules[-1].quantity != quantity:
            number = ScheduleMode.Value(f"SCHEDULE_MODE_{mode.upper()}")
            price.schedules.append(Schedule(quantity=quantity, mode=number, free_units=free))
        schedule = price.schedules[-1]
        if schedule.mode == SCHEDULE_MODE_PACKAGE:
            schedule.package_units, schedule.package_pico = package, pico
        else:
            schedule.tiers.append(Tier(up_to_units=up_to, unit_pico=pico))
    for above, quantity, pico in zip(
        row["context_above_tokens"], row["context_quantities"], row["context_prices_pico"], strict=True
    ):
        if not price.context_bands or price.context_bands[-1].above_tokens != above:
            price.context_bands.append(ContextBand(above_tokens=above))
        price.context_bands[-1].prices.append(UnitPrice(quantity=quantity, unit_pico=pico))
    price.class_factors.extend(
        ClassFactor(service_class=number_of_service_class(name), factor_millionths=millionths)
        for name, millionths in zip(row["factor_classes"], row["factor_millionths"], strict=True)
    )
    return price


def number_of_operation(name: str) -> int:
    """The enum's number for what a column says."""
    return _number(Operation.items(), "OPERATION_", name)


def number_of_service_class(name: str) -> int:
    """The enum's number for what a column says."""
    return _number(ServiceClass.items(), "SERVICE_CLASS_", name)


def _number(items: Sequence[tuple[str, int]], prefix: str, name: str) -> int:
    if name.startswith("unknown_"):
        return int(name.removeprefix("unknown_"))
    return dict(items)[f"{prefix}{name.upper()}"]


def _int(value: object) -> int:
    return cast("int", value)


def _pico(value: object) -> int:
    return decimal_to_pico(cast("Decimal", value))
