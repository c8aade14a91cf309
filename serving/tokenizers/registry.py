"""Count a text's tokens as a model does, without holding up the event loop.

One tokenizer a model, loaded when the registry is made: a tokenizer that is missing or unreadable stops the start, and
no request ever loads or fetches one. Counts run on a few threads; how many may wait is bounded, and so are a text's
length and the cache. The cache knows a text by a hash of all of it, because counts of a prefix and a rest do not add; and by
whose it is, or how long an answer takes would tell one tenant what another has sent.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Self

from serving.tokenizers.errors import (
    TextTooLongError,
    TokenizerBusyError,
    TokenizerError,
    TokenizerLoadError,
    UnknownModelError,
)
from serving.tokenizers.hub import locate
from serving.tokenizers.loading import Framing, ModelTokenizer, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["RegistrySettings", "TokenizerRegistry", "TokenizerSettings"]


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """Which tokenizer stands for a model: a directory, a tokenizer.json, a GGUF file, or its name on the hub."""

    model: str
    path: Path
    fingerprint: str = ""
    """What it must be; empty: whatever is there."""


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """The bounds of counting."""

    threads: int = 2
    max_pending: int = 1024
    cache_entries: int = 65_536
    max_text_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("max_pending", 1), ("cache_entries", 0), ("max_text_bytes", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}: {value}: must be at least {least}")


class TokenizerRegistry:
    """The tokenizers of all metered models. Use it from one event loop; `close` it when done."""

    def __init__(self, tokenizers: Iterable[TokenizerSettings], settings: RegistrySettings | None = None) -> None:
        self._settings = settings or RegistrySettings()
        self._models: dict[str, ModelTokenizer] = {}
        # Several model names often share one tokenizer, and a vocabulary is tens of megabytes.
        loaded: dict[Path, ModelTokenizer] = {}
        for entry in tokenizers:
            if entry.model in self._models:
                raise ValueError(f"model: {entry.model!r}: has two tokenizers: name one")
            path = locate(entry.path)
            if path not in loaded:
                loaded[path] = load_tokenizer(path)
            found = loaded[path].fingerprint
            if entry.fingerprint not in ("", found):
                raise TokenizerLoadError(
                    entry.path,
                    f"its fingerprint is {found}, and {entry.model!r} is to have {entry.fingerprint}",
                    "bring back the tokenizer that was recorded, or record this one if the model changed with it",
                )
            self._models[entry.model] = loaded[path]
        self._pool = ThreadPoolExecutor(self._settings.threads, thread_name_prefix="tokenizer")
        self._slots = threading.BoundedSemaphore(self._settings.max_pending)
        self._cache: OrderedDict[tuple[str, str, Framing, bytes], int] = OrderedDict()
        self.cache_hits = 0
        self.cache_misses = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let counts that run finish, drop those that wait."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def models(self) -> frozenset[str]:
        """The models that have a tokenizer."""
        return frozenset(self._models)

    def tokenizer(self, model: str) -> ModelTokenizer:
        """The model's tokenizer; its own methods block."""
        found = self._models.get(model)
        if found is None:
            raise UnknownModelError(model, sorted(self._models))
        return found

    def fingerprint(self, model: str) -> str:
        """sha256 over what defines the model's tokenizer."""
        return self.tokenizer(model).fingerprint

    def upper_bound(self, model: str, text: str, framing: Framing = Framing.PROMPT) -> int | None:
        """A cheap number that `count` never exceeds; None where only counting can tell."""
        return self.tokenizer(model).upper_bound(text, framing)

    async def count(self, model: str, text: str, framing: Framing = Framing.PROMPT, *, owner: str = "") -> int:
        """How many tokens the model sees in the text, framed as said; what is known of it is its owner's."""
        tokenizer = self.tokenizer(model)
        key = (owner, tokenizer.fingerprint, framing, self._digest(text))
        cached = self._cache.get(key)
        if cached is not None:
            self._cache.move_to_end(key)
            self.cache_hits += 1
            return cached
        self.cache_misses += 1
        if not self._slots.acquire(blocking=False):
            raise TokenizerBusyError(f"max_pending: {self._settings.max_pending} counts wait: try again, or raise max_pending")
        try:
            future = self._pool.submit(tokenizer.count, text, framing)
        except RuntimeError as error:
            self._slots.release()
            raise TokenizerError("the registry is closed: make a new one") from error
        # Runs when the count is done and when a caller's cancel reached it before it began.
        future.add_done_callback(self._release)
        count = await asyncio.wrap_future(future)
        if self._settings.cache_entries:
            self._cache[key] = count
            if len(self._cache) > self._settings.cache_entries:
                self._cache.popitem(last=False)
        return count

    def _release(self, _: Future[int]) -> None:
        self._slots.release()

    def _digest(self, text: str) -> bytes:
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"text: lone surrogate at {error.start}: decode it strictly as UTF-8") from error
        if len(encoded) > self._settings.max_text_bytes:
            raise TextTooLongError(
                f"text: {len(encoded)} bytes: at most max_text_bytes = {self._settings.max_text_bytes} are counted"
            )
        return blake2b(encoded, digest_size=16).digest()
