"""A small trial in every run: `python -m tests.serving.notifier.trial --kills 50` is the large one."""

from __future__ import annotations

from pathlib import Path

import pytest

from taximeter.embedded.broker import TansuBroker
from tests.serving.notifier.trial import Outcome, run_trial


@pytest.mark.timeout(900)
def test_a_notifier_that_is_killed_loses_no_alert_and_repeats_none_under_another_id(tansu: TansuBroker, tmp_path: Path) -> None:
    outcome = run_trial(tansu.bootstrap, tmp_path, kills=3, seed=1)
    assert outcome.kills == 3
    assert outcome.is_well, outcome
    assert outcome.failed > 0
    assert outcome.connections_lost > 0


def test_what_is_wrong_is_seen() -> None:
    names = ["a-r1", "a-r2", "b-r1"]
    well = Outcome(told=names, taken=["a-r1", "b-r1", "a-r2", "a-r1"], watched=names)
    assert well.is_well
    assert Outcome(told=names, taken=names, watched=[*names, "b-r1"]).watched_wrongly == ["b-r1"]
    assert Outcome(told=names, taken=names, watched=names[:2]).watched_wrongly == ["b-r1"]
    assert well.again == 1
    assert Outcome(told=["a-r1"]).lost == ["a-r1"]
    assert Outcome(taken=["a-r1"]).unasked == ["a-r1"]
    assert Outcome(told=["a-r1", "a-r2"], taken=["a-r2", "a-r1"]).out_of_order == ["a-r1"]
