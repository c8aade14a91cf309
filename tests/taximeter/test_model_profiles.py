"""Models as the configuration describes them: every kind of back end, and nothing that a kind does not have."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from serving.gateway.profiles import KINDS, ModelProfile, ocr, vllm
from serving.gateway.units import AudioMilliseconds
from taximeter.compose_serving import model_profile
from taximeter.errors import ConfigError
from taximeter.serving_config import ModelProfileConfig


def profile(**fields: Any) -> ModelProfile:
    return model_profile("m", ModelProfileConfig(**fields))


def test_the_configuration_names_every_kind() -> None:
    assert set(get_args(ModelProfileConfig.model_fields["backend"].annotation)) == set(KINDS)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_needs_a_name_and_at_most_a_tokenizer(kind: str) -> None:
    takes_tokenizer = "tokenizer" in KINDS[kind].__annotations__
    assert profile(backend=kind, tokenizer="t" if takes_tokenizer else "").model == "m"


def test_what_is_not_set_is_the_kinds_own() -> None:
    assert profile() == vllm("m")
    assert profile(backend="ocr") == ocr("m")
    assert profile(backend="ocr").decoupled is False
    assert profile(decoupled=False, prompt_tokens_max=5) == vllm("m", decoupled=False, prompt_tokens_max=5)


def test_tensors_are_named() -> None:
    made = profile(
        backend="speech_to_text", tokenizer="t", audio_input="WAV", audio_lengths_input="WAV_LENS", sample_rate_hz=8_000
    )
    assert made.units == (AudioMilliseconds("WAV", "WAV_LENS", 8_000),)
    assert profile(backend="generic", tokenizer="t", text_inputs=["PROMPT"], text_output="ANSWER").text_inputs == ("PROMPT",)


def test_what_a_kind_does_not_have_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"models\.profiles\.m\.sample_rate_hz: backend vllm has no such thing"):
        profile(sample_rate_hz=8_000)
    with pytest.raises(ConfigError, match="tokenizer: backend ocr"):
        profile(backend="ocr", tokenizer="t")


@pytest.mark.parametrize("kind", ["generic", "embeddings", "classification", "speech_to_text", "text_to_image"])
def test_who_reports_no_counts_needs_a_tokenizer(kind: str) -> None:
    with pytest.raises(ValidationError, match="name a tokenizer"):
        ModelProfileConfig(backend=kind)  # type: ignore[arg-type]
