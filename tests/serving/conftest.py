"""What all tests of serving share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from unittest.mock import patch

import pytest

from serving.tokenizers import load_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _each_tokenizer_is_loaded_once() -> Iterator[None]:
    """A gateway loads its tokenizers when it starts, SmolLM2's for most of a second. Hundreds of tests start one on the same
    file, and a tokenizer that is loaded never changes."""
    with patch("serving.tokenizers.registry.load_tokenizer", cache(load_tokenizer)):
        yield
