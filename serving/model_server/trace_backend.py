"""A model that is none: it reports the token counts that the request names, as the vLLM back end reports its own.

It stands behind the gateway when a recorded trace is replayed: no text is generated, so tens of thousands of requests
cost little, and what is billed can be compared with the trace to the token. A text of one byte a token comes with the
counts. `sampling_parameters` (a JSON object) names `context_tokens`, `output_tokens`, `chunk_tokens` (a response each),
`max_tokens` (the answer is no longer), and, for tests that interrupt, `chunk_delay_ms` before each chunk; `empty_final`
overrides the server's setting.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from serving import kserve
from serving.model_server.errors import RequestError
from serving.model_server.models import STOP_INPUT, Answer, ModelCard, TensorSpec
from serving.model_server.sampling import read_sampling_parameters, to_integer
from serving.model_server.text_backend import OUTPUTS, STOPPED, Wanted, text_response

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from serving.kserve import ModelInferRequest
    from serving.model_server.production import ProductionLog

__all__ = ["TraceModel"]

_INPUTS: Final = (
    TensorSpec("text_input", "BYTES", optional=True),
    TensorSpec("stream", "BOOL", optional=True),
    TensorSpec("sampling_parameters", "BYTES"),
    TensorSpec(STOP_INPUT, "BOOL", optional=True),
    TensorSpec("return_finish_reason", "BOOL", optional=True),
    TensorSpec("return_num_input_tokens", "BOOL", optional=True),
    TensorSpec("return_num_output_tokens", "BOOL", optional=True),
)
_MAX_CONTEXT_TOKENS: Final = 2**32 - 1
_MAX_OUTPUT_TOKENS: Final = 1_000_000
_MAX_CHUNK_DELAY_MS: Final = 60_000
_DEFAULT_CHUNK_TOKENS: Final = 64
_TOKEN: Final = b"."


@dataclass(frozen=True, slots=True)
class _Script:
    context_tokens: int
    output_tokens: int
    chunk_tokens: int
    chunk_delay_ms: int
    empty_final: bool


class TraceModel:
    """Streams as many tokens as it is told."""

    def __init__(self, name: str, log: ProductionLog, *, decoupled: bool, empty_final: bool = False) -> None:
        self._log = log
        self._empty_final = empty_final
        self.card = ModelCard(name=name, decoupled=decoupled, platform="trace", inputs=_INPUTS, outputs=OUTPUTS)

    def _read(self, request: ModelInferRequest) -> _Script:
        parameters = read_sampling_parameters(request)
        known = {"context_tokens", "output_tokens", "max_tokens", "chunk_tokens", "chunk_delay_ms", "empty_final"}
        unknown = sorted(set(parameters) - known)
        if unknown:
            names = ", ".join(sorted(known))
            raise RequestError.invalid(f"sampling_parameters.{unknown[0]}: unknown: known are {names}")
        for name in ("context_tokens", "output_tokens"):
            if name not in parameters:
                raise RequestError.invalid(f"sampling_parameters.{name}: missing: say how many tokens to report")
        empty_final = parameters.get("empty_final", self._empty_final)
        if not isinstance(empty_final, bool):
            raise RequestError.invalid(f"sampling_parameters.empty_final: {empty_final!r}: must be true or false")
        tokens_max = to_integer("max_tokens", parameters.get("max_tokens", _MAX_OUTPUT_TOKENS), 0, _MAX_OUTPUT_TOKENS)
        return _Script(
            context_tokens=to_integer("context_tokens", parameters["context_tokens"], 0, _MAX_CONTEXT_TOKENS),
            output_tokens=min(tokens_max, to_integer("output_tokens", parameters["output_tokens"], 0, _MAX_OUTPUT_TOKENS)),
            chunk_tokens=to_integer(
                "chunk_tokens", parameters.get("chunk_tokens", _DEFAULT_CHUNK_TOKENS), 1, _MAX_OUTPUT_TOKENS
            ),
            chunk_delay_ms=to_integer("chunk_delay_ms", parameters.get("chunk_delay_ms", 0), 0, _MAX_CHUNK_DELAY_MS),
            empty_final=empty_final and self.card.decoupled,
        )

    async def infer(self, request: ModelInferRequest, stop: asyncio.Event) -> AsyncGenerator[Answer, Any]:
        with self._log.account(request.id, self.card.name) as account:
            script = self._read(request)
            wanted = Wanted.read(request)
            stream = self.card.decoupled and bool(kserve.read_bool_input(request, "stream"))
            production = account.production
            production.input_tokens = script.context_tokens
            size = script.chunk_tokens if stream else max(script.output_tokens, 1)
            left = script.output_tokens
            while True:
                if script.chunk_delay_ms:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), script.chunk_delay_ms / 1000)
                if stop.is_set():
                    yield Answer(text_response(wanted, b"", STOPPED, script.context_tokens, 0), final=not script.empty_final)
                    return
                chunk = min(size, left)
                left -= chunk
                production.output_tokens += chunk
                reason = None if left else "stop"
                response = text_response(wanted, _TOKEN * chunk, reason, script.context_tokens, chunk)
                yield Answer(response, final=not left and not script.empty_final)
                production.delivered_tokens += chunk
                if not left:
                    break
            account.complete()
