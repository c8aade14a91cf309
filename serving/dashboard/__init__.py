"""The dashboard: a web application of a few files that are served as they are, beside the API that it asks; docs/dashboard.md.

Promise: the files hold no secret and no figure, so anybody may have them; a page runs scripts, loads styles and asks questions
from here alone. A browser asks each time whether a file has changed, so a new version is there with the next load; it is told
of all files at once, and gets them compressed.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from importlib import resources
from typing import TYPE_CHECKING, Final

from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

__all__ = ["PATH", "POLICY", "dashboard_routes"]

PATH: Final = "/dashboard/"
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
# A weight of an Accept-Encoding that says: not at all.
_REFUSED: Final = re.compile(r"\s*q=0(\.0*)?\s*")
# What is sent, its tag, and what else to say of it.
_Form = tuple[bytes, str, dict[str, str]]
_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


def dashboard_routes() -> list[BaseRoute]:
    """One route a file: nothing else can be asked for. `/` leads here."""
    files = sorted((file for file in resources.files(__name__).joinpath("static").iterdir()), key=lambda file: file.name)
    routes: list[BaseRoute] = [
        Route(PATH + ("" if file.name == "index.html" else file.name), _serve(file.name, file.read_bytes())) for file in files
    ]
    return [*routes, *(Route(path, _lead) for path in ("/", PATH.rstrip("/")))]


def _serve(name: str, content: bytes) -> Callable[[Request], Awaitable[Response]]:
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    # Compressed it is another representation of the file, with a tag of its own.
    plain: _Form = content, f'"{digest}"', {}
    compressed: _Form = gzip.compress(content, mtime=0), f'"{digest}-gzip"', {"content-encoding": "gzip"}
    common = {
        "content-security-policy": POLICY,
        "cross-origin-opener-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
        "vary": "accept-encoding",
    }

    async def serve(request: Request) -> Response:
        sent, tag, coding = compressed if _takes_gzip(request.headers.get("accept-encoding", "")) else plain
        headers = common | {"etag": tag}
        if tag in [given.strip() for given in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        return Response(sent, headers=headers | coding, media_type=_TYPES[name.rpartition(".")[2]])

    return serve


def _takes_gzip(accepted: str) -> bool:
    codings = {coding.strip().lower(): weight for coding, _, weight in (each.partition(";") for each in accepted.split(","))}
    return "gzip" in codings and _REFUSED.fullmatch(codings["gzip"]) is None


async def _lead(_: Request) -> Response:
    return RedirectResponse(PATH)
