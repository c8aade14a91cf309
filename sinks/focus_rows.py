"""Charges as rows of FOCUS 1.2, the FinOps cost and usage specification: which columns there are, and what stands in each.

Pure: no query, no clock. Amounts, prices and quantities are exact decimals; a price times its quantity is the cost, to the last
digit. What the specification calls null is an empty cell. Columns that it asks for only of providers with commitment discounts,
capacity reservations, regions, resources or a second currency are left out, as it says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from billing.amounts import PICO, decimal_text
from billing.line_parts import PartKey
from billing.periods import Period
from sinks.charged_usage import UsageName
from sinks.event_columns import OPERATIONS, SERVICE_CLASSES

__all__ = ["COLUMNS", "Billed", "Payee", "other_row", "usage_row"]

# In the specification's order, then ours.
COLUMNS = (
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingAccountType",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "ContractedUnitPrice",
    "EffectiveCost",
    "InvoiceId",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "SkuId",
    "SkuMeter",
    "SkuPriceDetails",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "SubAccountType",
    "Tags",
    "x_PriceBookVersion",
    "x_Requests",
)
_SUBCATEGORIES = {
    "embeddings": "Natural Language Processing",
    "classification": "Natural Language Processing",
    "ocr": "Machine Learning",
    "speech_to_text": "Machine Learning",
}
# What is counted, and how many make a pricing unit, where that is not a million.
_UNITS = {"characters": "Characters", "audio_ms": "Milliseconds", "image_steps": "Steps", "requests": "Requests"}
_SINGLE = frozenset({"image_steps", "requests"})
_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Payee:
    """Who charges whom, in what."""

    provider: str
    tenant_id: str
    display_name: str
    currency: str


@dataclass(frozen=True, slots=True)
class Billed:
    """When something was charged, and on which invoice, if it has one yet."""

    start_ms: int
    end_ms: int
    billing_period: Period
    invoice_id: str = ""
    # Of a period that was invoiced before.
    correction: bool = False


def usage_row(
    payee: Payee, billed: Billed, name: UsageName, requests: int, part: PartKey, units: int, amount_pico: int, list_pico: int
) -> Mapping[str, str]:
    """Units at one price, of one day; without a price, an amount alone. `list_pico`: what a unit costs who has no own price."""
    operation, service_class = OPERATIONS[name.operation], SERVICE_CLASSES[name.service_class]
    meter = part.quantity_of.replace("_", " ").capitalize()
    terms = f", {part.terms}" if part.terms else ""
    row = _common(payee, billed, amount_pico) | {
        "ChargeDescription": f"{meter} of {name.model} ({operation}, {service_class}){terms}",
        "ServiceName": f"Inference: {operation.replace('_', ' ')}",
        "ServiceSubcategory": _SUBCATEGORIES.get(operation, "Generative AI"),
        "SubAccountId": name.project_id,
        "SubAccountName": name.project_id,
        "SubAccountType": "Project" if name.project_id else "",
        "Tags": _json({"taximeter/operation": operation, "taximeter/service_class": service_class}),
        "x_PriceBookVersion": str(name.price_version),
        "x_Requests": str(requests),
    }
    if not part.unit_pico and amount_pico:
        return row | {"ChargeCategory": "Adjustment", "ChargeFrequency": "One-Time"}
    counted = _UNITS.get(part.quantity_of, "Tokens" if part.quantity_of.endswith("_tokens") else "Units")
    each = 1 if part.quantity_of in _SINGLE else _MILLION
    sku = f"{name.model}/{operation}/{service_class}/{part.quantity_of}"
    return row | {
        "ChargeCategory": "Usage",
        "ChargeFrequency": "Usage-Based",
        "ConsumedQuantity": str(units),
        "ConsumedUnit": counted,
        "ContractedUnitPrice": decimal_text(part.unit_pico * each),
        "ListCost": decimal_text(units * list_pico),
        "ListUnitPrice": decimal_text(list_pico * each),
        "PricingCategory": "Standard",
        "PricingQuantity": decimal_text(units * (PICO // each)),
        "PricingUnit": counted if each == 1 else f"{each} {counted}",
        "SkuId": sku,
        "SkuMeter": meter,
        "SkuPriceDetails": _json({"Model": name.model, "ServiceClass": service_class, "Terms": part.terms or "flat"}),
        "SkuPriceId": f"{sku}/{part.terms}" if part.terms else sku,
    }


def other_row(
    payee: Payee, billed: Billed, category: str, description: str, amount_pico: int, project_id: str = ""
) -> Mapping[str, str]:
    """What no request was charged for: a tax, a credit, a settlement, a correction, a rounding."""
    return _common(payee, billed, amount_pico) | {
        "ChargeCategory": category,
        "ChargeDescription": description,
        "ChargeFrequency": "One-Time",
        "ServiceName": "Inference",
        "ServiceSubcategory": "Generative AI",
        "SubAccountId": project_id,
        "SubAccountName": project_id,
        "SubAccountType": "Project" if project_id else "",
    }


def _common(payee: Payee, billed: Billed, amount_pico: int) -> dict[str, str]:
    amount = decimal_text(amount_pico)
    return {
        "BilledCost": amount,
        "BillingAccountId": payee.tenant_id,
        "BillingAccountName": payee.display_name,
        "BillingAccountType": "Tenant",
        "BillingCurrency": payee.currency,
        "BillingPeriodEnd": _time(billed.billing_period.end_ms),
        "BillingPeriodStart": _time(billed.billing_period.start_ms),
        "ChargeClass": "Correction" if billed.correction else "",
        "ChargePeriodEnd": _time(billed.end_ms),
        "ChargePeriodStart": _time(billed.start_ms),
        "ContractedCost": amount,
        "EffectiveCost": amount,
        "InvoiceId": billed.invoice_id,
        "InvoiceIssuerName": payee.provider,
        "ListCost": amount,
        "ProviderName": payee.provider,
        "PublisherName": payee.provider,
        "ServiceCategory": "AI and Machine Learning",
    }


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms // 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _json(values: Mapping[str, str]) -> str:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))
