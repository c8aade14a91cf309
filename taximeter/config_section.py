"""What every section of the configuration has in common: it is frozen, knows its keys, and shows no value in an error. And what
several of them are made of.

The comment above a key is what docs/reference/settings.md says of it.
"""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["MetricsAddress", "OtlpEndpoint", "Port", "Section", "is_local", "nearest_name"]

Port = Annotated[int, Field(ge=1, le=65_535)]
MetricsAddress = Annotated[str, Field(pattern=r"^$|^[^\s/]+:[0-9]{1,5}$")]
OtlpEndpoint = Annotated[str, Field(pattern=r"^$|^https?://[^\s/@]+:[0-9]{1,5}$")]


class Section(BaseModel):
    """A table of `taximeter.toml`."""

    # Deferred: the whole configuration's validator has every section's in it, and few are made alone.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, defer_build=True)


def is_local(address: str) -> bool:
    """Whether an address, with its port or without, is of this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition("/")[2]
    if host.count(":") == 1 or host.startswith("["):
        host = host.rpartition(":")[0].strip("[]") if not host.endswith("]") else host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def nearest_name(name: str, known: Sequence[str]) -> str:
    """Of what is known, that which `name` may have been meant to be."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return close[0] if close else ""
