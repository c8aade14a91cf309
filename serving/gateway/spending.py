"""Whether a tenant's money pays for a request, before it is forwarded, while it streams, and when it is over.

The worst case (the prompt's bound and the longest answer that the request allows) is set aside out of what this gateway holds.
Where that is not to be had, and the request states how long its answer may be, the answer is clamped to what is at hand. When
the request is over, what it cost is settled and the rest is free again.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from serving.gateway.output_limits import read_output_asked, set_output_limit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from billing.v1.usage_pb2 import UsageEvent
    from serving.gateway.directory import AccountView
    from serving.gateway.leases import LeaseKeeper, Reservation
    from serving.gateway.output_limits import OutputAsked
    from serving.gateway.profiles import ModelProfile
    from serving.gateway.settings import LeaseSettings
    from serving.gateway.worth import Worth
    from serving.kserve import ModelInferRequest

__all__ = ["RequestMoney", "Spending"]


@dataclass(slots=True)
class RequestMoney:
    """What is set aside for one request."""

    reservation: Reservation
    worth: Worth
    currency: str
    clamped_tokens: int = 0
    """The longest answer that the money pays for, where that is less than the request allowed."""
    _cost_pico: int = 0
    _step_pico: int = 0

    def covers(self, event: UsageEvent) -> bool:
        """Whether what `event` says by now is paid for. Where more is needed, as much again as a step brought is set aside."""
        cost_pico = self.worth.cost_pico(event, self.currency)
        self._step_pico = max(self._step_pico, cost_pico - self._cost_pico)
        self._cost_pico = cost_pico
        if cost_pico <= self.reservation.pico:
            return True
        return self.reservation.extend(cost_pico + self._step_pico) or self.reservation.extend(cost_pico)

    def settle(self, event: UsageEvent) -> None:
        """The request is over, and this is its bill."""
        self.reservation.settle(self.worth.cost_pico(event, self.currency))

    def release(self) -> None:
        """The request never began."""
        self.reservation.settle(0)


class Spending:
    """What all requests of a gateway spend from."""

    def __init__(self, settings: LeaseSettings, keeper: LeaseKeeper, worth: Worth) -> None:
        self.keeper = keeper
        self.worth = worth
        self._settings = settings

    async def set_aside(
        self,
        request: ModelInferRequest,
        event: UsageEvent,
        account: AccountView,
        profile: ModelProfile,
        prompt_tokens: int,
        until_ms: int,
        units: Mapping[str, int] = MappingProxyType({}),
        asked: OutputAsked | None = None,
    ) -> RequestMoney | None:
        """The money for the worst case of the request, whose answer may be clamped for it; None: there is not enough.

        `asked`: what the request allows its answer, where that was read already. Raises TensorError where it cannot be read.
        """
        asked = asked or read_output_asked(request, profile.output_limit, profile.output_limit_input)
        stated, texts = asked.tokens, asked.texts
        output_tokens = account.output_tokens_default or self._settings.output_tokens_default if stated is None else stated
        if not profile.counts_output:
            output_tokens = 0

        def worst_pico(tokens: int) -> int:
            return self.worth.worst_case_pico(event, account.currency, prompt_tokens, tokens * texts, until_ms, units)

        wanted_pico = worst_pico(output_tokens)
        reservation = self.keeper.try_reserve(account.tenant_id, wanted_pico)
        if reservation is None:
            reservation = await self.keeper.reserve(account.tenant_id, wanted_pico)
        if reservation is not None:
            return RequestMoney(reservation, self.worth, account.currency)
        if stated is None or not self._settings.clamp_output:
            return None
        at_hand_pico = self.keeper.at_hand_pico(account.tenant_id)
        # Linear in the tokens, but for a request's least price: one step down to what is surely paid for.
        rest_pico = at_hand_pico - worst_pico(0)
        token_pico = worst_pico(output_tokens) - worst_pico(output_tokens - 1) if output_tokens else 0
        tokens = min(output_tokens, rest_pico // token_pico) if token_pico > 0 else 0
        if tokens < 1:
            return None
        reservation = self.keeper.try_reserve(account.tenant_id, worst_pico(tokens))
        if reservation is None:
            return None
        set_output_limit(request, profile.output_limit, tokens, profile.output_limit_input)
        return RequestMoney(reservation, self.worth, account.currency, clamped_tokens=tokens)
