"""Money as whole numbers of pico (10^-12) currency units, and its way into and out of contracts and text. Exact, always."""

from __future__ import annotations

import re

from billing.v1.account_pb2 import Amount

PICO = 10**12
_LOW = (1 << 64) - 1
_MAX = (1 << 127) - 1
_DECIMAL = re.compile(r"([+-]?)(\d{1,26})(?:\.(\d{1,12}))?")


class AmountError(ValueError):
    """An amount that cannot be read or held: the message names the value and the mend."""


def to_amount(pico: int) -> Amount:
    """The contract's form of `pico`. Raises AmountError beyond a signed 128-bit number."""
    amount = Amount()
    set_amount(amount, pico)
    return amount


def set_amount(amount: Amount, pico: int) -> None:
    """Set `amount` to `pico`, in place. Raises AmountError beyond a signed 128-bit number."""
    if not -_MAX - 1 <= pico <= _MAX:
        raise AmountError(f"amount {pico} pico does not fit in 128 bits")
    amount.high = pico >> 64
    amount.low = pico & _LOW


def from_amount(amount: Amount) -> int:
    """The number of pico that `amount` stands for."""
    return (amount.high << 64) | amount.low


def parse_decimal_to_pico(text: str) -> int:
    """Pico from a decimal number such as "12.50", with at most 12 decimals. Raises AmountError."""
    match = _DECIMAL.fullmatch(text.strip())
    if match is None:
        raise AmountError(f"amount {text!r} is not a decimal number with at most 12 decimals; write it like 12.50")
    sign, whole, decimals = match.groups()
    pico = int(whole) * PICO + int((decimals or "").ljust(12, "0"))
    return -pico if sign == "-" else pico


def decimal_text(pico: int, decimals_min: int = 0, *, grouped: bool = False) -> str:
    """All of `pico` as a decimal number for programs, or `grouped` in thousands for people: "-1234.5"."""
    whole, rest = divmod(abs(pico), PICO)
    decimals = f"{rest:012d}".rstrip("0").ljust(decimals_min, "0")
    return f"{'-' if pico < 0 else ''}{f'{whole:,}' if grouped else whole}{'.' if decimals else ''}{decimals}"


def format_pico(pico: int, currency: str = "", decimals_min: int = 2) -> str:
    """All of `pico` as a decimal number, at least `decimals_min` decimals, nothing rounded: "0.0000128 USD"."""
    text = decimal_text(pico, decimals_min, grouped=True)
    return f"{text} {currency}" if currency else text
