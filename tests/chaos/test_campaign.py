"""Which faults come when, and how a run that several of them share is counted."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any, cast

from billing.v1.rejected_pb2 import RejectedInput
from tests.chaos.__main__ import _without_faults
from tests.chaos.campaign import TRIES_MAX, Campaign, Plan, table
from tests.chaos.clocks import _last_change, _last_month_end
from tests.chaos.faults import PLACES, all_faults
from tests.chaos.refusals import PoisonedInput
from tests.chaos.world import Trial, run_name


def test_each_fault_has_its_trials_and_no_run_two_of_one_place() -> None:
    faults = list(all_faults().values())
    plan = Plan(faults, {kind.name: kind.nightly for kind in faults}, seed=7)
    runs = list(plan.turns())
    made = Counter((kind.name, number) for kinds, number in runs for kind in kinds)
    assert made == {(kind.name, number): 1 for kind in faults for number in range(kind.nightly)}
    for kinds, _ in runs:
        places = [kind.place for kind in kinds]
        assert len({kind.setup for kind in kinds}) == 1
        assert places == [""] or places == [place for place in PLACES if place in places]
    assert max(len(kinds) for kinds, _ in runs) == len(PLACES)
    assert [[kind.name for kind in kinds] for kinds, _ in plan.turns()] == [[kind.name for kind in kinds] for kinds, _ in runs]


def test_shares_have_all_faults_once_and_about_as_many_runs() -> None:
    faults = list(all_faults().values())
    plan = Plan(faults, dict.fromkeys(all_faults(), 5), seed=7, soak_hours=1.0)
    for count in (1, 2, 3):
        shares = plan.shares(count)
        assert len(shares) == count
        assert sorted(name for share in shares for name in share) == sorted(all_faults())
        counts = {kind.name: 5 for kind in faults}
        runs = [len(list(Plan([all_faults()[name] for name in share], counts, 7).turns())) for share in shares]
        assert max(runs) <= 1.25 * sum(runs) / count
        setups = [{all_faults()[name].setup for name in share} for share in shares]
        alone = sum(map(len, setups)) - len({kind.setup for kind in faults})
        assert alone == (1 if count == 3 else 0), "an installation is in one share, but the one that is more than a share"


def test_a_share_runs_the_same_command_with_its_own_faults() -> None:
    given = ["--seed", "3", "--fault", "kill-sink", "--trials", "5", "--fault=kill-kafka", "--nightly"]
    assert _without_faults(given) == ["--seed", "3", "--trials", "5", "--nightly"]


def test_what_two_trials_of_one_run_share_counts_once() -> None:
    known = all_faults()
    names = ("kill-sink", "kill-worker")
    shared: dict[str, Any] = {"attempts": 300, "unknown": 2, "lost": 1, "findings": ["lost: one"]}
    trials = [Trial(name, 1, 0, "kill-sink-0", **shared) for name in names] + [
        Trial("kill-sink", 1, 1, "kill-sink-1", attempts=50)
    ]
    lines = table(Plan([known[name] for name in names], {"kill-sink": 2, "kill-worker": 1}, seed=1), trials).splitlines()
    assert lines[0] == "seed 1, 2 runs"
    assert lines[3:] == [
        "| kill-sink | I1-I3 | 2 | 2 | 0 | 350 | 2 | 1 | 0 | 0 | 0 |",
        "| kill-worker | I1-I3 | 1 | 1 | 0 | 300 | 2 | 1 | 0 | 0 | 0 |",
        "| all |  | 3 | 3 | 0 | 350 | 2 | 1 | 0 | 0 | 0 |",
    ]


def test_what_missed_its_window_or_was_not_made_is_made_again_a_few_times() -> None:
    known = all_faults()
    kinds = [known["kill-sink"], known["kill-worker"], known["kill-producer"], known["poisoned-input"]]
    campaign = Campaign(Plan(kinds, dict.fromkeys(known, 2), seed=1), Path("never-written"), tell=print)
    assert campaign.due(kinds, 0) == kinds
    campaign.trials = [
        Trial("kill-sink", 1, 0, "kill-sink-0", evidence="the ledger was ahead of the database"),
        Trial("kill-worker", 1, 0, "kill-sink-0"),
        Trial("kill-producer", 1, 0, "kill-sink-0", lost=1, findings=["lost: one"]),
        Trial("poisoned-input", 1, 0, "poisoned-input-0", error="it did not start"),
    ]
    again = [known["kill-worker"], known["poisoned-input"]]
    assert campaign.due(kinds, 0) == again, "a hit and a finding stand, a miss and what was not made do not"
    assert campaign.due(kinds, 1) == kinds
    assert [run_name(again, 0, tries) for tries in (0, 1)] == ["kill-worker-0", "kill-worker-0-again-1"]
    campaign.trials += [Trial("kill-worker", 1, 0, f"kill-worker-0-again-{tries}") for tries in range(1, TRIES_MAX)]
    assert campaign.due(kinds, 0) == [known["poisoned-input"]]
    row = table(campaign.plan, campaign.trials).splitlines()[4]
    assert row == f"| kill-worker | I1-I3 | 2 | {TRIES_MAX} | 0 | 0 | 0 | 0 | 0 | 0 | 0 |", "every try is told"
    assert not campaign.passed()


def test_a_refusal_that_is_not_told_and_one_that_is_not_due_are_named() -> None:
    fault = PoisonedInput(cast(Any, None), random.Random(0))
    due, stated, told = ("events", 0, 7, -1), ("events", 0, 8, 2), ("events", 0, 9, 0)
    fault._wanted, fault._stated = {due, stated}, {stated, told}
    fault._told = {told: RejectedInput(reason="model: is empty")}
    assert fault.violations() == [
        f"{stated} was refused by the ledger, and usage.rejected does not tell it",
        f"{due} was accepted by Kafka and is impossible, and the ledger does not refuse it",
        f"{told} was refused by the ledger, and is in order",
    ]
    fault._wanted = fault._stated = {stated, told}
    fault._told = {stated: RejectedInput(), told: RejectedInput(reason="model: is empty")}
    assert fault.violations() == [f"{stated} was refused without a reason"]


def test_moments_at_which_clocks_are_put() -> None:
    # 2026-11-26 12:00 UTC: the month began on the 1st, and central Europe left DST on 25 October at 01:00 UTC.
    assert _last_month_end(1_795_694_400) == 1_793_491_200
    assert _last_change(1_795_694_400) == 1_792_890_000
