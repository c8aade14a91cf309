"""An invoice as one HTML page that needs nothing beside it: no script, no font, no picture, no address that it would load."""

from __future__ import annotations

import functools

import jinja2

from serving.documents.content import content_of

__all__ = ["to_html"]


def to_html(stored: bytes) -> bytes:
    """The invoice of these stored bytes. Raises DocumentError."""
    return _template().render(content=content_of(stored)).encode()


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("serving.documents"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("invoice.html.j2")
