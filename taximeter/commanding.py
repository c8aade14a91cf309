"""Commands in the name of an installation: what `serving.commanding` needs, from the one configuration."""

from __future__ import annotations

from functools import partial

from producers.commands import CommandSettings
from serving import commanding
from serving.commanding import CreditTerms, NewKey, PlanTerms
from taximeter.compose import kafka_security, key_ring, topic_names
from taximeter.config import Config, read_secret

__all__ = ["Commander", "CreditTerms", "NewKey", "PlanTerms"]


class Commander(commanding.Commander):
    """Gives commands to the installation of `config`."""

    def __init__(self, config: Config, issuer: str) -> None:
        super().__init__(
            CommandSettings(
                bootstrap=config.kafka.bootstrap,
                partitions=config.ledger.partitions,
                topic=topic_names(config).commands,
                security=kafka_security(config.kafka),
            ),
            key_ring(config, "command_key", needed_for="signing a command"),
            partial(read_secret, config.gateway, "key_pepper", needed_for="making a key"),
            issuer,
        )
