"""Invoices made by hand for looking at documents: the drawing of real ones is billing's, and has its own tests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from billing.amounts import PICO, to_amount
from billing.v1.account_pb2 import LedgerPosition
from billing.v1.invoice_pb2 import (
    CREDIT_KIND_PAID,
    CREDIT_KIND_PROMOTIONAL,
    ROUNDING_RULE_HALF_EVEN,
    ROUNDING_RULE_HALF_UP,
    CreditApplied,
    CreditKind,
    Invoice,
    InvoiceLine,
    LinePart,
    PeriodLineKey,
    RoundingRule,
    TaxLine,
    TaxRate,
    Units,
)
from billing.v1.usage_pb2 import OPERATION_CHAT, OPERATION_EMBEDDINGS, SERVICE_CLASS_BATCH, SERVICE_CLASS_STANDARD

# November and October 2026 in UTC, in Shanghai (8 hours ahead) and in Los Angeles (summer time ends on November 1).
NOVEMBER = (1_793_491_200_000, 1_796_083_200_000)
SHANGHAI_NOVEMBER = (NOVEMBER[0] - 8 * 3_600_000, NOVEMBER[1] - 8 * 3_600_000)
SHANGHAI_OCTOBER = (SHANGHAI_NOVEMBER[0] - 31 * 86_400_000, SHANGHAI_NOVEMBER[0])
LOS_ANGELES_NOVEMBER = (NOVEMBER[0] + 7 * 3_600_000, NOVEMBER[1] + 8 * 3_600_000)
MONTH = 31 * 86_400_000


@dataclass
class Priced:
    """A line as a test states it: a price per million units, or an amount alone."""

    project: str
    model: str
    quantity_of: str
    units: int
    per_million: str = "0"
    terms: str = ""
    events: int = 1
    operation: int = OPERATION_CHAT
    service_class: int = SERVICE_CLASS_STANDARD
    amount: str | None = None
    adjusts: tuple[int, int] | None = None
    adjustment_id: str = ""

    def amount_pico(self) -> int:
        return _pico(self.amount) if self.amount is not None else self.units * _unit_pico(self.per_million)


@dataclass
class Sheet:
    """What an invoice is made of."""

    lines: Sequence[Priced]
    currency: str = "USD"
    decimals: int = 2
    period: tuple[int, int] = NOVEMBER
    time_zone: str = "UTC"
    taxes: Sequence[tuple[str, int]] = ()
    credits: Sequence[tuple[str, CreditKind.ValueType, str]] = ()
    number: int = 1
    previous: bytes = b""
    seller: Sequence[str] = ("Example Inference Ltd", "12 Meter Street, Dublin 2, Ireland", "VAT IE 1234567T")
    buyer: Sequence[str] = ()
    tenant_id: str = "acme"
    display_name: str = "Acme Analytics Inc."
    note: str = ""
    unrated_events: int = 0
    rule: RoundingRule.ValueType = ROUNDING_RULE_HALF_UP

    def invoice(self) -> Invoice:
        start_ms, end_ms = self.period
        usage = sum(line.amount_pico() for line in self.lines if line.adjusts is None)
        adjustments = sum(line.amount_pico() for line in self.lines if line.adjusts is not None)
        exact, unit = usage + adjustments, PICO // 10**self.decimals
        net = self._rounded(Fraction(exact, unit)) * unit
        taxes = [(name, rate, self._rounded(Fraction(net * rate, 1_000_000 * unit)) * unit) for name, rate in self.taxes]
        applied = sum(_pico(amount) for _, _, amount in self.credits)
        tax_sum = sum(amount for _, _, amount in taxes)
        return Invoice(
            schema_version=1,
            series="INV-0001" if self.number else "",
            number=self.number,
            previous_hash=self.previous,
            tenant_id=self.tenant_id,
            display_name=self.display_name,
            currency=self.currency,
            period_start_ms=start_ms,
            period_end_ms=end_ms,
            time_zone=self.time_zone,
            issued_ms=end_ms + 2 * 3_600_000 + 345_678,
            position=LedgerPosition(generation=bytes(range(16)), sequence=48_211),
            lines=[self._line(place, line) for place, line in enumerate(self.lines, 1)],
            events=sum({(line.project, line.model): line.events for line in self.lines}.values()),
            unrated_events=self.unrated_events,
            usage=to_amount(usage),
            adjustments=to_amount(adjustments),
            net_exact=to_amount(exact),
            rounding_rule=self.rule,
            currency_decimals=self.decimals,
            net=to_amount(net),
            taxes=[
                TaxLine(rate=TaxRate(name=name, rate_millionths=rate), base=to_amount(net), amount=to_amount(amount))
                for name, rate, amount in taxes
            ],
            total=to_amount(net + tax_sum),
            credits=[
                CreditApplied(grant_id=name, kind=kind, amount=to_amount(_pico(amount))) for name, kind, amount in self.credits
            ],
            due=to_amount(self._rounded(Fraction(exact - applied, unit)) * unit + tax_sum),
            seller=self.seller,
            buyer=self.buyer,
            note=self.note,
        )

    def stored(self) -> bytes:
        return self.invoice().SerializeToString(deterministic=True)

    def _rounded(self, value: Fraction) -> int:
        """Python's own rounding is half to even."""
        if self.rule == ROUNDING_RULE_HALF_UP and value.denominator == 2:
            return (abs(value.numerator) // 2 + 1) * (1 if value > 0 else -1)
        return round(value)

    def _line(self, number: int, line: Priced) -> InvoiceLine:
        start_ms, end_ms = line.adjusts or self.period
        pico = line.amount_pico()
        return InvoiceLine(
            number=number,
            key=PeriodLineKey(
                tenant_id=self.tenant_id,
                period_start_ms=start_ms,
                period_end_ms=end_ms,
                currency=self.currency,
                project_id=line.project,
                model=line.model,
                operation=line.operation,
                service_class=line.service_class,
                price_version=3,
                adjustment_id=line.adjustment_id,
                opened_sequence=7,
            ),
            adjustment=line.adjusts is not None,
            events=line.events,
            part=LinePart(
                quantity_of=line.quantity_of,
                terms=line.terms,
                units=Units(high=line.units >> 64, low=line.units & ((1 << 64) - 1)),
                unit_pico=0 if line.amount is not None else _unit_pico(line.per_million),
                amount=to_amount(pico),
            ),
        )


def chained(*sheets: Sheet) -> list[bytes]:
    """The stored bytes of a series: each is numbered and names the hash of the one before."""
    series: list[bytes] = []
    for sheet in sheets:
        sheet.number = len(series) + 1
        sheet.previous = hashlib.sha256(series[-1]).digest() if series else b""
        series.append(sheet.stored())
    return series


def american() -> Sheet:
    """Three projects and five models, tiers, surcharges, batch at half, adjustments, two grants and two taxes."""
    earlier = (NOVEMBER[0] - MONTH, NOVEMBER[0])
    return Sheet(
        lines=[
            Priced("", "smollm2-135m", "uncached_input_tokens", 91_003, "0.01", events=40),
            Priced("", "smollm2-135m", "output_tokens", 20_117, "0.04", events=40),
            Priced("assistant", "deepseek-v3", "uncached_input_tokens", 412_993_118, "0.27", events=88_120),
            Priced("assistant", "deepseek-v3", "cache_read_tokens", 1_310_220_904, "0.027", events=88_120),
            Priced("assistant", "deepseek-v3", "output_tokens", 10_000_000, "0", "free", events=88_120),
            Priced("assistant", "deepseek-v3", "output_tokens", 100_000_000, "1.10", "tier 1", events=88_120),
            Priced("assistant", "deepseek-v3", "output_tokens", 34_812_377, "0.95", "tier 2", events=88_120),
            Priced("assistant", "gpt-oss-120b", "uncached_input_tokens", 3_204_118, "2.50", "context over 200,000 tokens", 14),
            Priced("assistant", "gpt-oss-120b", "reasoning_tokens", 880_201, "10", "context over 200,000 tokens", 14),
            Priced(
                "nightly-evaluation",
                "llama-4-maverick",
                "uncached_input_tokens",
                9_120_000_003,
                "0.135",
                events=2_001_733,
                service_class=SERVICE_CLASS_BATCH,
            ),
            Priced(
                "nightly-evaluation",
                "llama-4-maverick",
                "output_tokens",
                712_000_451,
                "0.425",
                events=2_001_733,
                service_class=SERVICE_CLASS_BATCH,
            ),
            Priced(
                "nightly-evaluation",
                "minilm-l6",
                "uncached_input_tokens",
                55_000_123,
                "0.01",
                "until the close",
                990_123,
                OPERATION_EMBEDDINGS,
            ),
            Priced(
                "nightly-evaluation",
                "minilm-l6",
                "uncached_input_tokens",
                0,
                terms="at the close",
                operation=OPERATION_EMBEDDINGS,
                amount="-0.1100002460",
                events=990_123,
            ),
            Priced(
                "nightly-evaluation",
                "minilm-l6",
                "minimum",
                12,
                terms="up to the least price of a request",
                operation=OPERATION_EMBEDDINGS,
                amount="0.000118",
                events=990_123,
            ),
            Priced("assistant", "deepseek-v3", "output_tokens", 48_112, "1.10", "tier 1", 31, adjusts=earlier),
            Priced(
                "assistant",
                "deepseek-v3",
                "output_tokens",
                -2_000_000,
                "1.10",
                "tier 1",
                120,
                adjusts=earlier,
                adjustment_id="void-incident-4711",
            ),
            Priced(
                "assistant",
                "",
                "credit note",
                0,
                terms="service credit for 2026-10-14",
                amount="-25",
                events=0,
                adjusts=earlier,
                adjustment_id="sla-2026-10",
            ),
        ],
        period=LOS_ANGELES_NOVEMBER,
        time_zone="America/Los_Angeles",
        taxes=[("State sales tax", 62_500), ("City sales tax", 8_750)],
        credits=[("welcome-2026", CREDIT_KIND_PROMOTIONAL, "50"), ("pay_3NkQx81", CREDIT_KIND_PAID, "1200.000000125")],
        buyer=("Acme Analytics Inc.", "500 Howard Street, Suite 900", "San Francisco, CA 94105, USA", "PO 2026-7781"),
        note="Payment within 30 days to account 12345678.\nQuestions: billing@example.com",
        unrated_events=17,
    )


def chinese() -> Sheet:
    """Yuan, a buyer with a Chinese name, a project in Arabic, and late usage of October."""
    return Sheet(
        lines=[
            Priced("智能客服", "qwen3-max", "uncached_input_tokens", 800_123_456, "20", events=120_001),
            Priced("智能客服", "qwen3-max", "output_tokens", 91_000_777, "60", events=120_001),
            Priced("مشروع الترجمة", "通义千问-长文本", "uncached_input_tokens", 12_345, "0.2", events=3),
            Priced("智能客服", "qwen3-max", "output_tokens", 1_001, "60", events=1, adjusts=SHANGHAI_OCTOBER),
        ],
        currency="CNY",
        period=SHANGHAI_NOVEMBER,
        time_zone="Asia/Shanghai",
        taxes=[("增值税 VAT", 60_000)],
        seller=("示例推理有限公司", "上海市浦东新区世纪大道 100 号"),
        buyer=("上海云端科技有限公司", "شركة الذكاء الاصطناعي", "统一社会信用代码 91310000MA1FL0XX0X"),
        display_name="上海云端科技有限公司",
        tenant_id="shanghai-cloud",
    )


def japanese() -> Sheet:
    """Yen has no decimals: the exact sum has, and is rounded once."""
    return Sheet(
        lines=[
            Priced("", "plamo-2", "characters", 1_234_567, "1500", events=310, operation=7),
            Priced("", "whisper-large", "audio_ms", 90_000, "15000", events=2, operation=6),
            Priced("", "sdxl", "requests", 7, "4000000", events=7, operation=8),
        ],
        currency="JPY",
        decimals=0,
        taxes=[("消費税", 100_000)],
        display_name="株式会社サンプル",
        tenant_id="sample-kk",
        rule=ROUNDING_RULE_HALF_EVEN,
    )


def long(lines: int = 400) -> Sheet:
    """More lines than pages should be needed for, with names that are as long as they may be."""
    return Sheet(
        lines=[
            Priced(
                f"team-{place // 40:02d}",
                f"model-{place % 40:02d}-{'x' * (place % 7) * 20}",
                "output_tokens",
                10_007 * place + 1,
                "0.4",
                events=place,
            )
            for place in range(lines)
        ]
    )


def _pico(text: str) -> int:
    return int(Fraction(text) * PICO)


def _unit_pico(per_million: str) -> int:
    return int(Fraction(per_million) * PICO / 1_000_000)
