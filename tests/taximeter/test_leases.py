"""Several gateway processes, one balance: never overspent, all of it usable, and what a killed gateway held comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from billing.amounts import parse_decimal_to_pico
from tests.taximeter.lease_trial import Trial, run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.timeout(900)]


def test_many_gateways_never_overspend_one_balance(tmp_path: Path) -> None:
    trial = Trial(gateways=3, credit="0.15", dollars=10, requests=200, at_once=30)
    seen = run(trial, tmp_path)
    credit_pico = parse_decimal_to_pico(trial.credit)
    assert seen.ended["RESOURCE_EXHAUSTED"], "who comes too late is refused"
    # Whoever got an answer paid for it; a killed gateway may have billed some that got none.
    assert seen.ended["ok"] * trial.worst_pico // 2 <= seen.spend_pico <= credit_pico
    assert seen.least_free_pico >= 0, "more was leased than there was"
    # There was money for more of them, had the gateways been able to ask for it.
    assert seen.ended_away["ok"] < trial.requests
    assert seen.delivered_away_pico <= seen.held_away_pico, "each gateway passes what it holds, and no more"
    assert sum(pico > 0 for pico in seen.delivered_away_pico.values()) == trial.gateways, "and each passes something"
    assert seen.findings == []
