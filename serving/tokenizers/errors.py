"""What can go wrong with a tokenizer.

TokenizerError
├── TokenizerLoadError     at start: a file is missing, unreadable or of an unknown kind
├── TokenizerMismatchError at start: it is not the one that the model has
├── UnknownModelError      no tokenizer is registered for the model
├── ChatTemplateError      the model has no chat template, or it cannot be rendered
├── TextTooLongError       more bytes than the registry counts
└── TokenizerBusyError     too many counts are waiting
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "ChatTemplateError",
    "TextTooLongError",
    "TokenizerBusyError",
    "TokenizerError",
    "TokenizerLoadError",
    "TokenizerMismatchError",
    "UnknownModelError",
]


class TokenizerError(Exception):
    """Any error of this package."""


class TokenizerLoadError(TokenizerError):
    """A tokenizer that cannot be loaded: where it was looked for, what is wrong, and the mend."""

    def __init__(self, path: Path, what: str, mend: str) -> None:
        super().__init__(f"tokenizer at {path}: {what}: {mend}")
        self.path = path


class TokenizerMismatchError(TokenizerError):
    """Tokenizers that are not those of the models whose back ends were asked: a sentence for each, with the mend."""

    def __init__(self, *differences: str) -> None:
        super().__init__("; ".join(differences))
        self.differences = differences


class UnknownModelError(TokenizerError, KeyError):
    """No tokenizer stands for the model."""

    def __init__(self, model: str, known: list[str]) -> None:
        super().__init__(model)
        self.model = model
        self._known = known

    def __str__(self) -> str:
        return f"model {self.model!r} has no tokenizer: register one of its own; registered: {', '.join(self._known)}"


class ChatTemplateError(TokenizerError, ValueError):
    """The text cannot be put into the model's chat template."""


class TextTooLongError(TokenizerError, ValueError):
    """The text is longer than `max_text_bytes`."""


class TokenizerBusyError(TokenizerError):
    """More counts wait than `max_pending`; the caller may try again or take the back end's count."""
