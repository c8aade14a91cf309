"""SmolLM2 behind the tensors of Triton's vLLM back end.

Inputs and outputs, their shapes and what they mean follow the vLLM back end: `num_input_tokens` is a scalar that every
response repeats, `num_output_tokens` is what is new since the last response, `finish_reason` is the text "None" until
the last one. `chat_template` is ours: true puts `text_input` into the model's chat template as a user's turn, and
num_input_tokens then counts the template too, because the model sees it. `stop` is TensorRT-LLM's: such a request ends the
one that has its ID, whose last response then has the finish reason "cancelled" and the counts of all that was produced.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tritonclient.grpc import service_pb2

from serving import kserve
from serving.model_server.engine import Generation
from serving.model_server.errors import RequestError
from serving.model_server.models import STOP_INPUT, Answer, ModelCard, TensorSpec
from serving.model_server.sampling import read_sampling_parameters, to_llama_options

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator

    from serving.kserve import ModelInferRequest, ModelInferResponse
    from serving.model_server.engine import Engine, Piece
    from serving.model_server.production import ProductionLog

__all__ = ["OUTPUTS", "STOPPED", "TextModel", "Wanted", "text_response"]

_INPUTS: Final = (
    TensorSpec("text_input", "BYTES"),
    TensorSpec("stream", "BOOL", optional=True),
    TensorSpec("sampling_parameters", "BYTES", optional=True),
    TensorSpec("exclude_input_in_output", "BOOL", optional=True),
    TensorSpec("chat_template", "BOOL", optional=True),
    TensorSpec(STOP_INPUT, "BOOL", optional=True),
    TensorSpec("return_finish_reason", "BOOL", optional=True),
    TensorSpec("return_num_input_tokens", "BOOL", optional=True),
    TensorSpec("return_num_output_tokens", "BOOL", optional=True),
)
OUTPUTS: Final = (
    TensorSpec("text_output", "BYTES"),
    TensorSpec("finish_reason", "BYTES"),
    TensorSpec("num_input_tokens", "UINT32"),
    TensorSpec("num_output_tokens", "UINT32"),
)

# The finish reason of an answer that was stopped, as vLLM names it.
STOPPED: Final = "cancelled"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which outputs the request asked for."""

    finish_reason: bool
    num_input_tokens: bool
    num_output_tokens: bool

    @classmethod
    def read(cls, request: ModelInferRequest) -> Wanted:
        return cls(
            finish_reason=bool(kserve.read_bool_input(request, "return_finish_reason")),
            num_input_tokens=bool(kserve.read_bool_input(request, "return_num_input_tokens")),
            num_output_tokens=bool(kserve.read_bool_input(request, "return_num_output_tokens")),
        )


def text_response(
    wanted: Wanted, text: bytes, finish_reason: str | None, input_tokens: int, new_tokens: int
) -> ModelInferResponse:
    """One response's tensors, in the shapes that the vLLM back end gives them."""
    response = service_pb2.ModelInferResponse()
    kserve.add_bytes_output(response, "text_output", [text])
    if wanted.finish_reason:
        kserve.add_bytes_output(response, "finish_reason", [str(finish_reason).encode()])
    if wanted.num_input_tokens:
        kserve.add_integer_output(response, "num_input_tokens", input_tokens, shape=())
    if wanted.num_output_tokens:
        kserve.add_integer_output(response, "num_output_tokens", new_tokens)
    return response


@dataclass(frozen=True, slots=True)
class _Question:
    generation: Generation
    stream: bool
    prepend_input: bool
    wanted: Wanted


class TextModel:
    """A language model as Triton's vLLM back end serves it."""

    def __init__(self, name: str, engine: Engine, log: ProductionLog, *, decoupled: bool, empty_final: bool = False) -> None:
        self._engine = engine
        self._log = log
        self._empty_final = empty_final and decoupled
        self.card = ModelCard(
            name=name,
            decoupled=decoupled,
            platform="llama.cpp",
            inputs=_INPUTS,
            outputs=OUTPUTS,
            parameters={
                "context_tokens": str(engine.settings.context_tokens),
                "max_output_tokens": str(engine.settings.max_output_tokens),
            },
        )

    def _read(self, request: ModelInferRequest) -> _Question:
        settings = self._engine.settings
        prompt = kserve.read_text_input(request, "text_input")
        if prompt is None:
            raise RequestError.invalid("text_input: missing: send the prompt as a BYTES tensor of one element")
        size_bytes = len(prompt.encode())
        if size_bytes > settings.max_prompt_bytes:
            raise RequestError.invalid(
                f"text_input: {size_bytes} bytes: at most max_prompt_bytes = {settings.max_prompt_bytes}"
            )
        chat = bool(kserve.read_bool_input(request, "chat_template"))
        if not prompt and not chat:
            raise RequestError.invalid("text_input: empty: the model needs at least one token")
        stream = bool(kserve.read_bool_input(request, "stream"))
        if stream and not self.card.decoupled:
            raise RequestError.invalid(f"stream: true: {self.card.name} answers once: use its decoupled twin")
        exclude = kserve.read_bool_input(request, "exclude_input_in_output")
        prepend = not stream if exclude is None else not exclude
        if prepend and stream:
            raise RequestError.invalid("When streaming, `exclude_input_in_output` = False is not allowed.")
        options = to_llama_options(read_sampling_parameters(request), settings.max_output_tokens)
        return _Question(Generation(prompt, chat, options), stream, prepend, Wanted.read(request))

    async def infer(self, request: ModelInferRequest, stop: asyncio.Event) -> AsyncGenerator[Answer, Any]:
        with self._log.account(request.id, self.card.name) as account:
            question = self._read(request)
            pieces = self._engine.generate(question.generation, account.ended, stop)
            account.await_end()
            async with aclosing(pieces):
                stopped = False
                async for answer, tokens, reason in self._answers(question, pieces):
                    stopped = reason == STOPPED
                    yield answer
                    # Whoever asks for the next answer has handed this one over.
                    account.production.delivered_tokens += tokens
            if not stopped:
                account.complete()

    async def _answers(
        self, question: _Question, pieces: AsyncGenerator[Piece, None]
    ) -> AsyncGenerator[tuple[Answer, int, str | None], None]:
        """The answers, how many tokens each brings, and why the last one is the last."""
        texts = [question.generation.prompt] if question.prepend_input else []
        tokens = input_tokens = 0
        reason = None
        async for piece in pieces:
            tokens += piece.new_tokens
            input_tokens, reason = piece.input_tokens, piece.finish_reason
            texts.append(piece.text)
            if question.stream or reason is not None:
                text = "".join(texts).encode()
                response = text_response(question.wanted, text, reason, input_tokens, tokens)
                yield Answer(response, final=reason is not None and not self._empty_final), tokens, reason
                texts, tokens = [], 0
