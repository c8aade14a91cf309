"""Price books in files: exact, validated whole, and every problem named."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from billing.prices import PriceBooks
from taximeter.errors import InputFileError
from taximeter.price_files import default_price_book, read_price_book

if TYPE_CHECKING:
    from pathlib import Path

TOML = """
version = 2
currency = "EUR"
effective = "2026-01-01T00:00:00Z"
[[prices]]
model = "m*"
operation = "chat"
input = "0.10"
output = "12"
units = { audio_ms = "0.000001" }
"""


def test_prices_become_whole_picos_a_unit(tmp_path: Path) -> None:
    path = tmp_path / "book.toml"
    path.write_text(TOML)
    book = read_price_book(path)
    assert (book.version, book.currency, book.effective_ms) == (2, "EUR", 1_767_225_600_000)
    price = book.prices[0]
    assert (price.uncached_input_pico, price.output_pico) == (100_000, 12_000_000)
    assert dict(price.unit_pico) == {"audio_ms": 1}


def test_json_says_the_same(tmp_path: Path) -> None:
    toml, as_json = tmp_path / "book.toml", tmp_path / "book.json"
    toml.write_text(TOML)
    line = {"model": "m*", "operation": "chat", "input": "0.10", "output": "12", "units": {"audio_ms": "0.000001"}}
    as_json.write_text(json.dumps({"version": 2, "currency": "EUR", "effective": "2026-01-01T00:00:00Z", "prices": [line]}))
    assert read_price_book(toml) == read_price_book(as_json)


def test_the_default_book_is_one_that_the_ledger_takes() -> None:
    PriceBooks().add(default_price_book())


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('input = "0.10"', "input = 0.10", "prices[1].input: 0.1 is not in quotation marks"),
        ('input = "0.10"', 'input = "0.0000001"', "prices[1].input: '0.0000001'; write a price per million"),
        ('input = "0.10"', 'input = "-1"', "prices[1].input: '-1'; write a price"),
        ('input = "0.10"', 'inputt = "0.10"', "prices[1].inputt: is no key; the nearest is input"),
        ("version = 2", "verzion = 2", "verzion: is no key; the nearest is version; version: None"),
        ("2026-01-01T00:00:00Z", "2026-01-01", "names no time zone"),
        ('operation = "chat"', 'operation = "chatting"', "prices[1].operation: 'chatting' is not known"),
        ('model = "m*"', 'model = "*m"', "prices[1].model: '*m'"),
        ("[[prices]]", "[prices]", "prices: is no list of tables"),
        ("version = 2", "version = ", "is not TOML"),
    ],
)
def test_every_problem_is_named(tmp_path: Path, old: str, new: str, problem: str) -> None:
    path = tmp_path / "book.toml"
    path.write_text(TOML.replace(old, new))
    with pytest.raises(InputFileError) as caught:
        read_price_book(path)
    assert problem in str(caught.value)
