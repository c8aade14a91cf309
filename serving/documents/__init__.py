"""A finished invoice as a document: JSON, CSV, HTML and PDF, each a pure function of the invoice's stored bytes."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from serving.documents.content import DocumentError
from serving.documents.csv_document import to_csv
from serving.documents.json_document import to_json

__all__ = ["DocumentError", "DocumentFormat", "render"]


class DocumentFormat(StrEnum):
    """What an invoice can be rendered as."""

    JSON = "json"
    CSV = "csv"
    HTML = "html"
    PDF = "pdf"


def render(stored: bytes, document_format: DocumentFormat) -> bytes:
    """The invoice of these stored bytes as a document. Raises DocumentError; ImportError where the extra is not installed."""
    return _renderer(document_format)(stored)


def _renderer(document_format: DocumentFormat) -> Callable[[bytes], bytes]:
    # What sets HTML and PDF comes with the extra `documents`; the other two need nothing.
    if document_format is DocumentFormat.HTML:
        from serving.documents.html_document import to_html

        return to_html
    if document_format is DocumentFormat.PDF:
        from serving.documents.pdf_document import to_pdf

        return to_pdf
    return to_csv if document_format is DocumentFormat.CSV else to_json
