"""An invoice as PDF, set by Typst in fonts that come with this package's extra: the machine's own are never looked at.

Promise: the same stored bytes give the same PDF, byte for byte, under the locked versions of Typst and the fonts; its date is
the invoice's. The file is PDF/A-3a and PDF/UA-1 (archivable, tagged for screen readers), with the stored bytes and the JSON
document inside, so the chain can be checked from the file alone. A name in a script that no font here has is set in boxes, and
the file is then plain tagged PDF, since PDF/A forbids them.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import threading
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from serving.documents.content import Content, content_of
from serving.documents.json_document import to_json

if TYPE_CHECKING:
    import typst

__all__ = ["ATTACHED_BYTES_MAX", "to_pdf"]

# What is larger has its hash in the document, and is not carried in it.
ATTACHED_BYTES_MAX = 1 << 20
# Where each keeps its files. Latin, Greek and Cyrillic; Arabic; Chinese, Japanese and Korean.
_FONTS = {"fontpkg_ibm_plex_sans": "files", "fontpkg_ibm_plex_sans_arabic": "files", "noto_cjk_sans_otc": ""}
# Characters that Chinese and Japanese share look different in each; the currency says which form its readers expect.
_EAST_ASIA = {"JPY": "JP", "KRW": "KR", "TWD": "TC", "HKD": "HK"}
_STANDARDS: list[typst.PDFStandard] = ["a-3a", "ua-1"]
# Typst's cache is the process's own; one document at a time keeps its memory bounded.
_LOCK = threading.Lock()


def to_pdf(stored: bytes) -> bytes:
    """The invoice of these stored bytes. Raises DocumentError."""
    import typst

    content = content_of(stored)
    inputs = {"content": json.dumps(_values(content, stored), ensure_ascii=False)}
    template = _template()
    issued = _issued(content)
    with _LOCK:
        try:
            made = typst.compile(
                template, font_paths=_fonts(), sys_inputs=inputs, format="pdf", timestamp=issued, pdf_standards=_STANDARDS
            )
        except typst.TypstError as error:
            if "could not be displayed with font" not in str(error):
                raise
            made = typst.compile(template, font_paths=_fonts(), sys_inputs=inputs, format="pdf", timestamp=issued)
    assert isinstance(made, bytes)
    return made


def _values(content: Content, stored: bytes) -> dict[str, object]:
    values = asdict(content)
    issued = _issued(content)
    attached = len(stored) <= ATTACHED_BYTES_MAX
    return {
        **values,
        "date": [issued.year, issued.month, issued.day, issued.hour, issued.minute, issued.second],
        "east_asia": f"Noto Sans CJK {_EAST_ASIA.get(content.currency, 'SC')}",
        "stored": list(stored) if attached else None,
        "json": to_json(stored).decode() if attached else None,
    }


def _issued(content: Content) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(seconds=content.issued_ms // 1_000)


@functools.cache
def _template() -> bytes:
    return (importlib.resources.files("serving.documents") / "templates" / "invoice.typ").read_bytes()


@functools.cache
def _fonts() -> typst.Fonts:
    import typst

    folders = [str(importlib.resources.files(package) / folder) for package, folder in _FONTS.items()]
    return typst.Fonts(include_system_fonts=False, include_embedded_fonts=False, font_paths=folders)
