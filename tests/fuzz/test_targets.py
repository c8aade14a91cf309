"""Every decoder over its seeds and hundreds of seeded mutations: only the documented errors. `make fuzz` looks longer."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.target import attempt, mutations
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_refuses_or_takes_whatever_comes(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    for data in (*seeds, b"", *mutations(seeds, target.mutations, random.Random(name))):
        try:
            attempt(target, data)
        except BaseException as error:
            error.add_note(f"{name}: {data[:4096]!r}")
            raise
