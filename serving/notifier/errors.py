"""Why the notifier cannot go on, and why an attempt to deliver did not succeed."""

from __future__ import annotations

from typing import Final, Literal, get_args

__all__ = ["OUTCOMES", "DeliveryFailed", "EndpointGone", "NotifierError", "Outcome"]

# What became of an attempt. Refused: an answer that asks for no second try (4xx, a redirect), or an address that may not be
# asked; failed: 5xx.
Outcome = Literal["taken", "refused", "failed", "gone", "timed_out", "unreachable"]
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)


class NotifierError(Exception):
    """The notifier ends; the text is one sentence with the mend."""


class DeliveryFailed(Exception):
    """One attempt failed; the text says how, without the address, whose path may be a secret."""

    def __init__(self, reason: str, outcome: Outcome, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.outcome = outcome
        # What the receiver asked for, within the bound that is set.
        self.retry_after_s = retry_after_s


class EndpointGone(DeliveryFailed):
    """The receiver answered 410: it wants nothing more, ever."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "gone")
