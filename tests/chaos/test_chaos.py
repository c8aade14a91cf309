"""A small round of trials with real processes: several faults, in two runs, on one running installation.

Five trials a fault are `make chaos`, the table's counts `make nightly`; this shows that the driver, the faults and the judge
work together, and it turns red when a rule of the product is broken.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.campaign import Campaign, Plan, table
from tests.chaos.faults import all_faults
from tests.services import require
from tests.services.clickhouse import MISSING_MESSAGE, server_command

pytestmark = [pytest.mark.chaos, pytest.mark.apache_kafka, pytest.mark.clickhouse_server, pytest.mark.timeout(1800)]

ROUND = ("kill-worker-after-produce", "kill-sink-between-inserts", "kill-producer", "zombie-writes", "poisoned-input")


@pytest.mark.usefixtures("apache_kafka_libs")
def test_a_round_of_faults_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    require(server_command(), MISSING_MESSAGE)
    faults = [all_faults()[name] for name in ROUND]
    campaign = Campaign(Plan(faults, dict.fromkeys(ROUND, 1), seed=20_261_123), tmp_path, tell=print)
    campaign.run()
    assert sorted(trial.fault for trial in campaign.trials if trial.counts) == sorted(ROUND)
    # Beside those in which a missed window was tried again.
    assert len({trial.run for trial in campaign.trials if "-again-" not in trial.run}) == 2
    assert campaign.passed(), table(campaign.plan, campaign.trials)
    # It goes on where it was: nothing is left to do.
    again = Campaign(campaign.plan, tmp_path, tell=print)
    again.run()
    assert [trial.line() for trial in again.trials] == [trial.line() for trial in campaign.trials]


def test_every_fault_says_what_it_checks() -> None:
    for name, kind in all_faults().items():
        assert kind.checks, name
        assert kind.nightly >= 10, name
        assert kind.loads <= {"events", "gateway"}, name
