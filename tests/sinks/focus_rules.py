"""The rules of FOCUS 1.2 that its text gives for the columns we write, as a check of any CSV file that claims to be one.

Written from the specification (focus.finops.org, 1.2), not from the exporter: types, nullability, allowed values, and what one
column says about another.
"""

from __future__ import annotations

import csv
import io
import json
import re
from decimal import Decimal

MANDATORY = {
    *("BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd", "BillingPeriodStart"),
    *("ChargeCategory", "ChargeClass", "ChargeDescription", "ChargePeriodEnd", "ChargePeriodStart", "ContractedCost"),
    *("EffectiveCost", "InvoiceIssuerName", "ListCost", "PricingQuantity", "PricingUnit", "ProviderName", "PublisherName"),
    *("ServiceCategory", "ServiceName"),
}
# Columns that 1.2 knows beside the mandatory ones.
OTHERS = {
    *("AvailabilityZone", "BillingAccountType", "CapacityReservationId", "CapacityReservationStatus", "ChargeFrequency"),
    *("CommitmentDiscountCategory", "CommitmentDiscountId", "CommitmentDiscountName", "CommitmentDiscountQuantity"),
    *("CommitmentDiscountStatus", "CommitmentDiscountType", "CommitmentDiscountUnit", "ConsumedQuantity", "ConsumedUnit"),
    *("ContractedUnitPrice", "InvoiceId", "ListUnitPrice", "PricingCategory", "PricingCurrency"),
    *("PricingCurrencyContractedUnitPrice", "PricingCurrencyEffectiveCost", "PricingCurrencyListUnitPrice", "RegionId"),
    *("RegionName", "ResourceId", "ResourceName", "ResourceType", "ServiceSubcategory", "SkuId", "SkuMeter"),
    *("SkuPriceDetails", "SkuPriceId", "SubAccountId", "SubAccountName", "SubAccountType", "Tags"),
}
NEVER_NULL = {
    *("BilledCost", "BillingAccountId", "BillingCurrency", "BillingPeriodEnd", "BillingPeriodStart", "ChargeCategory"),
    *("ChargeFrequency", "ChargePeriodEnd", "ChargePeriodStart", "ContractedCost", "EffectiveCost", "InvoiceIssuerName"),
    *("ListCost", "ProviderName", "PublisherName", "ServiceCategory", "ServiceName", "ServiceSubcategory"),
}
DECIMALS = {
    *("BilledCost", "ConsumedQuantity", "ContractedCost", "ContractedUnitPrice", "EffectiveCost", "ListCost", "ListUnitPrice"),
    "PricingQuantity",
}
TIMES = {"BillingPeriodEnd", "BillingPeriodStart", "ChargePeriodEnd", "ChargePeriodStart"}
ALLOWED = {
    "ChargeCategory": {"Usage", "Purchase", "Tax", "Credit", "Adjustment"},
    "ChargeClass": {"", "Correction"},
    "ChargeFrequency": {"One-Time", "Recurring", "Usage-Based"},
    "PricingCategory": {"", "Standard", "Dynamic", "Committed", "Other"},
    "ServiceCategory": {"AI and Machine Learning"},
    "ServiceSubcategory": {
        *("AI Platforms", "Bots", "Generative AI", "Machine Learning", "Natural Language Processing"),
        "Other (AI and Machine Learning)",
    },
}
# Not null for usage and purchases that are no corrections; null for taxes.
PRICED = {"ContractedUnitPrice", "ListUnitPrice", "PricingCategory", "PricingQuantity", "PricingUnit", "SkuId", "SkuPriceId"}
NUMBER = re.compile(r"-?\d+(\.\d+)?(E-?\d+)?")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
UNIT = re.compile(r"(\d+ )?[A-Z][A-Za-z]*(-[A-Z][A-Za-z]*)?s")


def focus_problems(text: str) -> list[str]:
    """Everything in which a file is not FOCUS 1.2, with its row."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or []
    problems = [f"column {name} is missing" for name in sorted(MANDATORY - set(columns))]
    problems += [
        f"column {name} is no column of 1.2" for name in columns if name not in MANDATORY | OTHERS and name[:2] != "x_"
    ]
    problems += [f"column {name} stands twice" for name in set(columns) if columns.count(name) > 1]
    if not problems:
        parents: dict[str, str] = {}
        invoiced: dict[str, str] = {}
        for number, row in enumerate(reader, 1):
            problems += [f"row {number}: {problem}" for problem in _row_problems(row)]
            if parents.setdefault(row.get("SkuPriceId", ""), row.get("SkuId", "")) != row.get("SkuId", ""):
                problems.append(f"row {number}: SkuPriceId {row['SkuPriceId']} has two SKUs")
            if (
                row.get("InvoiceId")
                and invoiced.setdefault(row["InvoiceId"], row["BillingAccountId"]) != row["BillingAccountId"]
            ):
                problems.append(f"row {number}: invoice {row['InvoiceId']} has two accounts")
    return problems


def _row_problems(row: dict[str, str]) -> list[str]:
    found = [f"{name} is null" for name in NEVER_NULL if name in row and not row[name]]
    found += [f"{name} {row[name]!r} is no number" for name in DECIMALS if row.get(name) and not NUMBER.fullmatch(row[name])]
    found += [f"{name} {row[name]!r} is no time" for name in TIMES if not TIME.fullmatch(row[name])]
    found += [
        f"{name} {row[name]!r} is not allowed" for name, values in ALLOWED.items() if name in row and row[name] not in values
    ]
    if not re.fullmatch(r"[A-Z]{3}", row["BillingCurrency"]):
        found.append(f"BillingCurrency {row['BillingCurrency']!r} is no ISO 4217 code")
    for name in ("PricingUnit", "ConsumedUnit"):
        if row.get(name) and not UNIT.fullmatch(row[name]):
            found.append(f"{name} {row[name]!r} is no unit")
    for name in ("Tags", "SkuPriceDetails"):
        if row.get(name) and not _is_key_values(row[name]):
            found.append(f"{name} {row[name]!r} is no object of plain values")
    if found:
        return found
    return _across(row)


def _across(row: dict[str, str]) -> list[str]:
    found = []
    category, correction = row["ChargeCategory"], row["ChargeClass"] == "Correction"
    for start, end in (("BillingPeriodStart", "BillingPeriodEnd"), ("ChargePeriodStart", "ChargePeriodEnd")):
        if row[start] >= row[end]:
            found.append(f"{end} is not after {start}")
    if category in {"Usage", "Purchase"} and not correction:
        found += [f"{name} is null for {category}" for name in PRICED if name in row and not row[name]]
    if category == "Tax":
        found += [f"{name} is not null for Tax" for name in PRICED if row.get(name)]
    if category == "Purchase" and row["ChargeFrequency"] == "Usage-Based":
        found.append("a purchase is not Usage-Based")
    if category == "Usage" and not correction and Decimal(row["ConsumedQuantity"] or 0) <= 0:
        found.append("ConsumedQuantity is not positive for Usage")
    if category != "Usage" and row["ConsumedQuantity"]:
        found.append(f"ConsumedQuantity is not null for {category}")
    for one, other in (
        *(("ConsumedQuantity", "ConsumedUnit"), ("PricingQuantity", "PricingUnit"), ("SubAccountId", "SubAccountType")),
        *(("SkuPriceId", "SkuPriceDetails"), ("SkuId", "SkuMeter")),
    ):
        if bool(row[one]) != bool(row[other]):
            found.append(f"{one} and {other}: one is null")
    for price, cost in (("ListUnitPrice", "ListCost"), ("ContractedUnitPrice", "ContractedCost")):
        if row[price] and Decimal(row[price]) < 0:
            found.append(f"{price} is negative")
        if row[price] and not correction and Decimal(row[price]) * Decimal(row["PricingQuantity"] or 0) != Decimal(row[cost]):
            found.append(f"{price} times PricingQuantity is not {cost}")
    if category in {"Credit", "Adjustment"} and row["EffectiveCost"] != row["BilledCost"]:
        found.append("EffectiveCost is not BilledCost")
    return found


def _is_key_values(text: str) -> bool:
    try:
        values = json.loads(text)
    except ValueError:
        return False
    return isinstance(values, dict) and not any(isinstance(value, dict | list) for value in values.values())
