"""Why the notifier cannot go on, and why an attempt to deliver did not succeed."""

from __future__ import annotations

__all__ = ["DeliveryFailed", "EndpointGone", "NotifierError"]


class NotifierError(Exception):
    """The notifier ends; the text is one sentence with the mend."""


class DeliveryFailed(Exception):
    """One attempt failed; the text says how, without the address, whose path may be a secret."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        # What the receiver asked for, within the bound that is set.
        self.retry_after_s = retry_after_s


class EndpointGone(DeliveryFailed):
    """The receiver answered 410: it wants nothing more, ever."""
