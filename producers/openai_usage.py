"""What OpenAI-shaped requests ask and answers say: pure, bounded, and the same for every server that speaks so.

OpenAI's `prompt_tokens` and `completion_tokens` are sums; Taximeter's classes are disjoint:

    prompt_tokens     = uncached input + cached_tokens (cache read) + audio_tokens (audio input)
    completion_tokens = output + reasoning_tokens + audio_tokens (audio output)

The Responses API calls them input_tokens and output_tokens. A server says the usage of a stream only if the request asks for it
(`stream_options.include_usage`), so `prepare` asks, and `EventStream` takes out again what the client did not ask for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from billing.limits import QUANTITY_MAX
from billing.v1.usage_pb2 import OPERATION_CHAT, OPERATION_EMBEDDINGS, OPERATION_GENERATE
from producers.calls import Used

__all__ = ["OPERATIONS", "EventStream", "OpenAIRequest", "prepare", "read_answer"]

OPERATIONS: Final[Mapping[str, int]] = {
    "/v1/chat/completions": OPERATION_CHAT,
    "/v1/completions": OPERATION_GENERATE,
    "/v1/embeddings": OPERATION_EMBEDDINGS,
    "/v1/responses": OPERATION_CHAT,
}
# Of those, where the stream's last event has the usage whether or not it is asked for.
_ALWAYS_SAYS: Final = frozenset({"/v1/responses"})
# What pydantic takes for true beside 1, in either case: most servers read requests with it.
_TRUE_WORDS: Final = frozenset({"1", "on", "t", "true", "y", "yes"})
_EVENT_BYTES_MAX: Final = 16 << 20
_DONE: Final = b"[DONE]"
_BLANK_LINES: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """What must be known of a request while it is answered."""

    body: bytes
    """As the server gets it."""
    model: str
    hides_usage: bool
    """The stream's usage was asked for here, not by the client."""


def _parse(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def prepare(path: str, body: bytes, *, continuous: bool) -> OpenAIRequest:
    """Make a streaming request ask for its usage: with the last event, or, as vLLM can, `continuous`ly with each."""
    request = _parse(body)
    if request is None:
        # The server will say what is wrong with it.
        return OpenAIRequest(body, "", hides_usage=False)
    model = request.get("model")
    # Half a surrogate pair is in no name.
    model = model if isinstance(model, str) and model.isprintable() else ""
    if not _is_true(request.get("stream")) or path in _ALWAYS_SAYS:
        return OpenAIRequest(body, model, hides_usage=False)
    options = request.get("stream_options")
    options = options if isinstance(options, dict) else {}
    asked = _is_true(options.get("include_usage"))
    wanted = {**options, "include_usage": True}
    if continuous and not asked:
        wanted["continuous_usage_stats"] = True
    if wanted != options:
        try:
            body = json.dumps({**request, "stream_options": wanted}).encode()
        except RecursionError:
            # Nested more deeply than it can be written again: the server will refuse it.
            return OpenAIRequest(body, model, hides_usage=False)
    return OpenAIRequest(body, model, hides_usage=not asked)


def _is_true(value: object) -> bool:
    """Whether a server may take it for true: one that streams is asked for its usage."""
    if isinstance(value, str):
        return value.lower() in _TRUE_WORDS
    return isinstance(value, int | float) and value == 1


def read_answer(body: bytes) -> Used | None:
    """The usage of an answer that is one JSON document; None where it says none."""
    answer = _parse(body)
    return None if answer is None else _used(answer)


def _used(answer: Mapping[str, Any]) -> Used | None:
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        # The Responses API's last event holds the whole response.
        inner = answer.get("response")
        usage = inner.get("usage") if isinstance(inner, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt = _count(usage, "prompt_tokens") or _count(usage, "input_tokens")
    completion = _count(usage, "completion_tokens") or _count(usage, "output_tokens")
    prompt_details = _details(usage, "prompt_tokens_details", "input_tokens_details")
    completion_details = _details(usage, "completion_tokens_details", "output_tokens_details")
    # Parts beyond their sum are a server's mistake; the sum is what it says that it counted.
    cached = min(_count(prompt_details, "cached_tokens"), prompt)
    audio_in = min(_count(prompt_details, "audio_tokens"), prompt - cached)
    reasoning = min(_count(completion_details, "reasoning_tokens"), completion)
    audio_out = min(_count(completion_details, "audio_tokens"), completion - reasoning)
    return Used(
        uncached_input_tokens=prompt - cached - audio_in,
        cache_read_tokens=cached,
        audio_input_tokens=audio_in,
        output_tokens=completion - reasoning - audio_out,
        reasoning_tokens=reasoning,
        audio_output_tokens=audio_out,
    )


def _details(usage: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    return next((usage[name] for name in names if isinstance(usage.get(name), dict)), {})


def _count(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= QUANTITY_MAX
    return value if is_count else 0  # type: ignore[return-value]  # it is an int then


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One server-sent event: its bytes as the client gets them (empty: it does not), and whether the answer ends with it."""

    data: bytes
    ends: bool = False


class EventStream:
    """Cuts a stream of server-sent events into events, and reads the usage that any of them says; the latest holds."""

    def __init__(self, *, hides_usage: bool) -> None:
        self.used: Used | None = None
        self._hides_usage = hides_usage
        self._rest = bytearray()
        # Up to here there is no blank line.
        self._searched = 0
        # Whether the server has said that it failed.
        self.failed = False
        # An event that is too large to be read leaves as it comes.
        self._passing = False

    def feed(self, chunk: bytes) -> list[StreamEvent]:
        """The events that `chunk` completes."""
        self._rest += chunk
        events = []
        while (end := _event_end(self._rest, self._searched)) > 0:
            raw = bytes(self._rest[:end])
            del self._rest[:end]
            self._searched = 0
            events.append(StreamEvent(raw) if self._passing else self._event(raw))
            self._passing = False
        self._searched = max(0, len(self._rest) - 3)
        if len(self._rest) > _EVENT_BYTES_MAX:
            self._passing = True
            events.append(StreamEvent(self._take_rest()))
        return events

    def finish(self) -> list[StreamEvent]:
        """What was left when the stream ended without a last blank line."""
        rest = self._take_rest()
        if not rest:
            return []
        return [StreamEvent(rest) if self._passing else self._event(rest)]

    def _take_rest(self) -> bytes:
        rest = bytes(self._rest)
        self._rest.clear()
        self._searched = 0
        return rest

    def _event(self, raw: bytes) -> StreamEvent:
        data = b"\n".join(line[5:].strip() for line in raw.splitlines() if line.startswith(b"data:"))
        if data == _DONE:
            return StreamEvent(raw, ends=True)
        if (b'"usage"' not in data and b'"error"' not in data) or (answer := _parse(data)) is None:
            return StreamEvent(raw)
        self.failed |= bool(answer.get("error"))
        self.used = _used(answer) or self.used
        if not self._hides_usage or "usage" not in answer:
            return StreamEvent(raw)
        del answer["usage"]
        if answer.get("choices") == []:
            return StreamEvent(b"")
        try:
            shown = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
        except RecursionError:
            return StreamEvent(raw)
        return StreamEvent(b"data: " + shown.encode("utf-8", "surrogatepass") + b"\n\n")


def _event_end(buffer: bytearray, start: int) -> int:
    """Behind the first blank line after `start`; 0 where there is none yet."""
    ends = [found + len(blank) for blank in _BLANK_LINES if (found := buffer.find(blank, start)) >= 0]
    return min(ends, default=0)
