"""What every section of the configuration has in common: it is frozen, knows its keys, and shows no value in an error."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Section"]


class Section(BaseModel):
    """A table of `taximeter.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
