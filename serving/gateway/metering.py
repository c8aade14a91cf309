"""One request's usage, from before it is forwarded until after its last response: what stands in the journal, and when.

1. `open`: the request is in the journal before it is forwarded, for whoever comes after this process.
2. `progress`: what a chunk adds is durable before the chunk leaves. The last one is what a crash would bill.
3. `close`: the final event is durable before the last response leaves. It happens exactly once, whatever ends the request.

A crash before 1 forwarded nothing; between 1 and 3 the journal's recovery makes an OUTCOME_INTERRUPTED event of the last
progress: what was delivered, at most one group of chunks more than reached the client; after 3 the event is complete.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from billing.limits import ID_CHARS_MAX
from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    COUNT_SOURCE_ESTIMATE,
    COUNT_SOURCE_TOKENIZER,
    OUTCOME_COMPLETED,
    OUTCOME_INTERRUPTED,
    OUTCOME_TRUNCATED,
    SERVICE_CLASS_STANDARD,
    SERVICE_CLASS_TEST,
    CountSource,
    Outcome,
    UsageEvent,
)
from serving.gateway.tokens import TextCount
from serving.gateway.tracing import TRACEPARENT
from serving.tokenizers import Framing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from producers.meter import OpenRequest, Receipt, UsageMeter
    from serving.gateway.counting import AnswerCounter, Counted, PreparedRequest
    from serving.gateway.directory import KeyView
    from serving.gateway.genai import GenAiMetrics
    from serving.gateway.profiles import ModelProfile
    from serving.gateway.spending import RequestMoney
    from serving.gateway.tokens import TokenCounts
    from serving.kserve import ModelInferResponse

__all__ = ["OUTPUT_TOKENS_MAX", "MeterParts", "Price", "RequestMeter", "Usage", "new_event", "now_ms", "tell_end", "tell_usage"]

_LOG = logging.getLogger(__name__)

# Text that may still change how it splits into tokens; what lies before it is counted once.
_WINDOW_CHARS = 2_048
# Text that is counted again may have some tokens more than were generated: by such a part of the longest answer, and one.
_RECOUNT_SLACK = 50
_SOURCES: dict[int, str] = {number: name.removeprefix("COUNT_SOURCE_").lower() for name, number in CountSource.items()}
# The attribute of an answer that was longer than this, and was delivered and billed all the same.
OUTPUT_TOKENS_MAX: Final = "output_tokens_max"
_UNKNOWN = TextCount(0, exact=False)
_NOTHING = TextCount(0, exact=True)


def now_ms() -> int:
    """Unix time."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class MeterParts:
    """What all requests of a gateway share."""

    meter: UsageMeter
    tokens: TokenCounts
    server_id: str
    region: str
    durable_timeout_s: float
    genai: GenAiMetrics | None = None
    """Where anybody asks for metrics."""
    on_end: Callable[[UsageEvent], None] | None = None
    """Hears of each request that has its bill, or whose refusal is on record."""


class Usage(NamedTuple):
    """What a request is billed for."""

    request_id: str
    input_tokens: int
    output_tokens: int
    count_source: int
    units: tuple[tuple[str, int], ...] = ()
    price: Price | None = None
    """Where the plan says that the client is told."""

    @property
    def trailers(self) -> tuple[tuple[str, str], ...]:
        """The same for a call's end."""
        if self.price is None:
            return ()
        return ("taximeter-price", self.price.cost), ("taximeter-balance", self.price.balance)


@dataclass(frozen=True, slots=True)
class Price:
    """What a request cost, and what its tenant has left, as amounts with their currency. Where the cost depends on what the
    month has seen, it is the most that it can be; the balance is the ledger's last word, less this request."""

    cost: str
    balance: str


def tell_usage(response: ModelInferResponse, usage: Usage) -> None:
    """Put the usage into a response's parameters."""
    parameters = response.parameters
    parameters["taximeter_request_id"].string_param = usage.request_id
    parameters["taximeter_input_tokens"].int64_param = usage.input_tokens
    parameters["taximeter_output_tokens"].int64_param = usage.output_tokens
    parameters["taximeter_count_source"].string_param = _SOURCES[usage.count_source]
    for unit, quantity in usage.units:
        parameters[f"taximeter_{unit}"].int64_param = quantity
    if usage.price is not None:
        parameters["taximeter_price"].string_param = usage.price.cost
        parameters["taximeter_balance"].string_param = usage.price.balance


def new_event(
    parts: MeterParts, key: KeyView, request_id: str, model: str, operation: int, client_id: str, span: str = ""
) -> UsageEvent:
    """A usage event that starts now, without quantities; `span`: the gateway's, where the request is traced."""
    started_ms = now_ms()
    return UsageEvent(
        attributes={TRACEPARENT: span} if span else None,
        request_id=request_id,
        tenant_id=key.tenant_id,
        project_id=key.project_id,
        user_id=key.user_id,
        api_key_id=key.key_id,
        model=model[:ID_CHARS_MAX],
        operation=operation,  # type: ignore[arg-type]
        # The protocol has no word for another class.
        service_class=SERVICE_CLASS_TEST if key.test else SERVICE_CLASS_STANDARD,
        started_ms=started_ms,
        ended_ms=started_ms,
        server_id=parts.server_id,
        region=parts.region,
        client_request_id=client_id[:ID_CHARS_MAX],
    )


class RequestMeter:
    """One request that was admitted."""

    # How every one begins.

    is_too_long = False
    """Why the last `progress` or `try_close` that was in vain was: the limit, or else the money. Of a `close`, that what it
    billed is over the limit."""
    _open: OpenRequest | None = None
    _bill: Receipt | None = None
    """As the journal has it, once it was handed in."""
    _first_token_ms = 0
    _forwarded = False
    _closed = False
    _any_covered = False
    """Whether any count of the answer was within money and limit yet."""
    _settled_parts = _settled_tokens = 0
    """Of the text that was delivered: parts counted for good, and their tokens."""

    def __init__(
        self,
        parts: MeterParts,
        event: UsageEvent,
        profile: ModelProfile,
        prepared: PreparedRequest,
        counter: AnswerCounter,
        prompt_count: TextCount | None,
        money: RequestMoney | None = None,
        price_of: Callable[[UsageEvent], Price] | None = None,
        output_tokens_max: int = 0,
    ) -> None:
        """`output_tokens_max`: what the answer may have, whatever the back end makes of it; 0: no limit."""
        self.counter = counter
        self.output_tokens_max = output_tokens_max
        self._money = money
        self._price_of = price_of
        self._parts = parts
        self._event = event
        self._profile = profile
        self._prepared = prepared
        self._prompt_count = prompt_count
        self._started = time.monotonic()

    async def open(self) -> None:
        """Put the request into the journal. Raises the producer's errors; then nothing may be forwarded."""
        self._event.outcome = OUTCOME_INTERRUPTED
        self._open = self._parts.meter.open(self._event)
        if not self._open.receipt.is_durable:
            await self._open.receipt.wait(self._parts.durable_timeout_s)

    @property
    def is_closed(self) -> bool:
        """Whether the bill is durable. As long as it is not, somebody must `close`, whoever waited before."""
        return self._closed

    @property
    def _is_handed_in(self) -> bool:
        return self._bill is not None and not self._bill.has_failed

    @property
    def tokens(self) -> int:
        """Of prompt and answer, as far as they are known."""
        return self._event.uncached_input_tokens + self._event.output_tokens

    async def recount(self) -> tuple[int, int] | None:
        """The answer's tokens as the back end counted them, and as the tokenizer does; None where one of them cannot."""
        counted = self.counter.counted()
        if counted.output_tokens is None or not counted.text_parts or self._event.outcome != OUTCOME_COMPLETED:
            return None
        again = await self._count(self.counter.texts(), Framing.OUTPUT)
        return (counted.output_tokens, again.tokens) if again.exact else None

    def forwarded(self) -> None:
        """From here on the request costs."""
        self._forwarded = True

    def saw_response(self) -> None:
        """A response has come; the first one's time is kept."""
        if not self._first_token_ms:
            self._first_token_ms = max(1, self._elapsed_ms())

    def _elapsed_ms(self) -> int:
        return min(int((time.monotonic() - self._started) * 1000), 2**32 - 1)

    async def progress(self, delivered: Counted) -> bool:
        """Return when `delivered` is durable: the responses that it counts may leave then.

        False: it is not paid for, or is longer than it may be. Then nothing of it counts, none of it may leave, and
        `close_as_delivered` bills the request.
        """
        input_tokens, output_tokens = delivered.input_tokens, delivered.output_tokens
        exact = input_tokens is not None and output_tokens is not None
        if input_tokens is None:
            input_tokens = (await self._count_prompt()).tokens
        if output_tokens is None:
            output_tokens = await self._delivered_text_tokens(delivered.text_parts)
        source = COUNT_SOURCE_BACKEND if exact else COUNT_SOURCE_ESTIMATE
        if not self._try_fill(input_tokens, output_tokens, delivered.units, source):
            return False
        assert self._open is not None, "progress comes after open"
        await self._open.progress(self._event).wait(self._parts.durable_timeout_s)
        return True

    async def _count_prompt(self) -> TextCount:
        if self._prompt_count is None or not self._prompt_count.exact:
            self._prompt_count = await self._count(self._prepared.prompts, self._prepared.framing)
        return self._prompt_count

    async def _count(self, texts: Iterable[str], framing: Framing) -> TextCount:
        tokenizer = self._profile.tokenizer
        if tokenizer is None:
            # The back end counts for this model, and it has not spoken.
            return _UNKNOWN
        return await self._parts.tokens.count_all(tokenizer, texts, framing, self._event.tenant_id)

    async def _delivered_text_tokens(self, parts: int) -> int:
        """The tokens of the text so far, in windows, so that a long answer is not counted anew with every chunk."""
        window = self.counter.texts(self._settled_parts, parts)
        tokens = (await self._count(window, Framing.OUTPUT)).tokens
        total = self._settled_tokens + tokens
        if sum(map(len, window)) > _WINDOW_CHARS:
            self._settled_parts, self._settled_tokens = parts, total
        return total

    def _fill(self, input_tokens: int, output_tokens: int, units: Sequence[int], source: int) -> None:
        event = self._event
        if units:
            del event.units[:]
            for rule, quantity in zip(self._profile.units, units, strict=True):
                if quantity:
                    event.units.add(unit=rule.unit, quantity=quantity)
        event.uncached_input_tokens = event.context_tokens = input_tokens
        event.output_tokens = output_tokens
        event.count_source = source  # type: ignore[assignment]
        event.latency_ms = self._elapsed_ms()
        event.time_to_first_token_ms = self._first_token_ms
        # The wall clock may have been set back since the start.
        event.ended_ms = max(now_ms(), event.started_ms)

    def _try_fill(self, input_tokens: int, output_tokens: int, units: Sequence[int], source: int) -> bool:
        """Fill in counts if the answer may be so long and the money covers them; else leave those before, of which the first is
        the prompt alone."""
        money = self._money
        covered = not (is_too_long := self._exceeds_limit(output_tokens, source))
        if money is None and covered:
            self._fill(input_tokens, output_tokens, units, source)
        elif money is not None and covered:
            before = UsageEvent()
            before.CopyFrom(self._event)
            self._fill(input_tokens, output_tokens, units, source)
            covered = money.covers(self._event)
            if not covered:
                self._event.CopyFrom(before)
        if covered:
            self._any_covered = True
            return True
        self.is_too_long = is_too_long
        if not self._any_covered:
            self._fill(input_tokens, 0, (0,) * len(units), source)
        return False

    def _exceeds_limit(self, output_tokens: int, source: int) -> bool:
        longest = self.output_tokens_max
        if not longest or output_tokens <= longest:
            return False
        return source == COUNT_SOURCE_BACKEND or output_tokens > longest + longest // _RECOUNT_SLACK + 1

    def _flag_length(self, output_tokens: int, source: int) -> None:
        """An answer that is billed whatever its length says so where that is more than it may be."""
        self.is_too_long = self._exceeds_limit(output_tokens, source)
        if self.is_too_long:
            self._event.attributes[OUTPUT_TOKENS_MAX] = str(self.output_tokens_max)

    def _was_cut(self, input_tokens: int) -> bool:
        """Whether the back end saw less of the prompt than was counted before it was forwarded."""
        count = self._prompt_count
        return self._forwarded and count is not None and count.exact and input_tokens < count.tokens

    async def try_close(self, outcome: int) -> Usage | None:
        """As `close`, but None where the responses so far are not paid for, or longer than they may be: none of those that no
        progress counted may leave, and `close_as_delivered` bills the request."""
        return await self._close(outcome, covered_only=True)

    async def close_as_delivered(self, outcome: int) -> Usage:
        """Bill what the last progress counted, and return when that is durable."""
        await self._hand_in(outcome).wait(self._parts.durable_timeout_s)
        return self._usage()

    async def close(self, outcome: int) -> Usage:
        """Count what the responses so far brought, and return when the bill is durable. Later calls change nothing, unless
        the journal failed: they wait for the same bill."""
        usage = await self._close(outcome, covered_only=False)
        assert usage is not None, "whatever it costs"
        return usage

    async def _close(self, outcome: int, *, covered_only: bool) -> Usage | None:
        counted = self.counter.counted()
        input_tokens, output_tokens = counted.input_tokens, counted.output_tokens
        source: int = COUNT_SOURCE_BACKEND
        units = counted.units
        if not self._forwarded:
            input_tokens = output_tokens = 0
            units = (0,) * len(units)
        if input_tokens is None:
            count = await self._count_prompt()
            input_tokens = count.tokens
            source = _weaker(source, count)
        elif outcome == OUTCOME_COMPLETED and self._was_cut(input_tokens):
            outcome = OUTCOME_TRUNCATED
        if output_tokens is None:
            count = await self._count(self.counter.texts(), Framing.OUTPUT) if counted.text_parts else _NOTHING
            output_tokens = count.tokens
            source = _weaker(source, count)
        if not self._is_handed_in:
            if not covered_only:
                self._fill(input_tokens, output_tokens, units, source)
                self._flag_length(output_tokens, source)
            elif not self._try_fill(input_tokens, output_tokens, units, source):
                return None
            if source == COUNT_SOURCE_TOKENIZER and self._profile.tokenizer is not None:
                self._event.tokenizer = self._parts.tokens.fingerprint(self._profile.tokenizer)
        await self._hand_in(outcome).wait(self._parts.durable_timeout_s)
        return self._usage()

    def _hand_in(self, outcome: int) -> Receipt:
        """Hand the bill in, if it is not; what says when it is durable."""
        event = self._event
        assert self._open is not None, "close comes after open"
        if not self._is_handed_in:
            event.outcome = outcome  # type: ignore[assignment]
            self._bill = self._open.close(event)
        assert self._bill is not None, "it is handed in"
        return self._bill

    def _usage(self) -> Usage:
        """What is billed, durably. Whoever waited may have been cancelled, or have waited too long: what hangs on the bill, its
        money first, is done by whoever sees first that it is durable."""
        event = self._event
        if not self._closed:
            self._closed = True
            if self._money is not None:
                self._money.settle(event)
            if self._parts.genai is not None:
                self._parts.genai.observe(event)
            tell_end(self._parts, event)
        told = tuple([(entry.unit, entry.quantity) for entry in event.units]) if self._profile.units else ()
        price = None if self._price_of is None else self._price_of(event)
        return Usage(event.request_id, event.uncached_input_tokens, event.output_tokens, event.count_source, told, price)


def tell_end(parts: MeterParts, event: UsageEvent) -> None:
    """A request has ended, or was refused: for whoever looks for one. Lines of a log only at its most talkative, as there are
    thousands a second."""
    if parts.on_end is not None:
        parts.on_end(event)
    if _LOG.isEnabledFor(logging.DEBUG):
        outcome = Outcome.Name(event.outcome).removeprefix("OUTCOME_").lower()
        names = {"request_id": event.request_id, "tenant_id": event.tenant_id, "model": event.model, "outcome": outcome}
        traced = {"traceparent": event.attributes[TRACEPARENT]} if TRACEPARENT in event.attributes else {}
        _LOG.debug("request %s of tenant %s: %s", event.request_id, event.tenant_id, outcome, extra={**names, **traced})


def _weaker(source: int, count: TextCount) -> int:
    """The event names its least certain count."""
    return max(source, COUNT_SOURCE_TOKENIZER if count.exact else COUNT_SOURCE_ESTIMATE)
