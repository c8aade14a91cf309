"""Who asks what in the demonstration. Prompts in several languages, code and emoji: where counting goes wrong if it
does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["OVERSIZED", "PROMPTS", "PROMPT_TOKENS_MAX", "TENANTS", "Prompt", "Tenant"]

PROMPT_TOKENS_MAX: Final = 400


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer of the demonstration."""

    tenant_id: str
    name: str
    credit: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request; `streamed`: token by token, from the model that streams."""

    tenant_id: str
    language: str
    text: str
    streamed: bool
    output_tokens_max: int = 24


TENANTS: Final = (
    Tenant("aurora", "Aurora Books", "5.00"),
    Tenant("kaiyuan", "Kaiyuan 开源", "2.50"),
    Tenant("mercado", "Mercado Libro", "1"),
)

PROMPTS: Final = (
    Prompt("aurora", "English", "Gravity is the force by which a planet", streamed=True),
    Prompt("aurora", "code", "def fibonacci(n):\n    ", streamed=False),
    Prompt("aurora", "emoji", "Translate to words: 🚕💨🌍 means", streamed=True),
    Prompt("kaiyuan", "Chinese", "人工智能的未来是", streamed=True),
    Prompt("kaiyuan", "Chinese", "请用一句话介绍北京。", streamed=False),
    Prompt("mercado", "Spanish", "La inteligencia artificial nos ayuda a", streamed=True),
    Prompt("mercado", "German", "Die Hauptstadt von Frankreich heißt", streamed=False),
)

# Over PROMPT_TOKENS_MAX by any tokenizer: it must be refused before the model sees it.
OVERSIZED: Final = Prompt("aurora", "English", "Count to a very large number, slowly. " * 120, streamed=False)
