"""Commands and who may give them: signed with the installation's command key, checked by every step that applies one."""

from __future__ import annotations

import hmac

from google.protobuf.message import DecodeError

from billing.limits import ID_CHARS_MAX, SCHEMA_VERSION
from billing.v1.command_pb2 import Command, SignedCommand


class CommandRefused(ValueError):
    """A command that must not be applied: the message names the field, the value and the mend."""


def sign(command: Command, key: bytes) -> bytes:
    """The message for `billing.commands`: the command's bytes and their HMAC-SHA256."""
    body = command.SerializeToString(deterministic=True)
    return SignedCommand(command=body, signature=hmac.digest(key, body, "sha256")).SerializeToString()


def lease_key(command_key: bytes) -> bytes:
    """What gateways sign their lease requests with: derived from the command key, and good for nothing else."""
    return hmac.digest(command_key, b"taximeter lease requests", "sha256")


def verify(signed: SignedCommand, key: bytes) -> Command:
    """The command inside. Raises CommandRefused if the signature, the version or the command itself is not good."""
    by_gateway = False
    if not hmac.compare_digest(signed.signature, hmac.digest(key, signed.command, "sha256")):
        by_gateway = hmac.compare_digest(signed.signature, hmac.digest(lease_key(key), signed.command, "sha256"))
        if not by_gateway:
            raise CommandRefused("signature: is not the command key's; sign with the key that the ledger was founded with")
    try:
        command = Command.FromString(signed.command)
    except DecodeError as error:
        raise CommandRefused("command: cannot be decoded; send a serialized billing.v1.Command") from error
    if command.schema_version != SCHEMA_VERSION:
        raise CommandRefused(f"schema_version: {command.schema_version} is not known here; this ledger speaks {SCHEMA_VERSION}")
    if not 0 < len(command.command_id) <= ID_CHARS_MAX:
        raise CommandRefused(f"command_id: needs 1 to {ID_CHARS_MAX} characters; it makes a repeat harmless")
    action = command.WhichOneof("action")
    if action is None:
        raise CommandRefused("action: is empty; say what the command does")
    if by_gateway and action != "lease_request":
        raise CommandRefused(f"signature: the lease key does not sign a {action}; sign with the command key")
    return command


def remembered_id(command: Command) -> str:
    """The ID under which `command` is applied once; "" for one whose own numbers see to that."""
    return "" if command.WhichOneof("action") == "lease_request" else command.command_id
