"""The tokenizer that a GGUF file carries, as a fast tokenizer, without reading the weights.

Only the metadata at the head of the file is read; every length in it is checked against the file before it is used.
Byte-level BPE with a pre-tokenizer that is known here is supported; another one is an error at start, because a split
that is nearly right gives counts that are nearly right.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from serving.tokenizers.errors import TokenizerLoadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["GgufTokenizer", "load_gguf_tokenizer", "read_gguf_metadata"]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
# Little-endian scalars by GGUF's type number; 8 is a string, 9 an array.
_SCALARS: Final[dict[int, struct.Struct]] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING: Final = 8
_ARRAY: Final = 9
_MAX_ENTRIES: Final = 4096
_MAX_ELEMENTS: Final = 4_000_000
_MAX_STRING_BYTES: Final = 16 << 20
_UINT32: Final = struct.Struct("<I")
_UINT64: Final = struct.Struct("<Q")

# llama.cpp's numbers for kinds of tokens.
_CONTROL: Final = 3
_USER_DEFINED: Final = 4


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """A fast tokenizer and what a model's metadata says about its use."""

    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: dict[str, str]
    fingerprint: str


class _Reader:
    """Bounds-checked little-endian reads from the head of a file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._left = size

    def fail(self, what: str) -> TokenizerLoadError:
        return TokenizerLoadError(
            self._path, f"at byte {self._file.tell()}: {what}", "use a complete GGUF file, version 2 or 3"
        )

    def take(self, size: int) -> bytes:
        if size > self._left:
            raise self.fail(f"{size} bytes wanted, {self._left} left")
        self._left -= size
        return self._file.read(size)

    def scalar(self, kind: struct.Struct) -> Any:
        return kind.unpack(self.take(kind.size))[0]

    def string(self) -> bytes:
        size: int = self.scalar(_UINT64)
        if size > _MAX_STRING_BYTES:
            raise self.fail(f"a string of {size} bytes, at most {_MAX_STRING_BYTES} are read")
        return self.take(size)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalar(_UINT32), self.scalar(_UINT64)
            if count > _MAX_ELEMENTS:
                raise self.fail(f"an array of {count} elements, at most {_MAX_ELEMENTS} are read")
            if element == _STRING:
                return [self.string() for _ in range(count)]
            scalar = self._scalar_of(element)
            return list(struct.unpack(f"<{count}{scalar.format[1:]}", self.take(count * scalar.size)))
        return self.scalar(self._scalar_of(kind))

    def _scalar_of(self, kind: int) -> struct.Struct:
        scalar = _SCALARS.get(kind)
        if scalar is None:
            raise self.fail(f"value type {kind} is not known")
        return scalar


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """The key-value pairs at the head of the file; strings as bytes."""
    try:
        with path.open("rb") as file:
            reader = _Reader(path, file, path.stat().st_size)
            if reader.take(4) != _MAGIC:
                raise reader.fail("the file does not start with GGUF")
            version = reader.scalar(_UINT32)
            if version not in _VERSIONS:
                raise reader.fail(f"version {version}")
            reader.scalar(_UINT64)  # tensors, which are not read
            entries = reader.scalar(_UINT64)
            if entries > _MAX_ENTRIES:
                raise reader.fail(f"{entries} metadata entries, at most {_MAX_ENTRIES} are read")
            metadata: dict[str, Any] = {}
            for _ in range(entries):
                key = reader.string().decode()
                metadata[key] = reader.value(reader.scalar(_UINT32))
            return metadata
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerLoadError(path, str(error), "use a readable, complete GGUF file") from error


def _byte_level(*splits: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


# tokenizer.ggml.pre names the split before the merges. Only what a test compares with llama.cpp stands here.
_PRE_TOKENIZERS: Final[dict[str, Callable[[], pre_tokenizers.PreTokenizer]]] = {
    "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True)),
}


def _fingerprint(metadata: dict[str, Any]) -> str:
    digest = hashlib.sha256(b"gguf\0")
    for key in sorted(metadata):
        if key.startswith("tokenizer."):
            text = f"{key}\0{metadata[key]!r}\0".encode()
            digest.update(_UINT64.pack(len(text)))
            digest.update(text)
    return digest.hexdigest()


def load_gguf_tokenizer(path: Path) -> GgufTokenizer:
    """Build the tokenizer that the file describes."""
    metadata = read_gguf_metadata(path)

    def damaged(key: str, what: str) -> TokenizerLoadError:
        return TokenizerLoadError(path, f"{key} {what}", "use an intact GGUF file of a language model")

    def text(key: str) -> str:
        value = metadata.get(key)
        if not isinstance(value, bytes):
            raise damaged(key, "is missing, or no text")
        return decoded(key, value)

    def decoded(key: str, value: bytes) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise damaged(key, f"is not UTF-8 at byte {error.start}") from None

    def listed(key: str, kind: type) -> list[Any]:
        values = metadata.get(key)
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise damaged(key, "is missing, or no array of what it must be")
        return values

    kind = text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise TokenizerLoadError(path, f"tokenizer.ggml.model is {kind!r}", "use the model's tokenizer.json")
    split = text("tokenizer.ggml.pre")
    if split not in _PRE_TOKENIZERS:
        raise TokenizerLoadError(
            path,
            f"tokenizer.ggml.pre is {split!r}",
            f"use the model's tokenizer.json; known here: {', '.join(sorted(_PRE_TOKENIZERS))}",
        )
    tokens = [decoded("tokenizer.ggml.tokens", token) for token in listed("tokenizer.ggml.tokens", bytes)]
    kinds: list[int] = listed("tokenizer.ggml.token_type", int)
    merges = []
    for merge in listed("tokenizer.ggml.merges", bytes):
        left, _, right = decoded("tokenizer.ggml.merges", merge).partition(" ")
        merges.append((left, right))
    if len(kinds) != len(tokens):
        raise TokenizerLoadError(path, f"{len(kinds)} token types for {len(tokens)} tokens", "use an intact GGUF file")

    # A later token of the same text never wins in llama.cpp's map either.
    vocabulary: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocabulary.setdefault(token, index)
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=False))
    except Exception as error:
        raise TokenizerLoadError(path, f"{error}", "use an intact GGUF file") from error
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_kind in zip(tokens, kinds, strict=True):
        if token_kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif token_kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])

    special: dict[str, str] = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id", len(tokens))
        if not isinstance(token_id, int):
            raise damaged(f"tokenizer.ggml.{key}_token_id", "is no number")
        if 0 <= token_id < len(tokens):
            special[name] = tokens[token_id]
    begin = ["$A"]
    if metadata.get("tokenizer.ggml.add_bos_token", False) and "bos_token" in special:
        begin.insert(0, special["bos_token"])
    if metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in special:
        begin.append(special["eos_token"])
    if len(begin) > 1:
        added = [token for token in begin if token != "$A"]  # noqa: S105 - a template's placeholder
        tokenizer.post_processor = processors.TemplateProcessing(
            single=begin, special_tokens=[(token, vocabulary[token]) for token in added]
        )
    return GgufTokenizer(
        tokenizer=tokenizer,
        chat_template=text("tokenizer.chat_template") if "tokenizer.chat_template" in metadata else None,
        special_tokens=special,
        fingerprint=_fingerprint(metadata),
    )
