"""Load a model's tokenizer from what lies on the disk: a directory, a tokenizer.json, a GGUF file, or the hub's cache.

Nothing is ever fetched. What comes back is never changed again, so threads share it: counting goes through the
`tokenizers` object alone, because transformers' own `__call__` changes it ("Already borrowed").
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from serving.tokenizers.errors import ChatTemplateError, TokenizerLoadError
from serving.tokenizers.gguf import load_gguf_tokenizer
from serving.tokenizers.hub import locate, stay_offline

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

__all__ = ["Framing", "ModelTokenizer", "load_tokenizer"]

# What decides how a text is split, in a directory as transformers writes it.
_DEFINING_FILES: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# Unicode: a text in NFC is at most three times as long in UTF-8 as before.
_NFC_GROWTH: Final = 3


class Framing(Enum):
    """What stands around a text when the model sees it."""

    OUTPUT = "output"  # nothing: what a model wrote
    PROMPT = "prompt"  # the special tokens that the tokenizer itself adds
    CHAT = "chat"  # one user turn in the model's chat template, and the beginning of the answer


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """One loaded tokenizer. Its methods block and are safe to call from any thread."""

    path: Path
    fingerprint: str
    """sha256 over what defines the tokenizer; the usage event names it."""
    _fast: Tokenizer
    _wrapper: Any
    _special_tokens: int
    _growth: int | None
    """UTF-8 bytes bound the tokens from above after this factor; None where no such bound holds."""
    _prefix_bytes: int

    def render(self, text: str) -> str:
        """The text as one user turn in the model's chat template."""
        if not self._wrapper.chat_template:
            raise ChatTemplateError(f"tokenizer at {self.path} has no chat template: count the text as a prompt")
        try:
            rendered: str = self._wrapper.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise ChatTemplateError(f"chat template of the tokenizer at {self.path}: {error}: mend the template") from error
        return rendered

    def count(self, text: str, framing: Framing) -> int:
        """How many tokens the model sees; releases the GIL while it counts."""
        if framing is Framing.CHAT:
            text = self.render(text)
        # encode_batch releases the GIL, encode does not; the fast form leaves out offsets, which nobody reads here.
        (encoding,) = self._fast.encode_batch_fast([text], add_special_tokens=framing is Framing.PROMPT)
        return len(encoding)

    def upper_bound(self, text: str, framing: Framing) -> int | None:
        """A number that `count` never exceeds, for the price of encoding the text; None if there is none.

        Each token of a byte-level BPE stands for at least one byte.
        """
        if self._growth is None:
            return None
        if framing is Framing.CHAT:
            text = self.render(text)
        special = self._special_tokens if framing is Framing.PROMPT else 0
        return self._growth * len(text.encode()) + self._prefix_bytes + special


def _wrap(fast: Tokenizer, **arguments: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast  # its constructor has no types
    return make(tokenizer_object=fast, **arguments)


def _from_directory(path: Path) -> tuple[Any, str]:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    digest = hashlib.sha256(b"directory\0")
    found = [name for name in _DEFINING_FILES if (path / name).is_file()]
    for name in found:
        content = (path / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    if found == ["tokenizer.json"] and not (path / "config.json").is_file():
        make: Any = PreTrainedTokenizerFast
        wrapper = make(tokenizer_file=str(path / "tokenizer.json"))
    elif found:
        wrapper = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    else:
        raise TokenizerLoadError(path, "no tokenizer files", f"put one of {', '.join(_DEFINING_FILES)} there")
    if not wrapper.is_fast:
        raise TokenizerLoadError(path, f"{type(wrapper).__name__} is no fast tokenizer", "add a tokenizer.json")
    # The class decides too, by config.json.
    digest.update(type(wrapper).__name__.encode())
    return wrapper, digest.hexdigest()


def _from_json(path: Path) -> tuple[Any, str]:
    from tokenizers import Tokenizer

    content = path.read_bytes()
    return _wrap(Tokenizer.from_str(content.decode())), hashlib.sha256(b"json\0" + content).hexdigest()


def _from_gguf(path: Path) -> tuple[Any, str]:
    loaded = load_gguf_tokenizer(path)
    wrapper = _wrap(loaded.tokenizer, chat_template=loaded.chat_template, **loaded.special_tokens)
    return wrapper, loaded.fingerprint


def _load(path: Path) -> tuple[Any, str]:
    if path.is_dir():
        return _from_directory(path)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.suffix == ".json":
        return _from_json(path)
    if not path.exists():
        raise TokenizerLoadError(path, "not there", "give a directory, a tokenizer.json or a .gguf file")
    raise TokenizerLoadError(path, "of an unknown kind", "give a directory, a tokenizer.json or a .gguf file")


def load_tokenizer(path: Path) -> ModelTokenizer:
    """Load the tokenizer; any failure is a `TokenizerLoadError` that says where and what."""
    stay_offline()
    try:
        path = locate(path)
        wrapper, fingerprint = _load(path)
        fast: Tokenizer = wrapper.backend_tokenizer
        fast.no_truncation()
        fast.no_padding()
        special = len(fast.encode("", add_special_tokens=True))
        growth, prefix_bytes = _bound(json.loads(fast.to_str()))
    except TokenizerLoadError:
        raise
    except Exception as error:
        raise TokenizerLoadError(path, f"{type(error).__name__}: {error}", "use an intact tokenizer") from error
    return ModelTokenizer(
        path=path,
        fingerprint=fingerprint,
        _fast=fast,
        _wrapper=wrapper,
        _special_tokens=special,
        _growth=growth,
        _prefix_bytes=prefix_bytes,
    )


def _parts(component: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The component, or what a sequence of them holds, flattened."""
    if component is None:
        return []
    if component.get("type") != "Sequence":
        return [component]
    return [part for one in component[inner] for part in _parts(one, inner)]


def _bound(definition: dict[str, Any]) -> tuple[int | None, int]:
    """The factor by which UTF-8 bytes bound the tokens, and how many bytes the tokenizer puts before the text."""
    byte_level = [part for part in _parts(definition["pre_tokenizer"], "pretokenizers") if part.get("type") == "ByteLevel"]
    normalizers = [part.get("type") for part in _parts(definition["normalizer"], "normalizers")]
    if definition["model"].get("type") != "BPE" or not byte_level or not set(normalizers) <= {"NFC"}:
        return None, 0
    # Each split may get a space of its own, so a bound of text length alone would not hold where splits come first.
    if any(part.get("add_prefix_space") for part in byte_level):
        if definition["pre_tokenizer"]["type"] == "Sequence" or definition["added_tokens"]:
            return None, 0
        return _NFC_GROWTH if normalizers else 1, 1
    return _NFC_GROWTH if normalizers else 1, 0
