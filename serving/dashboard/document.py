"""The page as one document: its style and its scripts stand in it, put there when the process starts.

Promise: a page takes one round trip and then asks for figures, whatever the distance; and it runs what stood in its files and
nothing else, for its policy names each part of it by its hash. The files stay modules that one can read, each with a scope of
its own; whatever is written in them that this cannot put together fails the start and names the file.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Final

__all__ = ["Document", "assemble"]

_POLICY: Final = (
    "default-src 'none'; script-src {scripts}; style-src {styles}; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_STYLE: Final = re.compile(r'<link rel="stylesheet" href="([a-z]+\.css)">')
_SCRIPT: Final = re.compile(r'<script src="([a-z]+\.js)"></script>')
_MODULE: Final = re.compile(r'<script type="module" src="([a-z]+\.js)"></script>')
_IMPORT: Final = re.compile(r'^import \{ ([\w, ]+) \} from "\./([a-z]+)\.js";$', re.MULTILINE)
_EXPORT: Final = re.compile(r"^export (?=(?:async )?(?:class|const|function) (\w+))", re.MULTILINE)
_UNKNOWN: Final = re.compile(r"^(?:import|export)\b.*", re.MULTILINE)
# What would end the element that a file is put into.
_ENDS: Final = re.compile(r"</(?:script|style)|<!--", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Document:
    """What is served, and what it may do (Content-Security-Policy)."""

    content: str
    policy: str


def assemble(read: Callable[[str], str]) -> Document:
    """The document of `index.html` and what it names; `read` gives a file's text. Raises ValueError for what does not fit."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def put(tag: str, attributes: str, name: str, text: str) -> str:
        if found := _ENDS.search(text):
            raise ValueError(f"{name}: has {found[0]!r}, which would end the {tag} that it stands in; write it in two parts")
        digest = hashlib.sha256(text.encode()).digest()
        hashes[tag].append(f"'sha256-{base64.b64encode(digest).decode()}'")
        return f"<{tag}{attributes}>{text}</{tag}>"

    page = _STYLE.sub(lambda found: put("style", "", found[1], read(found[1])), read("index.html"))
    page = _SCRIPT.sub(lambda found: put("script", "", found[1], read(found[1])), page)
    page = _MODULE.sub(lambda found: put("script", ' type="module"', found[1], _joined(found[1], read)), page)
    return Document(page, _POLICY.format(scripts=" ".join(hashes["script"]), styles=" ".join(hashes["style"])))


def _joined(first: str, read: Callable[[str], str]) -> str:
    """One module of `first` and all that it imports: each a function that gives what it exports, after those it asks."""
    texts: dict[str, str] = {}
    asks: dict[str, set[str]] = {}
    waiting = [first.removesuffix(".js")]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = read(f"{name}.js")
            asks[name] = {found[2] for found in _IMPORT.finditer(texts[name])}
            waiting += asks[name]
    # Raises CycleError, a ValueError, which names the files.
    return "".join(_wrapped(name, texts[name]) for name in TopologicalSorter(asks).static_order())


def _wrapped(name: str, text: str) -> str:
    exports = _EXPORT.findall(text)
    inner = _EXPORT.sub("", _IMPORT.sub(r"const { \1 } = $\2;", text))
    if found := _UNKNOWN.search(inner):
        raise ValueError(f"{name}.js: {found[0]!r} is no import or export that is known here; see {__name__}")
    return f"const ${name} = (() => {{\n{inner}return {{ {', '.join(exports)} }};\n}})();\n"
