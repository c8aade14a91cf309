"""The dashboard: a web application of one document and its icon, beside the API that it asks; docs/dashboard.md.

Promise: they hold no secret and no figure, so anybody may have them; a page runs its own scripts, has its own style and asks
questions from here alone. A browser asks each time whether the page has changed, so a new version is there with the next load;
and it gets it compressed.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from importlib import resources
from typing import TYPE_CHECKING, Final

from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from serving.dashboard.document import assemble

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

__all__ = ["PATH", "dashboard_routes"]

PATH: Final = "/dashboard/"
_ICON: Final = "icon.svg"
# A weight of an Accept-Encoding that says: not at all.
_REFUSED: Final = re.compile(r"\s*q=0(\.0*)?\s*")
# What is sent, its tag, and what else to say of it.
_Form = tuple[bytes, str, dict[str, str]]


def dashboard_routes() -> list[BaseRoute]:
    """One route for each of the two: nothing else can be asked for. `/` leads here."""
    static = resources.files(__name__).joinpath("static")
    page = assemble(lambda name: static.joinpath(name).read_text(encoding="utf-8"))
    return [
        Route(PATH, _serve(page.content.encode(), "text/html; charset=utf-8", page.policy)),
        Route(PATH + _ICON, _serve(static.joinpath(_ICON).read_bytes(), "image/svg+xml", page.policy)),
        *(Route(path, _lead) for path in ("/", PATH.rstrip("/"))),
    ]


def _serve(content: bytes, media_type: str, policy: str) -> Callable[[Request], Awaitable[Response]]:
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    # Compressed it is another representation, with a tag of its own.
    plain: _Form = content, f'"{digest}"', {}
    compressed: _Form = gzip.compress(content, mtime=0), f'"{digest}-gzip"', {"content-encoding": "gzip"}
    common = {
        "content-security-policy": policy,
        "cross-origin-opener-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
        "vary": "accept-encoding",
    }

    async def serve(request: Request) -> Response:
        sent, tag, coding = compressed if _takes_gzip(request.headers.get("accept-encoding", "")) else plain
        headers = common | {"etag": tag}
        if tag in [given.strip() for given in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        return Response(sent, headers=headers | coding, media_type=media_type)

    return serve


def _takes_gzip(accepted: str) -> bool:
    codings = {coding.strip().lower(): weight for coding, _, weight in (each.partition(";") for each in accepted.split(","))}
    return "gzip" in codings and _REFUSED.fullmatch(codings["gzip"]) is None


async def _lead(_: Request) -> Response:
    return RedirectResponse(PATH)
