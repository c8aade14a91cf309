"""The system's Chromium, driven by Playwright: nothing is downloaded, and it talks to nobody but the page's own server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from playwright.sync_api import Browser, sync_playwright

from tests.services import require

__all__ = ["chromium"]

_NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
_MISSING: Final = "there is no Chromium on this machine; on Debian: apt-get install chromium"
_ARGUMENTS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
)
_START_TIMEOUT_MS: Final = 180_000


@contextmanager
def chromium() -> Iterator[Browser]:
    """One browser, ended with the block."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    require(path, _MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_ARGUMENTS), timeout=_START_TIMEOUT_MS)
        try:
            yield browser
        finally:
            browser.close()
