"""Endpoints in the configuration, and the command line's dead letters."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serving.notifier.deliveries import EndpointQueue
from serving.notifier.journal import Journal, NewDelivery
from serving.notifier.notifier import Notifier
from taximeter import compose_serving
from taximeter.cli import application
from taximeter.config import load
from taximeter.errors import ConfigError
from taximeter.metrics import notifier_metrics

GOOD = base64.b64encode(b"s" * 32).decode()
OTHER = base64.b64encode(b"t" * 24).decode()


def configured(folder: Path, secret: str = GOOD, **keys: Any) -> Path:
    (folder / "secret").write_text(secret)
    values = {"url": "https://hooks.example/x", "secret_file": str(folder / "secret"), **keys}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    path = folder / "taximeter.toml"
    journal = f'[notifier]\njournal_path = "{folder}/journal.sqlite"\n'
    path.write_text(f"{journal}[notifier.endpoints.ops]\n" + "\n".join(lines))
    return path


def test_an_endpoint_is_read_with_its_secrets_and_shows_none(tmp_path: Path) -> None:
    path = configured(tmp_path, f"whsec_{GOOD}\n\n{OTHER}\n", rules=["token_burst"], severities=["critical"], tenants=["a"])
    settings = compose_serving.notifier_settings(load(path))
    [endpoint] = settings.endpoints
    assert (endpoint.name, endpoint.secrets) == ("ops", (b"s" * 32, b"t" * 24))
    filters = [*endpoint.rules, *endpoint.severities, *endpoint.tenants]
    assert filters == ["token_burst", "critical", "a"]
    assert not endpoint.allow_private
    assert "hooks.example" not in repr(settings)
    assert "ssss" not in repr(settings)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"url": "http://hooks.example"}, "url is not encrypted: write https://, or set allow_plaintext"),
        ({"url": "ftp://hooks.example"}, "url is not https://HOST"),
        ({"url": "https://user:pass@hooks.example"}, "without a user and a fragment"),
        ({"url": "https://hooks.example:99999/"}, "url is not https://HOST"),
        ({"rules": ["token_brust"]}, "rules has 'token_brust', which is none: the nearest is token_burst"),
        ({"severities": ["worst"]}, "severities has 'worst', which is none"),
        ({"secret_file": None}, "format standard is signed: set secret_file"),
        ({"forma": "standard"}, "notifier.endpoints.ops.forma"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused_and_named(tmp_path: Path, keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(configured(tmp_path, **keys))
    assert problem in str(refused.value)
    assert "notifier.endpoints.ops" in str(refused.value)
    assert "user:pass" not in str(refused.value)


@pytest.mark.parametrize(
    ("secret", "problem"),
    [
        ("", "has 0 lines"),
        (f"{GOOD}\n{GOOD}\n{GOOD}", "has 3 lines"),
        ("not base64!", "is not base64 of 24 to 64 bytes"),
        (base64.b64encode(b"short").decode(), "is not base64 of 24 to 64 bytes"),
    ],
)
def test_a_secret_that_is_none_is_refused_and_not_shown(tmp_path: Path, secret: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        compose_serving.notifier_settings(load(configured(tmp_path, secret)))
    assert not secret or secret not in str(refused.value)


def test_without_endpoints_there_is_nothing_to_run() -> None:
    with pytest.raises(ConfigError, match=r"add \[notifier\.endpoints\.NAME\]"):
        compose_serving.notifier_settings(load())


def run(path: Path, *arguments: str, exit_code: int = 0) -> Any:
    ended = CliRunner().invoke(application(), ["webhooks", "dead", *arguments, "--config", str(path), "--json"])
    assert ended.exit_code == exit_code, ended.output
    return json.loads(ended.stdout)


def test_dead_letters_are_listed_retried_and_dropped_from_the_command_line(tmp_path: Path) -> None:
    path = configured(tmp_path)
    assert "run this where the notifier runs" in run(path, "list", exit_code=1)["error"]
    journal = Journal(tmp_path / "journal.sqlite", dead_max=9)
    for name in ("a", "b", "c"):
        journal.take(name, [NewDelivery("ops", f"{name}-r1", name, b"{}", "no room")])
    listed = run(path, "list")
    assert [(row["endpoint"], row["webhook_id"], row["reason"]) for row in listed] == [
        ("ops", f"{name}-r1", "no room") for name in ("a", "b", "c")
    ]
    assert listed[0]["dead"].startswith("20")
    assert run(path, "list", "--endpoint", "other") == []
    assert "name some, or --endpoint, or --all" in run(path, "retry", exit_code=2)["error"]
    assert [row["webhook_id"] for row in run(path, "retry", "b-r1")] == ["b-r1"]
    assert [row[2] for row in journal.waiting()] == ["b"]
    assert len(run(path, "drop", "--all")) == 2
    assert run(path, "list") == []
    journal.close()
    table = CliRunner().invoke(application(), ["webhooks", "dead", "list", "--config", str(path)])
    assert "there are none" in table.output


async def test_each_endpoint_is_scraped_by_its_name(tmp_path: Path) -> None:
    settings = compose_serving.notifier_settings(load(configured(tmp_path)))
    notifier = Notifier(settings)
    journal = Journal(settings.journal_path, dead_max=9)
    journal.take("a", [NewDelivery("ops", "a-r1", "a", b"{}", "no room"), NewDelivery("ops", "b-r1", "b", b"{}")])
    [endpoint] = settings.endpoints
    queue = notifier._queues["ops"] = EndpointQueue(endpoint, journal, settings.limits, gone=True)
    queue.outcomes["taken"] = 3
    [(number, *_)] = journal.waiting()
    journal.failed(number, "HTTP 503")
    samples = {
        (sample.name, sample.labels.get("outcome", "")): sample.value
        for family in notifier_metrics(notifier)()
        for sample in family.samples
        if sample.labels.get("endpoint", "ops") == "ops"
    }
    assert samples["taximeter_notifier_dead_letters", ""] == 1
    assert samples["taximeter_notifier_attempts_total", "taken"] == 3
    assert samples["taximeter_notifier_attempts_total", "timed_out"] == 0
    assert samples["taximeter_notifier_retrying", ""] == 1
    assert samples["taximeter_notifier_endpoint_gone", ""] == 1
    assert samples["taximeter_notifier_oldest_waiting_seconds", ""] >= 0
    assert samples["taximeter_notifier_dead_letters_dropped_total", ""] == 0
    assert samples["taximeter_notifier_behind_seconds", ""] > 0, "no broker has said where the topic ends"
    await queue.close()
    notifier._journal.close()
    journal.close()
