"""Models behind the gateway: whether a profile bills what its back end does."""

import asyncio
import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from billing.v1.usage_pb2 import CountSource, Outcome
from taximeter import compose_serving
from taximeter.commands.common import Context, JsonOption, command
from taximeter.errors import EXIT_WRONG, InputFileError, MisuseError

if TYPE_CHECKING:
    from taximeter.model_trial import Trial

__all__ = ["check"]


@command
def check(
    context: Context,
    model: Annotated[str, typer.Argument(help="Of [models.profiles].")],
    upstream: Annotated[str, typer.Option(help="The server to ask (default: gateway.upstream).")] = "",
    prompt: Annotated[str, typer.Option(help="What a text model is asked (default: what a gateway asks at its start).")] = "",
    output_tokens: Annotated[int, typer.Option(min=1, max=1_000, help="How long the answer may be.")] = 16,
    input_: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=VALUE", help="A tensor: a text, JSON numbers, or @FILE; may be repeated."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Try a model's profile on a live server, and show what it would bill. Nothing is billed. Exit code 1 if something does not
    fit."""
    from serving.gateway.sample_requests import SAMPLE_PROMPT
    from taximeter.model_trial import TrialRequest, try_profile

    config = context.config()
    profile = config.models.profiles.get(model)
    if profile is None:
        known = ", ".join(sorted(config.models.profiles)) or "none"
        raise MisuseError(f"model {model!r} has no profile: add [models.profiles.{model}], or name one of: {known}")
    asked = TrialRequest(prompt or SAMPLE_PROMPT, output_tokens, dict(_read_input(entry) for entry in input_ or ()))
    tls = compose_serving.upstream_tls(config)
    made = compose_serving.model_profile(model, profile)
    trial = asyncio.run(try_profile(made, config.models.tokenizers, upstream or config.gateway.upstream, asked, tls))
    values = _values(trial)
    if json:
        context.output.json(values)
    else:
        for problem in trial.problems:
            context.output.say(f"does not fit: {problem}")
        if trial.error:
            context.output.say(f"no whole answer: {trial.error}")
        shown = {
            name: value for name, value in values.items() if name not in ("problems", "error") and value not in (None, "", {})
        }
        units = shown.pop("units", {})
        context.output.pairs(f"{model}: what one request would be billed for", {**shown, **units})
    if trial.problems or trial.error:
        raise typer.Exit(EXIT_WRONG)


def _read_input(entry: str) -> tuple[str, list[Any]]:
    name, found, value = entry.partition("=")
    if not found or not name:
        raise MisuseError(f"--input {entry!r}: write NAME=VALUE, or NAME=@FILE")
    if value.startswith("@"):
        try:
            return name, [Path(value[1:]).read_bytes()]
        except OSError as error:
            raise InputFileError(f"--input {name}: {value[1:]} cannot be read ({error.strerror})") from None
    try:
        read = json_text.loads(value)
    except ValueError:
        return name, [value]
    # An object is a text that is JSON, as sampling parameters are.
    return name, read if isinstance(read, list) else [value if isinstance(read, dict) else read]


def _values(trial: "Trial") -> dict[str, Any]:
    event = trial.event
    values: dict[str, Any] = {"problems": list(trial.problems), "error": trial.error}
    if event is not None:
        values |= {
            "outcome": Outcome.Name(event.outcome).removeprefix("OUTCOME_").lower(),
            "input_tokens": event.uncached_input_tokens,
            "output_tokens": event.output_tokens,
            "units": {entry.unit: entry.quantity for entry in event.units},
            "count_source": CountSource.Name(event.count_source).removeprefix("COUNT_SOURCE_").lower(),
        }
    return values | {
        "tokenizer_input_tokens": trial.tokenizer_input,
        "tokenizer_output_tokens": trial.tokenizer_output,
        "tokenizer_fingerprint": trial.fingerprint,
        "responses": trial.responses,
        "answer": trial.answer,
    }
