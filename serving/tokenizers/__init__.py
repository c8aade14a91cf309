"""The models' own tokenizers: exact counts off the event loop, and a cheap bound from above."""

from serving.tokenizers.errors import (
    ChatTemplateError,
    TextTooLongError,
    TokenizerBusyError,
    TokenizerError,
    TokenizerLoadError,
    TokenizerMismatchError,
    UnknownModelError,
)
from serving.tokenizers.loading import Framing, ModelTokenizer, load_tokenizer
from serving.tokenizers.registry import RegistrySettings, TokenizerRegistry, TokenizerSettings

__all__ = [
    "ChatTemplateError",
    "Framing",
    "ModelTokenizer",
    "RegistrySettings",
    "TextTooLongError",
    "TokenizerBusyError",
    "TokenizerError",
    "TokenizerLoadError",
    "TokenizerMismatchError",
    "TokenizerRegistry",
    "TokenizerSettings",
    "UnknownModelError",
    "load_tokenizer",
]
