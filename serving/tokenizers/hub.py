"""Where a tokenizer lies: a path, or the name that the Hugging Face hub has for it, as far as its files are on this machine.

Nothing is ever fetched: a name that is not in the local cache is an error that says how to bring it there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from serving.tokenizers.errors import TokenizerLoadError

__all__ = ["locate", "stay_offline"]

# OWNER/NAME, and a branch, a tag or a commit where it is not to be `main`.
_HUB_NAME: Final = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(?:@([\w./-]{1,100}))?")


def stay_offline() -> None:
    """transformers and the hub's client read this when they are first imported: they must not reach for the network, nor advise
    to install torch."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def locate(path: Path) -> Path:
    """The path itself, resolved; or of what is no path the folder of the hub's cache that has that name. A path goes first."""
    match = _HUB_NAME.fullmatch(str(path))
    if match is None or path.exists():
        return path.resolve()
    stay_offline()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, revision = match.groups()
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True)).resolve()
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
        wanted = f"hf download {name}" + (f" --revision {revision}" if revision else "")
        raise TokenizerLoadError(
            path,
            "neither a path nor in the hub's cache on this machine",
            f"give a directory, a tokenizer.json or a .gguf file, or run `{wanted} --include '*token*' '*.json'` beforehand",
        ) from None
