"""The configuration: what wins, what is refused and how it is told, and that no secret is ever shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import taximeter
from billing.key_ring import as_ring
from billing.rule_limits import PLAN_RULE_DEFAULTS, RULE_LIMIT_NAMES
from billing.v1.alert_pb2 import ALERT_RULE_KEY_PLACES
from taximeter.compose import apply_settings, key_ring
from taximeter.config import Config, load, read_secret
from taximeter.config_text import to_json_values, to_toml
from taximeter.errors import ConfigError
from taximeter.rules_config import RulesConfig

CANARY = "canary-7f3a"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "given.toml"
    path.write_text(text)
    return path


def refusal(path: Path | None = None, flags: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, flags)
    return str(caught.value)


def test_flags_win_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, '[kafka]\nbootstrap = "localhost:1"\ntopic_prefix = "file"\nreplication_factor = 2\n')
    monkeypatch.setenv("TAXIMETER_KAFKA__BOOTSTRAP", "localhost:2")
    monkeypatch.setenv("TAXIMETER_KAFKA__TOPIC_PREFIX", "environment")
    config = load(path, ("kafka.bootstrap=localhost:3",))
    assert config.kafka.bootstrap == "localhost:3"
    assert config.kafka.topic_prefix == "environment"
    assert config.kafka.replication_factor == 2


def test_the_file_in_the_working_directory_is_found(tmp_path: Path) -> None:
    (tmp_path / "taximeter.toml").write_text("[ledger]\npartitions = 7\n")
    assert load().ledger.partitions == 7


def _keys(section: type[BaseModel]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation)
        else:
            yield name


def test_every_key_is_read_somewhere() -> None:
    """A key that nothing reads is taken, and nothing comes of it."""
    folder = Path(taximeter.__file__).parent
    code = "".join(path.read_text() for path in folder.rglob("*.py"))
    read = {*re.findall(r"\.([a-z_]+)\b", code), *re.findall(r'"([a-z_]+)"', code), *RULE_LIMIT_NAMES}
    # `read_secret` is asked for the secret, and looks for its file.
    read |= {f"{name}_file" for name in read}
    assert [name for name in _keys(Config) if name not in read] == []


def test_defaults_stand_without_any_source() -> None:
    assert load() == Config()


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ('[kafka]\nbootstrapp = "x"\n', "kafka.bootstrapp", "kafka.bootstrap"),
        ("[ledgr]\npartitions = 4\n", "ledgr", "ledger"),
        ('[models.profiles.a]\nbackendd = "vllm"\n', "models.profiles.a.backendd", "models.profiles.a.backend"),
    ],
)
def test_an_unknown_key_names_itself_its_source_and_the_nearest(tmp_path: Path, text: str, unknown: str, nearest: str) -> None:
    path = write(tmp_path, text)
    assert refusal(path) == f"{unknown} ({path}) is no key: the nearest is {nearest}"


def test_an_unknown_key_of_a_flag_or_the_environment_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gateway.prot (a flag) is no key: the nearest is gateway.port" in refusal(flags=("gateway.prot=1",))
    monkeypatch.setenv("TAXIMETER_GATEWAY__PROT", "1")
    assert "environment TAXIMETER_GATEWAY__PROT) is no key: the nearest is gateway.port" in refusal()


def test_a_table_in_the_environment_is_json_and_a_wrong_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAXIMETER_MODELS__TOKENIZERS", '{"a": "/b"}')
    monkeypatch.setenv("TAXIMETER_MODELS__PROFILES__M__TOKENIZER", "a")
    assert load().models.profiles["m"].tokenizer == "a"
    monkeypatch.setenv("TAXIMETER_MODELS__TOKENIZERS", "{")
    assert "a table or a list is written as JSON" in refusal()


def test_an_unknown_section_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAXIMETER_KAFK__BOOTSTRAP", "x")
    assert refusal() == ("environment variable TAXIMETER_KAFK__BOOTSTRAP names no key: write TAXIMETER_KAFKA__KEY, or unset it")


def test_a_wrong_value_is_shown_with_its_bound(tmp_path: Path) -> None:
    path = write(tmp_path, "[kafka]\nreplication_factor = 99\n")
    assert refusal(path) == f"kafka.replication_factor ({path}) is 99: Input should be less than or equal to 9"


def test_a_wrong_secret_is_not_shown(tmp_path: Path) -> None:
    path = write(tmp_path, f'[ledger]\nseal_key = ["{CANARY}"]\n')
    assert "ledger.seal_key" in refusal(path)
    assert CANARY not in refusal(path)


def test_secrets_are_masked_everywhere(tmp_path: Path) -> None:
    config = load(write(tmp_path, f'[clickhouse]\npassword = "{CANARY}"\n'))
    for shown in (repr(config), str(config), to_toml(config, show_masked=True), str(to_json_values(config))):
        assert CANARY not in shown
    assert "# password is set" in to_toml(config, show_masked=True)
    assert read_secret(config.clickhouse, "password", needed_for="a test") == CANARY.encode()


def test_a_secret_comes_from_its_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{CANARY}\n")
    config = load(flags=(f"ledger.seal_key_file={secret}",))
    assert read_secret(config.ledger, "seal_key", needed_for="a test") == CANARY.encode()


def test_a_missing_secret_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ledger\.seal_key is not set and the worker needs it: set ledger\.seal_key_file"):
        read_secret(load().ledger, "seal_key", needed_for="the worker")
    config = load(flags=(f"ledger.seal_key_file={tmp_path / 'absent'}",))
    with pytest.raises(ConfigError, match=r"seal_key_file .*absent cannot be read"):
        read_secret(config.ledger, "seal_key", needed_for="the worker")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[kafka]\nsecurity_protocol = "SASL_SSL"\n', "needs sasl_mechanism and sasl_username"),
        ('[gateway]\ntls_key_file = "k"\n', "belong together"),
        ('[models.profiles.a]\nbackend = "generic"\n', "name a tokenizer"),
        ('[models.profiles.a]\ntokenizer = "b"\n', "add it to [models.tokenizers]"),
        (f'[models.fingerprints]\nb = "{"0" * 64}"\n', "fingerprints.b is of no tokenizer"),
        ("[kafka\n", "is not TOML"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in refusal(write(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "absent.toml cannot be read" in refusal(tmp_path / "absent.toml")


def test_a_flag_that_is_none_is_named() -> None:
    assert "--set 'kafka' is not section.key=value" in refusal(flags=("kafka",))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = load(
        flags=(
            "models.tokenizers.odd name=/a/b",
            "models.profiles.m.tokenizer=odd name",
            'gateway.server_id=quote " and \\ and ünï',
        )
    )
    assert load(write(tmp_path, to_toml(config, show_masked=False))) == config


@pytest.mark.parametrize(
    ("section", "plain", "encrypted"),
    [
        ("kafka", 'bootstrap = "127.0.0.1:9092,kafka:9092"', 'security_protocol = "SSL"'),
        ("kafka", 'bootstrap = "10.0.0.1:9092"', 'security_protocol = "SSL"'),
        (
            "kafka",
            'bootstrap = "kafka:9092"\nsasl_mechanism = "PLAIN"\nsasl_username = "u"\nsecurity_protocol = "SASL_PLAINTEXT"',
            None,
        ),
        ("clickhouse", 'engine = "server"\nhost = "clickhouse"', "tls = true"),
        ("gateway", 'host = "0.0.0.0"', 'tls_certificate_file = "c"\ntls_key_file = "k"'),
        ("gateway", 'host = "::"', 'tls_certificate_file = "c"\ntls_key_file = "k"'),
        ("gateway", 'upstream = "dns:///triton:8001"', 'upstream_ca_file = "ca"'),
    ],
)
def test_other_machines_are_spoken_to_in_tls_unless_it_is_told(
    tmp_path: Path, section: str, plain: str, encrypted: str | None
) -> None:
    assert "allow_plaintext = true" in refusal(write(tmp_path, f"[{section}]\n{plain}\n"))
    load(write(tmp_path, f"[{section}]\n{plain}\nallow_plaintext = true\n"))
    if encrypted is not None:
        load(write(tmp_path, f"[{section}]\n{plain}\n{encrypted}\n"))


@pytest.mark.parametrize("upstream", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/triton.sock", "dns:///127.0.0.2:1"])
def test_this_machine_needs_no_tls(upstream: str) -> None:
    assert load(flags=(f"gateway.upstream={upstream}",)).gateway.upstream == upstream


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('tls_client_ca_file = "a"', "set tls_certificate_file too"),
        ('upstream_certificate_file = "a"', "upstream_certificate_file and upstream_key_file belong together"),
        ('upstream_certificate_file = "a"\nupstream_key_file = "b"', "set upstream_ca_file too"),
    ],
)
def test_certificates_that_would_not_be_used_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in refusal(write(tmp_path, f"[gateway]\n{text}\n"))


@pytest.mark.parametrize("field", ["seal_key", "command_key"])
def test_a_ring_of_keys_is_read_and_a_wrong_one_is_told_without_its_secrets(tmp_path: Path, field: str) -> None:
    secret = tmp_path / "ring"
    secret.write_text(f"2 {CANARY}\n- old\n")
    config = load(flags=(f"ledger.{field}_file={secret}",))
    ring = key_ring(config, field, needed_for="a test")  # type: ignore[arg-type]
    assert as_ring(ring).signing == ("2", CANARY.encode())
    assert CANARY not in repr(ring)
    secret.write_text(f"2 {CANARY} old\n")
    with pytest.raises(ConfigError, match=rf"ledger\.{field} line 1: has 3 words") as caught:
        key_ring(config, field, needed_for="a test")  # type: ignore[arg-type]
    assert CANARY not in str(caught.value)


def test_a_new_ledger_is_founded_with_the_rules_that_are_configured(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[ledger]\nseal_key = "s"\n[ledger.rules]\nburst_factor = 4\nrefused_requests = 0\nresolve_minutes = 30\n'
        'counting_drift_percent = 1.5\nactions = ["key_places:stop=60"]\n',
    )
    config = load(path, ("ledger.rules.burst_requests_floor=50",))
    founding = apply_settings(config, embedded=False).ledger.to_founding(1)
    plan = founding.default_plan
    assert (plan.burst_factor, plan.rules.refused_requests, plan.rules.burst_requests_floor) == (4, 0, 50)
    assert (founding.alert_resolve_ms, founding.drift_millionths) == (1_800_000, 15_000)
    [action] = plan.rules.actions
    assert (action.rule, action.duration_ms) == (ALERT_RULE_KEY_PLACES, 3_600_000)
    # What is not named has the domain's default, and no figure is without a key.
    assert (plan.burst_tokens_floor, plan.rules.cancelled_percent) == (1_000_000, 50)
    figures = {*RULE_LIMIT_NAMES, *PLAN_RULE_DEFAULTS, "actions", "counting_drift_percent", "resolve_minutes"}
    assert set(RulesConfig.model_fields) == figures


def test_rules_that_cannot_be_meant_are_refused_by_their_key(tmp_path: Path) -> None:
    assert "ledger.rules.key_places_max" in refusal(flags=("ledger.rules.key_places_max=99",))
    assert "the nearest is ledger.rules.burst_factor" in refusal(flags=("ledger.rules.burst_facto=1",))
    config = load(write(tmp_path, '[ledger]\nseal_key = "s"\n[ledger.rules]\nactions = ["budget:slow=1"]\n'))
    with pytest.raises(ConfigError, match=r"^ledger\.rules\.actions 'budget:slow=1': write RULE:stop=MINUTES"):
        apply_settings(config, embedded=False)
