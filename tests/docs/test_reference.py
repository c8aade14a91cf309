"""docs/reference is made from the code: everything that there is has its place, and a page that is not current is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import typer

from billing.v1 import ledger_pb2
from sinks.tables import ALL_TABLES
from taximeter.config import Config
from taximeter.metric_names import METRICS
from taximeter.reference import __main__ as reference
from tests.test_readme import command_names

PAGES = Path(__file__).parents[2] / "docs" / "reference"


def page(name: str) -> str:
    return (PAGES / name).read_text()


def test_every_command_setting_metric_table_and_message_is_there() -> None:
    assert [f"## taximeter {name}\n" for name in command_names() if f"## taximeter {name}\n" not in page("commands.md")] == []
    for section, info in Config.model_fields.items():
        assert f"## [{section}]" in page("settings.md")
        for key in getattr(info.annotation, "model_fields", {}):
            assert f"| `{key}` |" in page("settings.md"), f"{section}.{key}"
    assert [each.name for each in METRICS if f"| `{each.name}" not in page("metrics.md")] == []
    for table in ALL_TABLES:
        _, _, rest = page("sql.md").partition(f"### {table.name}\n")
        columns = rest.partition("### ")[0]
        assert [column for column in table.columns if f"| `{column}` |" not in columns] == [], table.name
    for message in ledger_pb2.DESCRIPTOR.message_types_by_name:
        assert f"### message {message}\n" in page("protocols.md")


def test_a_page_that_is_not_current_is_named_and_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "reference"
    shutil.copytree(PAGES, folder)
    reference.main(folder, check=True)
    (folder / "metrics.md").write_text(page("metrics.md").replace("taximeter_ledger_owned", "taximeter_ledger_own"))
    (folder / "sql.md").unlink()
    with pytest.raises(typer.Exit) as ended:
        reference.main(folder, check=True)
    assert ended.value.exit_code == 1
    assert "metrics.md, sql.md are not what the code makes: run 'make docs'" in capsys.readouterr().err
    reference.main(folder, check=False)
    assert (folder / "metrics.md").read_text() == page("metrics.md")
    reference.main(folder, check=True)
