"""Counting with the models' own tokenizers, in a form that cannot fail a request that has already run.

A text that is too long to count in one piece is counted in pieces, and the sum is called an estimate: pieces do not add
exactly. Every count runs off the event loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from serving.tokenizers import (
    ChatTemplateError,
    Framing,
    RegistrySettings,
    TextTooLongError,
    TokenizerRegistry,
    TokenizerSettings,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["TextCount", "TokenCounts", "make_registry"]

_PIECE_CHARS: Final = 200_000


@dataclass(frozen=True, slots=True)
class TextCount:
    """A text's tokens."""

    tokens: int
    exact: bool


def make_registry(tokenizers: Mapping[str, Path], fingerprints: Mapping[str, str], requests_max: int) -> TokenizerRegistry:
    """Load all tokenizers, each with the fingerprint that was recorded, if one was. A request waits for at most one count at a
    time, so none is ever refused for a full queue."""
    return TokenizerRegistry(
        (TokenizerSettings(name, path, fingerprints.get(name, "")) for name, path in tokenizers.items()),
        RegistrySettings(max_pending=2 * requests_max + 64),
    )


class TokenCounts:
    """The gateway's view of the tokenizers, by name."""

    def __init__(self, registry: TokenizerRegistry) -> None:
        self._registry = registry

    def bound(self, tokenizer: str | None, text: str, framing: Framing) -> int | None:
        """A number of tokens that the text never exceeds, without counting; None where only counting can tell. Without a
        tokenizer it is the text's bytes: no model splits finer."""
        if tokenizer is None:
            return len(text.encode())
        try:
            return self._registry.upper_bound(tokenizer, text, framing)
        except ChatTemplateError:
            return None

    def bound_all(self, tokenizer: str | None, texts: Iterable[str], framing: Framing) -> int | None:
        """The same for several texts that the model sees one by one."""
        total = 0
        for text in texts:
            bound = self.bound(tokenizer, text, framing)
            if bound is None:
                return None
            total += bound
        return total

    async def count_all(self, tokenizer: str, texts: Iterable[str], framing: Framing, owner: str) -> TextCount:
        """How many tokens the texts of a tenant have, counted one by one."""
        tokens, exact = 0, True
        for text in texts:
            count = await self.count(tokenizer, text, framing, owner)
            tokens += count.tokens
            exact = exact and count.exact
        return TextCount(tokens, exact)

    async def count(self, tokenizer: str, text: str, framing: Framing, owner: str) -> TextCount:
        """How many tokens the text of a tenant has."""
        try:
            return TextCount(await self._registry.count(tokenizer, text, framing, owner=owner), True)
        except ChatTemplateError:
            return TextCount(await self._registry.count(tokenizer, text, Framing.PROMPT, owner=owner), False)
        except TextTooLongError:
            tokens = 0
            for start in range(0, len(text), _PIECE_CHARS):
                piece = text[start : start + _PIECE_CHARS]
                tokens += await self._registry.count(tokenizer, piece, Framing.OUTPUT, owner=owner)
            return TextCount(tokens, False)

    def fingerprint(self, tokenizer: str) -> str:
        """What a usage event calls the tokenizer."""
        return self._registry.fingerprint(tokenizer)

    def close(self) -> None:
        """Free the threads."""
        self._registry.close()
