"""Each rule that is broken on purpose turns the simulation red within a bounded number of seeds.

What the simulator once found stands here too: the mend taken away is found again, however its seeds have changed meanwhile.
"""

from __future__ import annotations

import pytest

from tests.simulation.controls import CONTROLS
from tests.simulation.many import attempt

SEEDS_MAX = 60


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CONTROLS)
def test_a_broken_rule_is_seen(name: str) -> None:
    with CONTROLS[name]():
        outcomes = (attempt(seed) for seed in range(SEEDS_MAX))
        found = next((outcome for outcome in outcomes if isinstance(outcome, str)), None)
    assert found is not None, f"{SEEDS_MAX} seeds stay green although {name}"
    broke = "ended with" in found or "Exception in" in found or "again: python -m tests.simulation --seed" not in found
    assert not broke, f"the control broke, not a rule: {found}"
