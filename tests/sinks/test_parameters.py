"""Whatever a value holds, it reads back as itself and never leaves its literal."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinks.engines.chdb import ChdbEngine
from sinks.errors import ParameterError
from sinks.parameters import TEXT_CHARS_MAX, VALUES_MAX, bind

TEXT = st.text(max_size=40) | st.sampled_from(["'", "\\", "\\'", "';--", "{a:String}", "\0", "%(a)s", "'||1||'"])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXT, texts=st.lists(TEXT, max_size=4), number=st.integers(-(2**63), 2**63 - 1))
def test_values_read_back_as_themselves(engine: ChdbEngine, text: str, texts: list[str], number: int) -> None:
    [row] = engine.query(
        "SELECT {text:String}, {texts:Array(String)}, {number:Int64}, {text:String} = {text:String}",
        {"text": text, "texts": texts, "number": number},
    ).rows
    assert row == (text, texts, number, 1)


@pytest.mark.parametrize(
    ("sql", "parameters", "says"),
    [
        ("SELECT {a:String}", {}, "no value was given"),
        ("SELECT 1", {"a": "x"}, "has no place"),
        ("SELECT {a:String}", {"a": 1}, "is not text"),
        ("SELECT {a:String}", {"a": "x" * (TEXT_CHARS_MAX + 1)}, "characters"),
        ("SELECT {a:String}", {"a": "\ud800"}, "surrogate"),
        ("SELECT {a:UInt64}", {"a": -1}, "is not a number from 0"),
        ("SELECT {a:UInt64}", {"a": True}, "is not a number"),
        ("SELECT {a:UInt64}", {"a": "1 OR 1"}, "is not a number"),
        ("SELECT {a:Array(String)}", {"a": "x"}, "is not a list"),
        ("SELECT {a:Array(String)}", {"a": ["x"] * (VALUES_MAX + 1)}, "at most"),
        ("SELECT {a:Identifier}", {"a": "x"}, "type Identifier is not one of"),
    ],
)
def test_what_does_not_fit_is_refused(sql: str, parameters: dict[str, str], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        bind(sql, parameters)
