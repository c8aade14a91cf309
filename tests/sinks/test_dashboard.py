"""Every question that the Grafana dashboard asks of ClickHouse has an answer from the real schema, for all tenants and one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sinks.engine import Reader
from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from tests.billing.ledgers import KEYS, NOW_MS, Ledger, tenants_in

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards" / "usage.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
(TENANT,) = DASHBOARD["templating"]["list"]
FROM_S, TO_S = NOW_MS // 1_000 - 86_400 * 2, NOW_MS // 1_000 + 86_400 * 2
# What is only there now and then: there is nothing to see of it in this ledger.
EMPTY = {"Invoices", "Producers with holes", "Latency", "Alerts", "Not charged"}


@pytest.fixture
def reader(engine: ChdbEngine, ledger: Ledger) -> Reader:
    feed(engine, ledger.stored, KEYS.seal_key)
    return engine


def as_grafana_asks(sql: str, tenant_id: str) -> str:
    """With the plugin's macros and the variable put in, as the documentation of both says."""
    sql = re.sub(r"\$__timeFilter\((\w+)\)", rf"\1 >= toDateTime({FROM_S}) AND \1 <= toDateTime({TO_S})", sql)
    sql = re.sub(r"\$__timeInterval\((\w+)\)", r"toStartOfInterval(toDateTime(\1), INTERVAL 60 second)", sql)
    quoted = "'" + tenant_id.replace("'", "''") + "'"
    sql = sql.replace("${tenant:sqlstring}", quoted)
    assert "$" not in sql, f"a macro that is not known here: {sql}"
    return sql


def rows(reader: Reader, title: str, tenant_id: str = "*") -> list[dict[str, object]]:
    (panel,) = [panel for panel in PANELS if panel["title"] == title]
    return reader.query(as_grafana_asks(panel["targets"][0]["rawSql"], tenant_id)).dicts()


def test_every_panel_has_an_answer_for_all_and_for_one(reader: Reader) -> None:
    one, _, nobody = tenants_in(1)[:3]
    for panel in PANELS:
        title, (target,) = panel["title"], panel["targets"]
        found = rows(reader, title)
        assert found or title in EMPTY, f"{title} shows nothing"
        if target["format"] == 0 and found:
            assert "time" in found[0], f"{title} is drawn over time"
        if "${tenant" in target["rawSql"]:
            rows(reader, title, one)
            assert not [row for row in rows(reader, title, nobody) if row.get("requests")], f"{title} shows others' usage"
    assert "it's" not in str(rows(reader, "Models", "it's nobody"))


def test_the_figures_are_the_ledger_s(reader: Reader) -> None:
    (total,) = rows(reader, "Cost")
    by_tenant = rows(reader, "Who spends most")
    assert total["costs"] == sum(row["costs"] for row in by_tenant)  # type: ignore[misc]
    (spent,) = reader.query("SELECT sum(spend) FROM tenant_balances").rows
    assert total["costs"] == spent[0]


def test_tenants_to_choose_from_are_those_that_there_are(reader: Reader) -> None:
    one, two = tenants_in(1)[:2]
    assert {row[0] for row in reader.query(TENANT["query"]).rows} == {one, two}
