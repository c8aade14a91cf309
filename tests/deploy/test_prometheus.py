"""Rules and dashboards speak of metrics that there are, each rule fires on what it is for, and its runbook is a section."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from taximeter.config import load
from taximeter.metric_names import METRICS
from tests.services import require
from tests.services.promtool import MISSING_MESSAGE, promtool

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
PIPELINE = json.loads((DEPLOY / "grafana" / "dashboards" / "pipeline.json").read_text())
# Of Prometheus itself, and of every process.
OTHERS = {"up", "process_start_time_seconds", "process_cpu_seconds_total", "process_resident_memory_bytes"}
SERIES = {series: metric for metric in METRICS for series in metric.series}
# A name, and the labels that are asked of it.
SELECTOR = re.compile(r"\b((?:taximeter|gen_ai|process)_[a-z_]+|up)\b(?![\"=~!])(?:\{([^}]*)\})?")
LABELS = {"instance", "job", "part", "le"}


def expressions() -> list[tuple[str, str]]:
    panels = [panel for panel in PIPELINE["panels"] if panel["type"] != "row"]
    shown = [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]
    return [(rule["alert"], rule["expr"]) for rule in ALERTS] + shown


@pytest.mark.parametrize(("name", "expression"), expressions())
def test_each_metric_that_is_asked_for_is_exported(name: str, expression: str) -> None:
    grouping = re.findall(r"(?:by|on) \(([a-z_, ]+)\)", expression)
    bare = re.sub(r"(?:by|on) \([a-z_, ]+\)", "", expression)
    found = SELECTOR.findall(bare)
    assert found, f"{name} asks for nothing"
    known: set[str] = set(LABELS)
    for series, asked in found:
        assert series in OTHERS or series in SERIES, f"{name}: no part exports {series}"
        if series in SERIES:
            known |= set(SERIES[series].labels)
            labels = set(re.findall(r"([a-z_]+)(?:=~|!~|!=|=)", asked))
            assert labels <= {*SERIES[series].labels, *LABELS}, f"{name}: {series} has no labels {labels}"
    for group in grouping:
        assert set(re.split(r",\s*", group)) <= known, f"{name}: grouped by {group}"


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_each_alert_has_a_severity_and_a_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"info", "warning", "critical"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    titles = re.findall(r"^## (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {title.lower().replace(" ", "-").replace(",", "") for title in titles}
    section = (ROOT / page).read_text().split("\n## ")
    assert any(f"`{rule['alert']}`" in part for part in section), f"{page} does not name {rule['alert']}"


def test_prometheus_asks_the_ports_that_the_parts_answer_at() -> None:
    asked = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"][0]["static_configs"]
    config = load(DEPLOY / "taximeter.toml")
    ports = {
        "gateway": config.gateway.metrics_address,
        "worker": config.ledger.metrics_address,
        "sink": config.clickhouse.metrics_address,
        "api": config.api.metrics_address,
        "notifier": config.notifier.metrics_address,
    }
    for entry in asked:
        (target,) = entry["targets"]
        host, port = target.split(":")
        assert ports.pop(host).endswith(f":{port}")
        assert entry["labels"] == {"part": host}
    assert not ports


def test_each_rule_fires_on_what_it_is_for_and_none_where_all_is_well(tmp_path: Path) -> None:
    command = promtool()
    require(command, MISSING_MESSAGE)
    assert command is not None
    shown = [{"record": "panel:shown", "expr": expression} for _, expression in expressions()]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": shown}]}))
    for arguments in (
        ["check", "rules", "--lint=none", str(tmp_path / "panels.yaml")],
        ["check", "rules", str(DEPLOY / "prometheus" / "rules.yaml")],
        ["check", "config", "--syntax-only", str(DEPLOY / "prometheus" / "prometheus.yaml")],
        ["test", "rules", str(DEPLOY / "prometheus" / "rules_test.yaml")],
    ):
        ended = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, f"{arguments}\n{ended.stdout}\n{ended.stderr}"
    tested = yaml.safe_load((DEPLOY / "prometheus" / "rules_test.yaml").read_text())["tests"]
    samples = [sample for each in tested for query in each["promql_expr_test"] for sample in query["exp_samples"]]
    fired = {re.findall(r'alertname="(\w+)"', sample["labels"])[0] for sample in samples}
    assert fired == {rule["alert"] for rule in ALERTS}
