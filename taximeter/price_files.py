"""A price book in a TOML or JSON file, validated whole.

Promise: `read_price_book` returns a book that the ledger takes, or raises `InputFileError` that names every problem,
each with its field, its value and its mend. A price is written as people write it, in currency units per million
units, as a string with at most six decimals; the unit price in pico is then a whole number, and nothing is rounded.

    version = 1
    currency = "USD"
    effective = "2026-01-01T00:00:00Z"        # or "always"

    [[prices]]
    model = "smollm2*"                        # a name, or a prefix that ends in *
    input = "0.10"                            # per million uncached input tokens
    output = "0.40"
    units = { audio_ms = "12.50" }            # by named unit, per million of them
"""

from __future__ import annotations

import difflib
import json
import tomllib
from datetime import datetime
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from billing.amounts import PICO, AmountError, parse_decimal_to_pico
from billing.price_checks import book_problems
from billing.v1 import usage_pb2
from billing.v1.command_pb2 import Price, PriceBook
from taximeter.errors import InputFileError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["default_price_book", "read_price_book"]

_FILE_BYTES_MAX: Final = 5_000_000
_PER_UNITS: Final = 1_000_000
_BOOK_KEYS: Final = ("version", "currency", "effective", "prices")
# What a person writes → the contract's field.
_PRICE_KEYS: Final = {
    "input": "uncached_input_pico",
    "output": "output_pico",
    "cache_read": "cache_read_pico",
    "cache_write": "cache_write_pico",
    "reasoning": "reasoning_pico",
    "image_input": "image_input_pico",
    "audio_input": "audio_input_pico",
    "audio_output": "audio_output_pico",
}
_LINE_KEYS: Final = ("model", "operation", "service_class", "units", *_PRICE_KEYS)


def default_price_book() -> PriceBook:
    """The book that comes with the package: prices for the demonstration's models."""
    with resources.as_file(resources.files("taximeter") / "data" / "prices.toml") as path:
        return read_price_book(path)


def read_price_book(path: Path) -> PriceBook:
    """The book in the file."""
    values = _read(path)
    problems: list[str] = []
    book = PriceBook()
    _refuse_unknown("", values, _BOOK_KEYS, problems)
    version = values.get("version")
    if isinstance(version, int) and not isinstance(version, bool) and 0 < version < 2**32:
        book.version = version
    else:
        problems.append(f"version: {version!r}; write a whole number from 1")
    book.currency = _text("currency", values.get("currency", ""), problems)
    book.effective_ms = _effective_ms(values.get("effective"), problems)
    lines = values.get("prices", [])
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        problems.append("prices: is no list of tables; write [[prices]] before each")
        lines = []
    for number, line in enumerate(lines, start=1):
        book.prices.append(_price(f"prices[{number}]", line, problems))
    if not problems:
        problems = book_problems(book)
    if problems:
        raise InputFileError(f"price book {path}: " + "; ".join(problems))
    return book


def _read(path: Path) -> dict[str, Any]:
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
    return values


def _text(where: str, value: Any, problems: list[str]) -> str:
    """A text that the ledger can hold."""
    try:
        if isinstance(value, str) and value.encode():
            return value
    except UnicodeEncodeError:
        problems.append(f"{where}: {value!r} holds half a surrogate pair; write the character whole")
        return ""
    if value != "":
        problems.append(f"{where}: {value!r} is no text; write it in quotation marks")
    return ""


def _refuse_unknown(where: str, values: Mapping[str, Any], known: tuple[str, ...], problems: list[str]) -> None:
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            shown = name.encode(errors="backslashreplace").decode()
            problems.append(f"{where}{'.' if where else ''}{shown}: is no key; the nearest is {nearest}")


def _effective_ms(value: Any, problems: list[str]) -> int:
    if value == "always":
        return 0
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        problems.append(f'effective: {value!r} is no time; write "2026-01-01T00:00:00Z", or "always"')
        return 0
    if moment.tzinfo is None:
        problems.append(f"effective: {value!s} names no time zone; add Z or an offset")
        return 0
    return int(moment.replace(microsecond=0).timestamp()) * 1_000 + moment.microsecond // 1_000


def _price(where: str, values: Mapping[str, Any], problems: list[str]) -> Price:
    _refuse_unknown(where, values, _LINE_KEYS, problems)
    price = Price(
        model=_text(f"{where}.model", values.get("model", ""), problems),
        operation=_enum(f"{where}.operation", values.get("operation"), usage_pb2.Operation, "OPERATION_", problems),
        service_class=_enum(
            f"{where}.service_class", values.get("service_class"), usage_pb2.ServiceClass, "SERVICE_CLASS_", problems
        ),
    )
    for key, field in _PRICE_KEYS.items():
        if key in values:
            setattr(price, field, _unit_price(f"{where}.{key}", values[key], problems))
    units = values.get("units", {})
    if not isinstance(units, dict):
        problems.append(f'{where}.units: {units!r} is no table; write {{ characters = "1.00" }}')
        units = {}
    for unit, text in units.items():
        price.unit_pico[_text(f"{where}.units", unit, problems)] = _unit_price(f"{where}.units.{unit}", text, problems)
    return price


def _unit_price(where: str, text: Any, problems: list[str]) -> int:
    if not isinstance(text, str):
        problems.append(f'{where}: {text!r} is not in quotation marks; write "{text}", so that no float comes between')
        return 0
    try:
        pico = parse_decimal_to_pico(text)
    except AmountError as error:
        problems.append(f"{where}: {error}")
        return 0
    whole, rest = divmod(pico, _PER_UNITS)
    if rest or pico < 0 or whole > PICO * 1_000:
        problems.append(f"{where}: {text!r}; write a price per million units from 0, with at most six decimals")
        return 0
    return whole


def _enum(where: str, value: Any, enum: Any, prefix: str, problems: list[str]) -> int:
    if value is None:
        return 0
    names = [name.removeprefix(prefix).lower() for name, _ in enum.items() if not name.endswith("_UNSPECIFIED")]
    if isinstance(value, str) and value.lower() in names:
        return int(enum.Value(prefix + value.upper()))
    problems.append(f"{where}: {value!r} is not known; write one of {', '.join(names)}, or leave it out for any")
    return 0
