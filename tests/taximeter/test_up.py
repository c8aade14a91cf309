"""`taximeter up`, from outside: what a user sees when it is stopped, started, killed in parts, and audited."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from standardwebhooks import Webhook

from billing.v1.usage_pb2 import OUTCOME_COMPLETED
from producers.calls import CallMeter, Identity, Used
from producers.meter import MeterSettings, UsageMeter
from taximeter.compose import topic_names
from taximeter.config import load
from tests.services.brokers import consumer_of, read_to_end
from tests.serving.notifier.support import SECRET, Receiver, Request, receiving, secret_line
from tests.taximeter.gateway_before import gateway_before
from tests.taximeter.support import ROOT, SAMPLE, Up, environment, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(900)


def usage_line(request_id: str, **changes: Any) -> str:
    ended_at = (datetime.now(UTC) - timedelta(minutes=5)).isoformat()
    values = {"request_id": request_id, "tenant_id": "acme", "model": "smollm2", "ended_at": ended_at}
    return json.dumps({**values, "uncached_input_tokens": 1_000_000, "output_tokens": 500_000, **changes})


def balances(up: Up) -> dict[str, dict[str, Any]]:
    return {row["tenant_id"]: {key: value for key, value in row.items() if key != "as_of"} for row in up.json("balance")}


def in_database(up: Up, events: int, tenant_id: str = "") -> None:
    """Events, totals and accounts are there, of one tenant or of all. None is a sign of the others: the sink writes a batch's
    tables one after the other, the accounts last, and mostly shows them once more before all of them."""

    def counted(*words: str) -> int:
        return sum(row["requests"] for row in up.json(*words) if not tenant_id or tenant_id in row.values())

    until(lambda: counted("usage", "--by", "tenant") >= events and counted("balance") >= events, what=f"{events} events")


@pytest.fixture(scope="module")
def hook() -> Iterator[Receiver]:
    """Where the installation's alerts are posted."""
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, hook: Receiver) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("up")
    (folder / "hook_secret").write_text(secret_line())
    endpoint = {"url": hook.url, "secret_file": folder / "hook_secret", "allow_plaintext": "true", "allow_private": "true"}
    flags = [f"notifier.endpoints.hook.{key}={value}" for key, value in endpoint.items()]
    with Up(folder, *flags, api=True) as running:
        running.run("tenant", "create", "acme", "--name", "Acme")
        running.run("credit", "grant", "acme", "5", "--id", "first-payment")
        yield running


def test_stopped_and_started_twice_balances_are_as_before_and_new_usage_adds(tmp_path: Path) -> None:
    lines = tmp_path / "usage.jsonl"
    with Up(tmp_path / "data") as up:
        up.run("tenant", "create", "acme")
        up.run("credit", "grant", "acme", "5")
        lines.write_text(usage_line("r-1"))
        up.run("import", lines)
        in_database(up, 1)
        before = balances(up)
    assert before["acme"]["spend"] == "0.30"
    assert before["acme"]["balance"] == "4.70"
    with Up(tmp_path / "data") as up:
        assert balances(up) == before
        lines.write_text(f"{usage_line('r-1')}\n{usage_line('r-2')}\n")
        up.run("import", lines)
        in_database(up, 2)
        between = balances(up)
    # The first was known over the restart. Its time differs, so it is a conflict: reported, and not charged.
    assert between["acme"]["spend"] == "0.60"
    assert (between["acme"]["requests"], between["acme"]["conflicts"]) == (2, 1)
    with Up(tmp_path / "data") as up:
        assert balances(up) == between
        assert up.json("audit")["findings"] == []
        # What runs for a moment may not have written anything within the few seconds that the doctor looks.
        until(lambda: {check["state"] for check in up.json("doctor", expected=None)} <= {"well", "skipped"}, what="its health")


def test_every_part_runs_and_the_broker_beside_them(up: Up) -> None:
    assert up.pids().keys() == {"broker", "worker", "sink", "api", "notifier"}


def test_credit_granted_twice_under_one_id_counts_once(up: Up) -> None:
    assert "this ID was granted before" in up.json("credit", "grant", "acme", "5", "--id", "first-payment")["granted"]
    assert balances(up)["acme"]["credit"] == "5.00"


def test_a_top_up_is_answered_the_same_and_an_account_explains_what_is_refused(up: Up, tmp_path: Path) -> None:
    up.json("tenant", "create", "beta", "--time-zone", "America/Los_Angeles", "--rule", "key_places_max=3")
    rules, founded = up.json("rules", "show", "beta")["figures"], up.json("rules", "show")["figures"]
    assert (rules["key_places_max"], rules["burst_tokens_floor"]) == (3, founded["burst_tokens_floor"])
    assert founded["key_places_max"] == 8
    top_up = ("credit", "topup", "beta", "2.50", "--grant-id", "pi_1", "--reference", "receipt 7")
    first = up.json(*top_up)
    assert (first["amount"], first["currency"], first["grant_id"]) == ("2.50", "USD", "pi_1")
    assert up.json(*top_up) == first
    assert "a name of its own" in up.json("credit", "topup", "beta", "3", "--grant-id", "pi_1", expected=1)["error"]
    up.json("credit", "grant", "beta", "1", "--kind", "promotional", "--expires", "2100-01-01")
    up.json("project", "create", "beta", "search", "--name", "Search")
    [budget] = up.json("budget", "set", "beta", "0.10", "--project", "search", "--hard-stop", "--warn-at", "50")["budgets"]
    assert (budget["amount"], budget["spend"], budget["warns_at_percent"]) == ("0.10", "0.00", ["50.0"])
    lines = tmp_path / "usage.jsonl"
    # Now: a budget is of the month that is under way, in Los Angeles.
    now = datetime.now(UTC).isoformat()
    lines.write_text(f"{usage_line('beta-1', tenant_id='beta', project_id='search', ended_at=now)}\n")
    up.json("import", str(lines))
    in_database(up, 1, "beta")
    assert up.json("budget", "list", "beta")[0]["used_up"]
    assert [alert["rule"] for alert in up.json("alerts", "beta")] == ["budget"]
    shown = up.json("account", "show", "beta")
    assert (shown["credit"], shown["spend"], shown["not_set_against_grants"]) == ("3.50", "0.30", "0.30")
    assert [(each["grant_id"] == "pi_1", each["kind"], each["left"]) for each in shown["grants"]] == [
        (True, "paid", "2.50"),
        (False, "promotional", "1.00"),
    ]
    [why] = shown["refuses"]
    assert "requests of project search are refused" in why
    up.json("producer", "register", "reports-*", "--tenant", "beta")
    [producer] = up.json("producer", "list")
    assert (producer["producer"], producer["bills"], producer["state"]) == ("reports-*", ["beta"], "registered")
    assert (producer["since"], producer["last_seen"]) == (producer["changed"], "-")
    up.json("project", "close", "beta", "search")
    assert up.json("tenant", "show", "beta")["projects"] == [{"project_id": "search", "name": "Search", "closed": True}]
    assert up.json("tenant", "suspend", "beta")["status"] == "suspended"
    assert "the account is suspended" in up.json("account", "show", "beta")["refuses"][0]
    closed = up.json("tenant", "close", "beta")
    assert "2.50 USD that was paid for is left" in closed["outcome"]
    assert up.json("tenant", "activate", "beta")["status"] == "active"
    assert up.json("report", "credit", "--from", "2026-01", "--to", "2026-02")["rows"] == []
    assert up.run("report", "credit", "--from", "2026-01", "--to", "2026-01", "--csv").startswith(
        "tenant_id,currency,kind,opening"
    )
    assert "is not over" in up.json("report", "credit", "--from", "2026-01", "--to", "2199-01", expected=2)["error"]


def test_the_ledger_refuses_in_its_own_words(up: Up) -> None:
    assert "is not known: create it" in up.json("credit", "grant", "nobody", "5", expected=1)["error"]
    assert "tenant_id: nobody is not known; create the tenant first" in up.json("key", "create", "nobody", expected=1)["error"]


def test_a_key_is_shown_once_and_stands_nowhere(up: Up) -> None:
    secret: str = up.json("key", "create", "acme", "--project", "search")["secret"]
    folder = up.data_dir.path
    assert len(secret) > 40
    holders, looked_at = [], 0
    # The databases that run there replace their files and folders: what has gone meanwhile is passed over.
    for place, _, names in os.walk(folder):
        for path in (Path(place) / name for name in names):
            with contextlib.suppress(FileNotFoundError):
                looked_at += 1
                if path.is_file() and secret.encode() in path.read_bytes():
                    holders.append(path)
    assert looked_at > 20
    assert holders == []


def test_prices_are_applied_once_in_order(up: Up, tmp_path: Path) -> None:
    book = tmp_path / "book.toml"
    book.write_text('version = 3\ncurrency = "USD"\neffective = "2026-01-01T00:00:00Z"\n[[prices]]\nmodel = "*"\ninput = "1"\n')
    assert "the next one of USD is 2" in up.json("prices", "apply", book, expected=1)["error"]
    assert up.json("prices", "apply", book, "--dry-run")["applied"] is False
    book.write_text(book.read_text().replace("version = 3", "version = 1"))
    assert "version 1 of USD was applied before" in up.json("prices", "apply", book, expected=1)["error"]


def test_a_bad_line_is_named_and_nothing_is_imported(up: Up, tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_text(f"{usage_line('b-1', tenant_id='bad')}\n{usage_line('b-2', tenant_id='bad', output_tokens=-1)}\n")
    error = up.json("import", path, expected=1)["error"]
    assert "1 of 2 lines are bad, and nothing was imported" in error
    assert "line 2: output_tokens: -1 is negative" in error
    assert "bad" not in balances(up)


def test_rejects_are_kept_as_they_were_and_can_be_mended(up: Up, tmp_path: Path) -> None:
    path, rejects = tmp_path / "usage.jsonl", tmp_path / "rejects.jsonl"
    bad = usage_line("m-2", tenant_id="mender", output_tokens=1.5)
    path.write_text(f"{usage_line('m-1', tenant_id='mender')}\n{bad}\n")
    result = up.json("import", path, "--rejects", rejects, expected=1)
    assert (result["events"], result["rejected"]) == (1, 1)
    assert rejects.read_text() == f"{bad}\n"
    assert "line 2: output_tokens: 1.5 is no whole number" in (tmp_path / "rejects.jsonl.reasons").read_text()
    mended = tmp_path / "mended.jsonl"
    # By its name: "1.5" may stand in the line's time as well.
    mended.write_text(json.dumps(json.loads(bad) | {"output_tokens": 15}))
    up.run("import", mended)
    in_database(up, 2, "mender")


def test_a_backfill_is_charged_once_though_the_ledger_forgets(up: Up, tmp_path: Path) -> None:
    """In another file it is not the same run: what the database has as charged is left out before the ledger is asked."""
    path = tmp_path / "usage.jsonl"
    old = usage_line("old-1", tenant_id="old", ended_at="2020-01-31T12:00:00Z", backfill=True)
    path.write_text(f"{old}\n")
    result = up.json("import", path)
    assert (result["recorded"], result["charged_before"]) == (1, 0)
    in_database(up, 1, "old")
    path.write_text(f"{old}\n{old.replace('old-1', 'old-2')}\n")
    result = up.json("import", path)
    assert (result["events"], result["recorded"], result["charged_before"]) == (2, 1, 1)
    in_database(up, 2, "old")
    account = balances(up)["old"]
    assert (account["requests"], account["duplicates"], account["conflicts"]) == (2, 0, 0)


def test_a_journal_from_a_box_without_a_network_is_synced_once(up: Up, tmp_path: Path) -> None:
    journal = tmp_path / "usage.journal"
    meter = UsageMeter(MeterSettings(journal, partitions=4))
    calls = CallMeter(meter)
    for units in range(1, 4):
        calls.begin(Identity("far-away"), "smollm2").close(OUTCOME_COMPLETED, Used(output_tokens=units)).durable()
    meter.close()
    copy = tmp_path / "stick" / "usage.journal"
    copy.parent.mkdir()
    copy.write_bytes(journal.read_bytes())
    assert up.json("sync", copy) == {"events": 3, "left_open_by_a_kill": 0}
    # The box goes on, dies within a request, and comes to the network itself: only what is new is sent.
    meter = UsageMeter(MeterSettings(journal, partitions=4))
    CallMeter(meter).begin(Identity("far-away"), "smollm2").progress(Used(output_tokens=100)).durable()
    meter.close()
    assert up.json("sync", journal)["left_open_by_a_kill"] == 1
    in_database(up, 4, "far-away")
    assert up.json("sync", journal) == {"events": 0, "left_open_by_a_kill": 0}
    (row,) = [row for row in up.json("usage", "--by", "tenant") if "far-away" in row.values()]
    assert row["output_tokens"] == 106


def test_statement_and_usage_add_up(up: Up, tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_text(f"{usage_line('s-1', tenant_id='books')}\n{usage_line('s-2', tenant_id='books', model='trace')}\n")
    up.run("tenant", "create", "books")
    up.run("import", path)
    in_database(up, 2, "books")
    statement = up.json("statement", "books")
    assert (statement["charged"], statement["closing"]) == ("1.55", "-1.55")
    assert sorted(line["amount"] for line in statement["lines"]) == ["0.10", "0.20", "0.50", "0.75"]
    # 0.10 + 0.20 for smollm2, 0.50 + 0.75 for trace.
    assert sorted(line["cost"] for line in up.json("usage", "books", "--by", "model")) == ["0.30", "1.25"]


def test_a_broker_that_was_killed_comes_back_on_the_local_state(up: Up) -> None:
    before = balances(up)
    up.kill9("broker")
    until(lambda: "worker" in up.pids(), what="the worker's return")
    assert balances(up) == before
    result = up.json("replay", SAMPLE, "--tenants", "3", "--start", "1d")
    assert result["recorded"] == 200
    until(
        lambda: sum(row["requests"] for name, row in balances(up).items() if name.startswith("trace-tenant")) == 200,
        what="the replayed events",
    )
    assert up.json("audit")["findings"] == []


def test_nothing_is_left_to_apply_and_a_look_changes_nothing(up: Up) -> None:
    assert up.json("topics", "apply", "--dry-run") == {"dry_run": True, "changes": []}
    assert up.json("migrate", "--dry-run") == {"dry_run": True, "migrations": []}


def test_the_ledgers_figures_of_rules_are_changed_by_one_command_in_every_partition(up: Up) -> None:
    before = up.json("rules", "show")["figures"]
    assert before["burst_factor"] != 7
    changed = up.json("rules", "set", "burst_factor=7", "resolve_minutes=30", "key_places:stop=60", "--reason", "quieter")
    assert changed["changed"] == ["burst_factor", "resolve_minutes"]
    shown = up.json("rules", "show")
    assert shown["figures"] == before | {"burst_factor": 7, "resolve_minutes": 30}
    assert shown["actions"] == ["key_places:stop=60"]
    # A tenant that has no figures of its own has them too, and gateways what rules do.
    assert up.json("rules", "show", "acme")["figures"]["burst_factor"] == 7
    minutes = before["resolve_minutes"]
    up.json("rules", "set", f"burst_factor={before['burst_factor']}", f"resolve_minutes={minutes}", "--drop-actions")
    assert up.json("rules", "show") == {"tenant_id": "", "figures": before, "actions": []}
    assert up.json("audit")["findings"] == []


def test_alerts_are_followed_as_they_come_and_reach_the_webhook(up: Up, hook: Receiver, tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_text(usage_line("a-1", tenant_id="stranger"))
    with subprocess.Popen(
        up.command("alerts", "stranger", "--follow", "--json"), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    ) as following:
        assert following.stdout is not None
        up.run("import", path)
        alert = json.loads(following.stdout.readline())
        following.terminate()
    assert (alert["tenant_id"], alert["rule"]) == ("stranger", "unknown_tenant")

    def posted() -> list[Request]:
        return [request for request in hook.requests if request.values["data"]["alert_id"] == alert["alert_id"]]

    # The broker was killed since, and the topic was made anew.
    until(posted, what="the webhook")
    told = Webhook(SECRET).verify(posted()[0].body, posted()[0].headers)
    assert (told["type"], told["data"]["tenant_id"]) == ("alert.raised", "stranger")
    assert up.json("webhooks", "dead", "list") == []


def test_the_gateway_serves_and_bills_on_after_the_broker_forgot_and_beside_one_of_the_version_before(tmp_path: Path) -> None:
    with Up(tmp_path / "data", gateway=True) as up:
        gateway = up.pids()["gateway"]
        for kills in range(2):
            result = up.json("replay", SAMPLE, "--tenants", "2", "--through", "gateway", "--start", "1d")
            assert result["answered"] == 200
            in_database(up, 200 * (kills + 1))
            if kills == 0:
                up.kill9("broker")
                until(lambda: "sink" in up.pids(), what="the sink's return")
        assert up.pids()["gateway"] == gateway
        with gateway_before(up, tmp_path) as port:
            asked = ("replay", SAMPLE, "--tenants", "2", "--through", "gateway", "--start", "1d")
            assert up.json(*asked, "--set", f"gateway.port={port}")["answered"] == 200
            assert up.json(*asked)["answered"] == 200
            in_database(up, 800)
        assert up.json("audit")["findings"] == []
        assert up.json("audit", "--completeness")["missing"] == []


def test_a_second_up_in_the_same_folder_is_refused(up: Up) -> None:
    refused = subprocess.run(up.command("up"), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert up.alive


def test_an_event_is_voided_after_its_difference_was_shown(up: Up, tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_text(f"{usage_line('v-1', tenant_id='voided')}\n{usage_line('v-2', tenant_id='voided')}\n")
    up.run("tenant", "create", "voided")
    up.run("import", path)
    in_database(up, 2, "voided")
    arguments = ("events", "void", "voided", "v-1", "--reason", "a test of ours")
    shown = up.json(*arguments)
    assert (shown["applied"], [tenant["difference"] for tenant in shown["tenants"]]) == (False, ["-0.30"])
    assert balances(up)["voided"]["spend"] == "0.60"
    assert up.json(*arguments, "--apply")["adjustments"] == shown["adjustments"]
    assert balances(up)["voided"]["spend"] == "0.30"
    assert "v-1 was corrected by void-" in up.json(*arguments, "--apply", expected=1)["error"]
    assert up.json("statement", "voided")["corrections"][0]["reason"] == "a test of ours"


def test_a_user_is_erased_after_the_rows_were_shown_and_comes_back_as_nobody(up: Up, tmp_path: Path) -> None:
    path, user = tmp_path / "usage.jsonl", "maria@example.org"
    path.write_text(f"{usage_line('e-1', tenant_id='forgetful', user_id=user)}\n{usage_line('e-2', tenant_id='forgetful')}\n")
    up.run("tenant", "create", "forgetful")
    up.run("budget", "set", "forgetful", "100", "--user", user)
    key_id = up.json("key", "create", "forgetful", "--user", user)["key_id"]
    up.run("import", path)
    in_database(up, 2, "forgetful")
    arguments = ("user", "erase", "forgetful", user, "--reason", "request 4711")
    shown = up.json(*arguments)
    assert (shown["applied"], shown["pseudonym"], shown["rows"]["usage_events"]) == (False, None, 1)
    before = balances(up)["forgetful"]
    erased = up.json(*arguments, "--apply")
    assert erased["done"]
    path.write_text(usage_line("e-3", tenant_id="forgetful", user_id=user) + "\n")
    up.run("import", path)
    in_database(up, 3, "forgetful")
    by_user = {row["user"]: row["requests"] for row in up.json("usage", "forgetful", "--by", "user")}
    assert by_user == {"": 1, erased["pseudonym"]: 2}
    shown = [(key_id, erased["pseudonym"])]
    # From their topic, to which they come after the database has them.
    until(lambda: [(key["key_id"], key["user"]) for key in up.json("key", "list", "forgetful")] == shown, what="the key's user")
    assert up.json("budget", "list", "forgetful") == []
    assert before["spend"] == "0.60"
    assert balances(up)["forgetful"]["spend"] == "0.90"
    again = up.json(*arguments, "--apply")
    assert (again["pseudonym"], set(again["rows"].values())) == (erased["pseudonym"], {0})
    audited = up.json("audit")
    assert (audited["findings"], audited["redacted_records"] > 0) == ([], True)
    until(lambda: kept_of_budgets(up, "forgetful") == {None}, what="the tombstone of the user's budget")


def kept_of_budgets(up: Up, tenant_id: str) -> set[bytes | str | None]:
    """What compaction leaves of the tenant's budgets on `billing.accounts`: the last value of each key."""
    state = up.data_dir.running()
    assert state is not None
    config = load(state.config_path)
    last: dict[bytes | str | None, bytes | str | None] = {}
    with closing(consumer_of(config.kafka.bootstrap)) as consumer:
        for partition in range(config.ledger.partitions):
            messages, _ = read_to_end(consumer, topic_names(config).accounts, partition, 0)
            last |= {message.key(): message.value() for message in messages}
    beginning = f"budget/{tenant_id}/".encode()
    return {value for key, value in last.items() if isinstance(key, bytes) and key.startswith(beginning)}


def test_a_book_is_shown_edited_checked_compared_and_applied(up: Up, tmp_path: Path) -> None:
    """In euros, in which nobody else in this file is billed: the others' prices stay."""
    path, book = tmp_path / "usage.jsonl", tmp_path / "book.json"
    first = up.json("prices", "show", "--currency", "USD") | {"currency": "EUR"}
    book.write_text(json.dumps(first))
    assert up.json("prices", "apply", book)["applied"] is True
    up.json("tenant", "create", "priced", "--currency", "EUR")
    ended = datetime.now(UTC)
    path.write_text(f"{usage_line('p-1', tenant_id='priced', ended_at=ended.isoformat())}\n")
    up.json("import", path)
    in_database(up, 1, "priced")
    # What is shown is a file of the same book.
    shown = up.json("prices", "show", "--currency", "EUR")
    assert shown == first
    shown |= {"version": 2, "effective": "2026-01-01T00:00:00Z"}
    shown["prices"][0]["output"] = "0.45"
    gone = {**shown, "prices": [line for line in shown["prices"] if line["model"] != "smollm2*"]}
    book.write_text(json.dumps(gone))
    checked = up.json("prices", "check", book, expected=1)
    assert checked["problems"] == []
    assert [(entry["model"], entry["events"], entry["tenant_ids"]) for entry in checked["unpriced"]] == [
        ("smollm2", 1, ["priced"])
    ]
    assert "no price for smollm2, operation" in up.json("prices", "apply", book, expected=1)["error"]
    book.write_text(json.dumps(shown))
    assert up.json("prices", "check", book)["notes"][0].startswith("it takes effect at 2026-01-01T00:00:00.000Z, which is over")
    [change] = up.json("prices", "diff", book)["changes"]
    assert (change["model"], change["what"], change["before"], change["after"]) == (
        "smollm2*",
        "output",
        "0.40 per million",
        "0.45 per million",
    )
    [simulated] = up.json("prices", "simulate", book, "--month", f"{ended:%Y-%m}")
    # Half a million output tokens at 0.45 and not 0.40 a million.
    assert (simulated["tenant_id"], simulated["before"], simulated["after"]) == ("priced", "0.30", "0.325")
    assert simulated["difference"] == "0.025"
    assert up.json("prices", "apply", book)["applied"] is True
    assert up.json("prices", "show", "--currency", "EUR")["version"] == 2
    assert up.json("prices", "show", "--currency", "EUR", "--at", "2025-12-31")["version"] == 1
    assert up.json("prices", "show", "--currency", "USD")["version"] == 1


def test_a_month_is_drafted_invoiced_once_and_shown(up: Up, tmp_path: Path) -> None:
    up.run("tenant", "create", "payer", "--name", "Payer Ltd", "--postpaid")
    last_day = datetime.now(UTC).replace(day=1, hour=12) - timedelta(days=1)
    month = f"{last_day:%Y-%m}"
    lines = tmp_path / "usage.jsonl"
    lines.write_text(usage_line("last-month", tenant_id="payer", ended_at=last_day.isoformat()))
    up.run("import", lines)
    terms = ("--month", month, "--tax", "VAT=19%", "--seller", "Seller Ltd", "--buyer", "Payer Ltd")
    draft = up.json("invoice", "draft", "payer", *terms)
    assert (draft["status"], draft["number"], draft["net"]) == ("draft", None, "0.30")
    page = tmp_path / "draft.html"
    up.run("invoice", "draft", "payer", "--format", "html", "--output", str(page), *terms)
    assert "DRAFT: not an invoice" in page.read_text()
    # On the first of a month, others in this file have used something in the last one too.
    [drawn] = [each for each in up.json("invoice", "finalize", "--all", *terms) if each["tenant_id"] == "payer"]
    # 19 % of 0.30 is 0.057.
    assert drawn == {"invoice": drawn["invoice"], "tenant_id": "payer", "currency": "USD", "total": "0.36", "due": "0.36"}
    again = up.json("invoice", "finalize", "--all", *terms)
    assert [each for each in again if each["tenant_id"] == "payer"] == []
    refused = up.json("invoice", "finalize", "payer", *terms, expected=1)
    assert "stands on the next invoice" in refused["error"]
    [listed] = up.json("invoice", "list", "--tenant", "payer")
    shown = up.json("invoice", "show", drawn["invoice"])
    assert (listed["invoice"], listed["sha256"]) == (drawn["invoice"], shown["sha256"])
    assert [line["amount"] for line in shown["lines"]] == [line["amount"] for line in draft["lines"]]
    table = up.run("invoice", "show", drawn["invoice"])
    assert "VAT 19 %" in table
    assert "uncached_input_tokens" in table
    assert "is not known" in up.json("invoice", "show", "INV-0099-1", expected=1)["error"]
    assert up.json("audit")["findings"] == []
