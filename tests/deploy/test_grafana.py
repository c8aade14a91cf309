"""Dashboards are files that Grafana can load: sources that are provisioned, panels that do not cover each other."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
SOURCES = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "taximeter.yaml").read_text())["datasources"]


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_each_dashboard_has_a_name_of_its_own() -> None:
    assert [path.stem for path in DASHBOARDS] == ["pipeline", "usage"]
    assert len({load(path)["uid"] for path in DASHBOARDS}) == len(DASHBOARDS)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_a_source_that_is_provisioned_and_a_place_of_their_own(path: Path) -> None:
    dashboard = load(path)
    sources = {source["uid"]: source["type"] for source in SOURCES}
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        if panel["type"] == "row":
            continue
        assert panel["type"] in {"stat", "table", "timeseries"}
        for asked in [panel, *panel["targets"]]:
            assert sources[asked["datasource"]["uid"]] == asked["datasource"]["type"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for variable in dashboard["templating"]["list"]:
        assert sources[variable["datasource"]["uid"]] == variable["datasource"]["type"]
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, f"{one} covers {other}"
