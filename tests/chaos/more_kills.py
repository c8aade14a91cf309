"""kill -9 of the gateway mid-stream, and of the embedded set-up, whose broker forgets everything."""

from __future__ import annotations

import time
from typing import Final

from tests.chaos.faults import Fault
from tests.chaos.history import Outcome
from tests.chaos.more_installations import EmbeddedInstallation, GatewayInstallation

_STREAMING: Final = 4
_MOMENT_S: Final = 60.0


class KillGateway(Fault):
    """In the middle of streams: what was delivered is billed, and not much more."""

    name = "kill-gateway"
    checks = "I1-I4"
    nightly = 20
    setup = GatewayInstallation
    loads = frozenset({"gateway"})

    def inject(self) -> None:
        load = self.world.installation.gateway_load
        assert load is not None
        time.sleep(self.draw.uniform(0.0, 0.5))
        self.world.wait(lambda: len(load.flowing) >= _STREAMING, _MOMENT_S, "streams that deliver")
        self.world.installation.parts["gateway"].kill9()

    def heal(self) -> None:
        self.world.installation.restart_dead()

    def evidence(self) -> str:
        history = self.world.history
        assert history is not None
        cut = [each for each in history.outcomes().values() if each.outcome is Outcome.UNKNOWN and each.delivered]
        return f"{len(cut)} streams cut after {sum(each.delivered['output_tokens'] for each in cut)} tokens" if cut else ""


class _Embedded(Fault):
    setup = EmbeddedInstallation
    hold_s = (0.0, 0.5)

    def founded(self) -> list[bytes]:
        return [chain.generation for chain in self.world.ledger.chains]

    def inject(self) -> None:
        time.sleep(self.draw.uniform(0.0, 0.6))
        self._generations = self.founded()
        self.world.await_acknowledgement()
        self._killed_ms = time.time_ns() // 1_000_000
        self.kill()

    def kill(self) -> None:
        raise NotImplementedError

    def heal(self) -> None:
        self.world.installation.restart_dead()

    def evidence(self) -> str:
        anew = sum(a != b for a, b in zip(self._generations, self.founded(), strict=True))
        between = self.world.in_between(self._killed_ms)
        return f"{between} acknowledged and not in the ledger; {anew} partitions founded anew" if anew and between else ""


class KillEmbeddedBroker(_Embedded):
    name = "kill-embedded-broker"
    checks = "I1, I3, I9"
    nightly = 10

    def kill(self) -> None:
        installation = self.world.installation
        assert isinstance(installation, EmbeddedInstallation)
        installation.kill_broker()


class KillEmbeddedEverything(_Embedded):
    """The supervisor, all its parts, and the producer."""

    name = "kill-embedded-everything"
    checks = "I1-I3, I9"
    nightly = 10

    def kill(self) -> None:
        installation = self.world.installation
        assert isinstance(installation, EmbeddedInstallation)
        installation.kill_all()
        installation.parts["producer"].kill9()
