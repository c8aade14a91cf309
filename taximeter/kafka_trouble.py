"""What keeps a configuration out of Kafka, by the setting that is wrong.

Promise: it asks the broker for a few seconds at most, changes nothing, and names setting, value and mend; of a password only
where it is kept. Clients themselves say little: to them every refusal is a broker that does not answer.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from taximeter.compose import kafka_security

if TYPE_CHECKING:
    from taximeter.platform_config import KafkaConfig

__all__ = ["kafka_trouble"]

_TIMEOUT_S = 5.0
_ASKED_FOR_S = 0.25
# Of these a repeat says nothing more. A connection that broke does not say why: the next one may.
_DECISIVE = frozenset({KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError._RESOLVE, KafkaError._INVALID_ARG})
_FILES = {
    "ssl.ca.location": "ssl_ca_file",
    "ssl.certificate.location": "ssl_certificate_file",
    "ssl.key.location": "ssl_key_file",
}


def kafka_trouble(kafka: KafkaConfig, timeout_s: float = _TIMEOUT_S) -> str:
    """One sentence; empty where Kafka answers. The time is taken whole only where the broker says nothing."""
    told: list[KafkaError] = []
    options: dict[str, Any] = {
        **kafka_security(kafka),
        "bootstrap.servers": kafka.bootstrap,
        "log_level": 0,
        "error_cb": told.append,
    }
    try:
        client = AdminClient(options)
    except KafkaException as error:
        return _said(kafka, [error.args[0]])
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and not any(map(_is_decisive, told)):
        try:
            client.list_topics(timeout=_ASKED_FOR_S)
        except KafkaException:
            client.poll(0)
        else:
            return ""
    return _said(kafka, told)


def _is_decisive(error: KafkaError) -> bool:
    return error.code() in _DECISIVE or (error.code() == KafkaError._TRANSPORT and "refused" in error.str())


def _said(kafka: KafkaConfig, told: list[KafkaError]) -> str:
    error = next(filter(_is_decisive, told), None)
    code, text = (None, "") if error is None else (error.code(), error.str())
    if code == KafkaError._INVALID_ARG:
        for option, name in _FILES.items():
            if option in text:
                return (
                    f"kafka.{name} {getattr(kafka, name)}: is no such file in PEM form ({text}); correct the path or the file"
                )
        return f"a client of Kafka cannot be made of the section [kafka]: {text}"
    if code == KafkaError._AUTHENTICATION:
        _, _, supported = text.partition("broker's supported mechanisms: ")
        if supported:
            taken = supported.partition(" (after")[0]
            return f"kafka.sasl_mechanism {kafka.sasl_mechanism!r}: the broker takes {taken}; set that"
        file = kafka.sasl_password_file
        kept = "kafka.sasl_password" if file is None else f"kafka.sasl_password_file {file}"
        return (
            f"kafka.sasl_username {kafka.sasl_username!r}: the broker refuses this user or the password ({kept}); correct "
            "them, or make the user known to Kafka"
        )
    if code == KafkaError._SSL and "certificate verify failed" in text:
        trusted = kafka.ssl_ca_file or "(not set: the system's)"
        return (
            f"kafka.ssl_ca_file {trusted}: the certificate of {kafka.bootstrap} is not of this authority, or not for this "
            "name; name the file of the authority that signed it"
        )
    if code == KafkaError._SSL:
        return f"kafka.ssl_certificate_file {kafka.ssl_certificate_file}: {kafka.bootstrap} refuses it ({text})"
    if code == KafkaError._RESOLVE:
        return f"kafka.bootstrap {kafka.bootstrap!r}: there is no host of that name; correct it"
    if code == KafkaError._TRANSPORT:
        return f"kafka.bootstrap {kafka.bootstrap!r}: nobody listens there; start the broker, or correct the address"
    return (
        f"kafka.security_protocol {kafka.security_protocol!r}: {kafka.bootstrap} does not answer in it; if the broker "
        "runs, its listener there speaks another one"
    )
