"""The page of metrics, from `taximeter.metric_names`."""

from __future__ import annotations

from taximeter.metric_names import METRICS
from taximeter.reference.markdown import cell, code, table

__all__ = ["metrics_page"]

_PARTS = {
    "gateway": "gateway.metrics_address",
    "worker": "ledger.metrics_address",
    "sink": "clickhouse.metrics_address",
    "api": "api.metrics_address",
    "notifier": "notifier.metrics_address",
}
_TITLES = {"api": "Billing API"}

_INTRODUCTION = """\
A histogram's series end in `_bucket` (with `le`), `_sum` and `_count`. Beside these each part has its process's own
(`process_…`). What they are good for: `../observability.md`; rules: `deploy/prometheus/rules.yaml`."""


def metrics_page() -> str:
    """Each part's, with the series' names as queries use them."""
    sections = ["# Metrics", _INTRODUCTION]
    for part, key in _PARTS.items():
        rows = [
            (
                code(each.series[0] if each.kind != "histogram" else each.name),
                each.kind,
                code(", ".join(each.labels)),
                cell(each.text),
            )
            for each in METRICS
            if each.part == part
        ]
        sections += [
            f"## {_TITLES.get(part, part.capitalize())}",
            f"Answered where `{key}` is set.",
            table(("metric", "kind", "labels", "says"), rows),
        ]
    return "\n\n".join(sections)
