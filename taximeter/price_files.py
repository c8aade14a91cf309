"""A price book in a TOML or JSON file, validated whole.

Promise: `read_price_book` returns a book that the ledger takes, or raises `InputFileError` that names every problem,
each with its line, its field, its value and its mend. A price is written as people write it, in currency units per so many
units (`per`: "million" unless it says "thousand" or "one"), as a string; the unit price in pico is then a whole number, and
nothing is rounded.

    version = 1
    currency = "CNY"
    effective = "2026-01-01T00:00:00+08:00"   # or "always"
    per = "thousand"                          # for the whole book; a line may say otherwise

    [[prices]]
    model = "qwen*"                           # a name, or a prefix that ends in *
    operation = "chat"                        # left out: any; service_class likewise
    tenant = "acme"                           # that tenant alone; left out: everyone
    input = "0.02"                            # uncached input tokens
    cache_read = "0.002"
    units = { characters = "0.10" }           # by named unit
    minimum = "0.0001"                        # what one request costs at least
    class_factors = { batch = "0.5" }         # what a service class pays of all this

    [[prices.schedules]]                      # the price of a quantity over a period
    quantity = "output"
    mode = "graduated"                        # or "volume"
    free = 1_000_000
    tiers = [{ up_to = 10_000_000, price = "0.06" }, { price = "0.04" }]   # counted behind the free ones

    [[prices.schedules]]
    quantity = "requests"
    mode = "package"
    package = 1_000                           # so many at once
    package_price = "10.00"                   # for so much

    [[prices.context]]                        # other prices for requests with more context than this
    above = 200_000
    input = "0.04"

    [[commitments]]                           # what a tenant promised to spend in each period
    tenant = "acme"
    amount = "1000.00"
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from datetime import datetime
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from billing.amounts import PICO, AmountError, parse_decimal_to_pico, set_amount
from billing.price_checks import MILLION, PRICE_FIELDS, PRICE_PICO_MAX, book_problems
from billing.v1 import command_pb2, usage_pb2
from billing.v1.command_pb2 import ClassFactor, Commitment, ContextBand, Price, PriceBook, Schedule, Tier, UnitPrice
from billing.validation import TOKEN_FIELDS
from taximeter.errors import InputFileError
from taximeter.text_places import TextPlaces

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from taximeter import text_places

__all__ = ["CLASS_KEYS", "default_price_book", "read_price_book"]

_FILE_BYTES_MAX: Final = 5_000_000
# Units, and how many decimals a price for them may have: the rest is the pico's.
_PER: Final = {"million": (1_000_000, 6), "thousand": (1_000, 9), "one": (1, 12)}
# What a person writes for a class of tokens → its name in UsageEvent.
CLASS_KEYS: Final = {
    "input": "uncached_input_tokens",
    "output": "output_tokens",
    "cache_read": "cache_read_tokens",
    "cache_write": "cache_write_tokens",
    "reasoning": "reasoning_tokens",
    "image_input": "image_input_tokens",
    "audio_input": "audio_input_tokens",
    "audio_output": "audio_output_tokens",
}
_FIELD_OF: Final = dict(zip(TOKEN_FIELDS, PRICE_FIELDS, strict=True))
_BOOK_KEYS: Final = ("version", "currency", "effective", "per", "prices", "commitments")
_TERM_KEYS: Final = ("minimum", "class_factors", "schedules", "context")
_LINE_KEYS: Final = ("model", "operation", "service_class", "tenant", "per", "units", *CLASS_KEYS, *_TERM_KEYS)
_SCHEDULE_KEYS: Final = ("quantity", "mode", "free", "tiers", "package", "package_price")
# The contract's names in a problem that the domain found → the file's.
_FILE_NAMES: Final = {
    **{field: key for key, name in CLASS_KEYS.items() for field in (name, _FIELD_OF[name])},
    "effective_ms": "effective",
    "tenant_id": "tenant",
    "minimum_pico": "minimum",
    "unit_pico": "price",
    "free_units": "free",
    "up_to_units": "up_to",
    "package_units": "package",
    "package_pico": "package_price",
    "context_bands": "context",
    "above_tokens": "above",
}
# A path of names, each perhaps with an index (which may be a unit's own name), and what is wrong there.
_PROBLEM: Final = re.compile(r"([^:\[\]]+(?:\[[^\]]*\][^:\[\]]*)*): (.*)", re.DOTALL)
_SEGMENT: Final = re.compile(r"([^.\[\]]+)(?:\[([^\]]*)\])?")


def default_price_book() -> PriceBook:
    """The book that comes with the package: prices for the demonstration's models."""
    with resources.as_file(resources.files("taximeter") / "data" / "prices.toml") as path:
        return read_price_book(path)


def read_price_book(path: Path) -> PriceBook:
    """The book in the file."""
    text, values = _read(path)
    reading = _Reading()
    book = reading.book(values)
    problems = reading.problems or [_in_file_names(problem) for problem in book_problems(book)]
    if problems:
        places = TextPlaces(text, toml=path.suffix != ".json")
        raise InputFileError(f"price book {path}: " + "; ".join(_told(places, *problem) for problem in problems))
    return book


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise InputFileError(f"price book {path} has over {_FILE_BYTES_MAX} bytes: is it the right file?")
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise InputFileError(f"price book {path} cannot be read ({error.strerror}): correct the path") from None
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise InputFileError(f"price book {path} is not {kind} ({error}): correct that place") from None
    if not isinstance(values, dict):
        raise InputFileError(f"price book {path} is no table: write version, currency, effective and prices")
    return text, values


def _told(places: TextPlaces, where: text_places.Path, what: str) -> str:
    line = places.line(where)
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    # A key that JSON holds may not be one that can be printed.
    shown = f"{name.encode(errors='backslashreplace').decode()}: {what}" if name else what
    return f"line {line}: {shown}" if line else shown


def _in_file_names(problem: str) -> tuple[text_places.Path, str]:
    """A problem that the domain found, under the names that the file has."""
    match = _PROBLEM.fullmatch(problem)
    if match is None:
        return (), problem
    where: list[str | int] = []
    for name, index in _SEGMENT.findall(match[1]):
        if name == "prices" and where:
            # A band's prices have their quantities as keys in a file, no numbers.
            break
        if name == "unit_pico" and index:
            where += ["units", index]
        elif name == "class_factors":
            where.append(name)
        else:
            where.append(_FILE_NAMES.get(name, name))
            where += [int(index)] if index else []
    return tuple(where), match[2]


class _Reading:
    """One file's values on their way into a book, and every problem on the way."""

    def __init__(self) -> None:
        self.problems: list[tuple[text_places.Path, str]] = []

    def book(self, values: Mapping[str, Any]) -> PriceBook:
        book = PriceBook()
        self._refuse_unknown((), values, _BOOK_KEYS)
        book.version = self._whole(("version",), values.get("version"), 1, 2**32 - 1)
        book.currency = self._text(("currency",), values.get("currency", ""))
        book.effective_ms = self._effective_ms(values.get("effective"))
        per = self._per(("per",), values.get("per", "million"))
        for number, line in enumerate(self._tables(("prices",), values.get("prices", [])), start=1):
            book.prices.append(self._price(("prices", number), line, per))
        for number, line in enumerate(self._tables(("commitments",), values.get("commitments", [])), start=1):
            book.commitments.append(self._commitment(("commitments", number), line))
        return book

    def _problem(self, where: text_places.Path, what: str) -> None:
        self.problems.append((where, what))

    # -- the parts of a book ---------------------------------------------------------------------------------------------

    def _price(self, where: text_places.Path, values: Mapping[str, Any], per: str) -> Price:
        self._refuse_unknown(where, values, _LINE_KEYS)
        if "per" in values:
            per = self._per((*where, "per"), values["per"])
        price = Price(
            model=self._text((*where, "model"), values.get("model", "")),
            tenant_id=self._text((*where, "tenant"), values.get("tenant", "")),
            operation=self._enum((*where, "operation"), values.get("operation"), usage_pb2.Operation, "OPERATION_"),
            service_class=self._enum(
                (*where, "service_class"), values.get("service_class"), usage_pb2.ServiceClass, "SERVICE_CLASS_"
            ),
        )
        for entry in self._unit_prices(where, values, per, _LINE_KEYS):
            if entry.quantity in _FIELD_OF:
                setattr(price, _FIELD_OF[entry.quantity], entry.unit_pico)
            else:
                price.unit_pico[entry.quantity] = entry.unit_pico
        if "minimum" in values:
            price.minimum_pico = self._amount((*where, "minimum"), values["minimum"], PRICE_PICO_MAX)
        for number, line in enumerate(self._tables((*where, "schedules"), values.get("schedules", [])), start=1):
            price.schedules.append(self._schedule((*where, "schedules", number), line, per))
        for number, line in enumerate(self._tables((*where, "context"), values.get("context", [])), start=1):
            price.context_bands.append(self._band((*where, "context", number), line, per))
        factors = self._table((*where, "class_factors"), values.get("class_factors", {}), '{ batch = "0.5" }')
        for name, factor in factors.items():
            place = (*where, "class_factors", name)
            service_class = self._enum(place, name, usage_pb2.ServiceClass, "SERVICE_CLASS_")
            millionths = self._exact(place, factor, MILLION, "a factor such as 0.5, with at most six decimals")
            price.class_factors.append(ClassFactor(service_class=service_class, factor_millionths=millionths))
        return price

    def _unit_prices(
        self, where: text_places.Path, values: Mapping[str, Any], per: str, known: tuple[str, ...]
    ) -> list[UnitPrice]:
        """Prices of classes of tokens and of named units, as a line and a band of it state them."""
        found = [
            UnitPrice(quantity=name, unit_pico=self._unit_price((*where, key), values[key], per))
            for key, name in CLASS_KEYS.items()
            if key in values
        ]
        units = self._table((*where, "units"), values.get("units", {}), '{ characters = "1.00" }')
        for unit, text in units.items():
            place = (*where, "units", unit)
            if unit in known or unit in _FIELD_OF:
                self._problem(place, "is no name for a unit: a key of the line has it")
                continue
            found.append(UnitPrice(quantity=self._text(place, unit), unit_pico=self._unit_price(place, text, per)))
        return found

    def _schedule(self, where: text_places.Path, values: Mapping[str, Any], per: str) -> Schedule:
        self._refuse_unknown(where, values, _SCHEDULE_KEYS)
        quantity = self._text((*where, "quantity"), values.get("quantity", ""))
        schedule = Schedule(
            quantity=CLASS_KEYS.get(quantity, quantity),
            mode=self._enum((*where, "mode"), values.get("mode", ""), command_pb2.ScheduleMode, "SCHEDULE_MODE_"),  # type: ignore[arg-type]
            free_units=self._whole((*where, "free"), values.get("free", 0), 0, 2**64 - 1),
        )
        for number, tier in enumerate(self._tables((*where, "tiers"), values.get("tiers", [])), start=1):
            place = (*where, "tiers", number)
            self._refuse_unknown(place, tier, ("up_to", "price"))
            schedule.tiers.append(
                Tier(
                    up_to_units=self._whole((*place, "up_to"), tier["up_to"], 1, 2**64 - 1) if "up_to" in tier else 0,
                    unit_pico=self._unit_price((*place, "price"), tier.get("price"), per),
                )
            )
        if "package" in values:
            schedule.package_units = self._whole((*where, "package"), values["package"], 1, 2**64 - 1)
        if "package_price" in values:
            schedule.package_pico = self._amount((*where, "package_price"), values["package_price"], 2**64 - 1)
        return schedule

    def _band(self, where: text_places.Path, values: Mapping[str, Any], per: str) -> ContextBand:
        known = ("above", "units", *CLASS_KEYS)
        self._refuse_unknown(where, values, known)
        above = self._whole((*where, "above"), values.get("above"), 1, 2**64 - 1)
        return ContextBand(above_tokens=above, prices=self._unit_prices(where, values, per, known))

    def _commitment(self, where: text_places.Path, values: Mapping[str, Any]) -> Commitment:
        self._refuse_unknown(where, values, ("tenant", "amount"))
        commitment = Commitment(tenant_id=self._text((*where, "tenant"), values.get("tenant", "")))
        set_amount(commitment.amount, self._amount((*where, "amount"), values.get("amount"), 2**127 - 1))
        return commitment

    # -- single values ----------------------------------------------------------------------------------------------------

    def _refuse_unknown(self, where: text_places.Path, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for name in values:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                self._problem((*where, name), f"is no key; the nearest is {nearest}")

    def _tables(self, where: text_places.Path, value: Any) -> list[dict[str, Any]]:
        if isinstance(value, list) and all(isinstance(line, dict) for line in value):
            return value
        name = ".".join(str(part) for part in where if isinstance(part, str))
        self._problem(where, f"is no list of tables; write [[{name}]] before each")
        return []

    def _table(self, where: text_places.Path, value: Any, example: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self._problem(where, f"{value!r} is no table; write {example}")
        return {}

    def _text(self, where: text_places.Path, value: Any) -> str:
        """A text that the ledger can hold."""
        try:
            if isinstance(value, str) and value.encode():
                return value
        except UnicodeEncodeError:
            self._problem(where, f"{value!r} holds half a surrogate pair; write the character whole")
            return ""
        if value != "":
            self._problem(where, f"{value!r} is no text; write it in quotation marks")
        return ""

    def _whole(self, where: text_places.Path, value: Any, lowest: int, highest: int) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest:
            return value
        self._problem(where, f"{value!r}; write a whole number from {lowest}" + (f" to {highest}" if value else ""))
        return 0

    def _effective_ms(self, value: Any) -> int:
        if value == "always":
            return 0
        try:
            moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        except (TypeError, ValueError):
            self._problem(("effective",), f'{value!r} is no time; write "2026-01-01T00:00:00Z", or "always"')
            return 0
        if moment.tzinfo is None:
            self._problem(("effective",), f"{value!s} names no time zone; add Z or an offset")
            return 0
        return int(moment.replace(microsecond=0).timestamp()) * 1_000 + moment.microsecond // 1_000

    def _per(self, where: text_places.Path, value: Any) -> str:
        if isinstance(value, str) and value in _PER:
            return value
        self._problem(where, f"{value!r}; write one of {', '.join(_PER)}")
        return "million"

    def _enum(self, where: text_places.Path, value: Any, enum: Any, prefix: str) -> int:
        if value is None:
            return 0
        names = [name.removeprefix(prefix).lower() for name, _ in enum.items() if not name.endswith("_UNSPECIFIED")]
        if isinstance(value, str) and value.lower() in names:
            return int(enum.Value(prefix + value.upper()))
        self._problem(where, f"{value!r} is not known; write one of {', '.join(names)}, or leave it out for any")
        return 0

    def _unit_price(self, where: text_places.Path, text: Any, per: str) -> int:
        of, decimals = _PER[per]
        pico = self._exact(where, text, PICO // of, f"a price per {per} units from 0, with at most {decimals} decimals")
        if pico <= PRICE_PICO_MAX:
            return pico
        self._problem(where, f"{text!r} per {per} units is over {PRICE_PICO_MAX} pico a unit; check what it is per")
        return 0

    def _amount(self, where: text_places.Path, text: Any, highest: int) -> int:
        pico = self._exact(where, text, PICO, "an amount from 0, with at most 12 decimals")
        if pico <= highest:
            return pico
        self._problem(where, f"{text!r} is over {highest} pico; check the unit")
        return 0

    def _exact(self, where: text_places.Path, text: Any, scale: int, mend: str) -> int:
        """`text` times `scale`, which must be a whole number from 0."""
        if not isinstance(text, str):
            self._problem(where, f'{text!r} is not in quotation marks; write "{text}", so that no float comes between')
            return 0
        try:
            pico = parse_decimal_to_pico(text)
        except AmountError as error:
            self._problem(where, str(error))
            return 0
        whole, rest = divmod(pico * scale, PICO)
        if rest or pico < 0:
            self._problem(where, f"{text!r}; write {mend}")
            return 0
        return whole
