"""What a field of a request may hold, by its name, in one table: the check of every call and the OpenAPI document both read it.

A name means the same in every request. Protobuf's types say the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.protobuf.timestamp_pb2 import Timestamp

from billing.limits import ALERT_NOTE_CHARS_MAX, ID_CHARS_MAX
from billing.v1.account_pb2 import KeyScope
from billing.v1.invoice_pb2 import CreditKind
from serving.api.errors import ApiError
from serving.documents import DocumentFormat
from sinks.queries import USAGE_BY

if TYPE_CHECKING:
    from google.protobuf.message import Message

__all__ = [
    "CREDIT_KINDS",
    "IDEMPOTENT",
    "PAGE_SIZE_DEFAULT",
    "REQUIRED",
    "RULES",
    "SCOPES",
    "USAGE_DIMENSIONS",
    "Rule",
    "check",
    "from_time",
    "page_size",
    "to_time",
]

PAGE_SIZE_DEFAULT: Final = 100
_PAGE_SIZE_MAX: Final = 1_000
_PAGE_TOKEN_CHARS_MAX: Final = 4_096
# Some twenty characters a partition, of which there are 1,024 at most.
_POSITION_CHARS_MAX: Final = 24_576
# 2200-01-01: beyond it nobody bills.
_TIME_S_MAX: Final = 7_258_118_400

CREDIT_KINDS: Final = {name.removeprefix("CREDIT_KIND_").lower(): number for name, number in CreditKind.items() if number}
SCOPES: Final = {name.removeprefix("KEY_SCOPE_").lower(): number for name, number in KeyScope.items() if number}
# Times are the bucket's.
USAGE_DIMENSIONS: Final = tuple(name for name in USAGE_BY if name not in ("minute", "hour", "day"))


@dataclass(frozen=True, slots=True)
class Rule:
    """What may stand in a field. Zero and empty are `left out`, and always fit where the field is not required."""

    chars_max: int = 0
    pattern: str = ""
    choices: tuple[str, ...] = ()
    least: int = 0
    most: int = 0


# No control characters: they stand in logs, in files and in SQL's answers.
_ID: Final = Rule(chars_max=ID_CHARS_MAX, pattern=r"^[^\x00-\x1f\x7f]*$")
_TEXT: Final = Rule(chars_max=1_000, pattern=r"^[^\x00-\x1f\x7f]*$")
_TOKEN: Final = Rule(chars_max=_PAGE_TOKEN_CHARS_MAX, pattern=r"^[A-Za-z0-9_-]*$")
_AMOUNT: Final = Rule(chars_max=33, pattern=r"^([0-9]{1,20}(\.[0-9]{1,12})?)?$")

RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(
        ("tenant_id", "project_id", "user_id", "model", "key_id", "grant_id", "number", "display_name", "alert_id"), _ID
    ),
    **dict.fromkeys(("reason", "reference"), _TEXT),
    "page_token": _TOKEN,
    "after": Rule(chars_max=_POSITION_CHARS_MAX, pattern=_TOKEN.pattern),
    "note": Rule(chars_max=ALERT_NOTE_CHARS_MAX, pattern=_TEXT.pattern),
    **dict.fromkeys(("amount", "credit_limit"), _AMOUNT),
    "idempotency_key": Rule(chars_max=ID_CHARS_MAX, pattern=r"^[\x21-\x7e]*$"),
    "page_size": Rule(most=_PAGE_SIZE_MAX),
    "line": Rule(least=1, most=1_000_000),
    "priority": Rule(most=1_000),
    "prompt_tokens_max": Rule(most=2**63 - 1),
    "currency": Rule(chars_max=8, pattern=r"^[A-Z]*$"),
    "time_zone": Rule(chars_max=64, pattern=r"^[A-Za-z0-9_+/-]*$"),
    "by": Rule(choices=USAGE_DIMENSIONS),
    "bucket": Rule(choices=("minute", "hour", "day", "month")),
    "kind": Rule(choices=tuple(CREDIT_KINDS)),
    "scopes": Rule(choices=tuple(SCOPES)),
    "format": Rule(choices=tuple(DocumentFormat)),
    "billing_mode": Rule(choices=("prepaid", "postpaid")),
    "status": Rule(choices=("active", "suspended")),
}

# By the request's name: what must not be left out.
REQUIRED: Final[dict[str, tuple[str, ...]]] = {
    "GetStatementRequest": ("start", "end"),
    "GetInvoiceRequest": ("number",),
    "GetInvoiceDocumentRequest": ("number",),
    "ExplainInvoiceLineRequest": ("number", "line"),
    "GrantCreditRequest": ("tenant_id", "amount", "idempotency_key"),
    "CreateKeyRequest": ("idempotency_key",),
    "RevokeKeyRequest": ("key_id",),
    "AcknowledgeAlertRequest": ("alert_id",),
    "CreateTenantRequest": ("tenant_id", "idempotency_key"),
    "SetTenantStatusRequest": ("tenant_id", "status"),
}
# The field that is a header over HTTP.
IDEMPOTENT: Final = "idempotency_key"


def check(request: Message) -> None:
    """Raises ApiError for a field that does not hold what it may, or that is missing."""
    for name in REQUIRED.get(request.DESCRIPTOR.name, ()):
        if not (request.HasField(name) if request.DESCRIPTOR.fields_by_name[name].has_presence else getattr(request, name)):
            where = "the header Idempotency-Key, or the field" if name == IDEMPOTENT else "it"
            raise ApiError.malformed(f"{name}: is missing; send {where}")
    for field, value in request.ListFields():
        if isinstance(value, Timestamp):
            if not 0 <= value.seconds < _TIME_S_MAX:
                raise ApiError.unacceptable(f"{field.name}: is before 1970 or after 2199; send a time in between")
            continue
        rule = RULES[field.name]
        for item in value if field.is_repeated else (value,):
            _check_one(field.name, item, rule)


def _check_one(name: str, value: object, rule: Rule) -> None:
    if isinstance(value, str):
        if rule.choices and value not in rule.choices:
            raise ApiError.malformed(f"{name}: {value[:40]!r} is not known; send one of {', '.join(rule.choices)}")
        if rule.chars_max and len(value) > rule.chars_max:
            raise ApiError.malformed(f"{name}: {len(value)} characters; send at most {rule.chars_max}")
        # `$` would let a line's end pass.
        if rule.pattern and not re.fullmatch(rule.pattern.removeprefix("^").removesuffix("$"), value):
            raise ApiError.malformed(f"{name}: {value[:40]!r} does not match {rule.pattern}")
    elif isinstance(value, int) and not rule.least <= value <= rule.most:
        raise ApiError.malformed(f"{name}: {value}; send {rule.least} to {rule.most}")


def page_size(asked: int) -> int:
    """How many rows a page has."""
    return asked or PAGE_SIZE_DEFAULT


def to_time(at_ms: int) -> Timestamp | None:
    """A time for an answer; None where there never was one."""
    if at_ms <= 0:
        return None
    time = Timestamp()
    time.FromMilliseconds(at_ms)
    return time


def from_time(request: Message, name: str, default_ms: int) -> int:
    """Unix milliseconds of a field of `request`."""
    time: Timestamp = getattr(request, name)
    return time.ToMilliseconds() if request.HasField(name) else default_ms
