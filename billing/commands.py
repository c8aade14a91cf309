"""Commands and who may give them: signed with the installation's command key, checked by every step that applies one."""

from __future__ import annotations

import hmac

from google.protobuf.message import DecodeError

from billing.key_ring import Keys, UnknownKey, as_ring, derived
from billing.limits import ID_CHARS_MAX, SCHEMA_VERSION
from billing.v1.command_pb2 import Command, SignedCommand


class CommandRefused(ValueError):
    """A command that must not be applied: the message names the field, the value and the mend."""


def sign(command: Command, keys: Keys) -> bytes:
    """The message for `billing.commands`: the command's bytes and their HMAC-SHA256."""
    key_id, key = as_ring(keys).signing
    body = command.SerializeToString(deterministic=True)
    return SignedCommand(command=body, signature=hmac.digest(key, body, "sha256"), key_id=key_id).SerializeToString()


def lease_key(command_key: Keys) -> Keys:
    """What gateways sign their lease requests with: derived from the command key, and good for nothing else."""
    return derived(command_key, b"taximeter lease requests")


def verify(signed: SignedCommand, keys: Keys) -> Command:
    """The command inside. Raises CommandRefused if the signature, the version or the command itself is not good."""
    by_gateway = False
    if not _is_signed(signed, keys):
        by_gateway = _is_signed(signed, lease_key(keys))
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


def _is_signed(signed: SignedCommand, keys: Keys) -> bool:
    return hmac.compare_digest(signed.signature, hmac.digest(_named_key(signed, keys), signed.command, "sha256"))


def _named_key(signed: SignedCommand, keys: Keys) -> bytes:
    try:
        key = as_ring(keys).find(signed.key_id)
    except UnknownKey:
        raise CommandRefused(
            f"signature: names the command key {signed.key_id[:64]!r}, which the workers do not have; give it to them first"
        ) from None
    if key is None:
        raise CommandRefused(f"signature: names the command key {signed.key_id[:64]!r}, which is revoked; sign with another")
    return key


def key_id_of(command: bytes, signature: bytes, keys: Keys) -> str:
    """Which key signed a command, of which a record keeps bytes and signature; where none did, the one that signs now."""
    for ring in (as_ring(keys), as_ring(lease_key(keys))):
        for key_id, key in ring.keys.items():
            if key is not None and hmac.compare_digest(signature, hmac.digest(key, command, "sha256")):
                return key_id
    return as_ring(keys).signing[0]


def check_time(command: Command, log_time_ms: int, remembered_ms: int, ahead_ms: int) -> None:
    """Refuse what was issued before the IDs that are remembered, or far ahead: a repeat of it would not be known as one."""
    age_ms = log_time_ms - command.issued_ms
    if age_ms > remembered_ms:
        raise CommandRefused(
            f"issued_ms: {command.issued_ms} is {age_ms} ms ago, and a command's ID is remembered for {remembered_ms} ms; "
            "issue it anew if it is meant"
        )
    if -age_ms > ahead_ms:
        raise CommandRefused(f"issued_ms: {command.issued_ms} is {-age_ms} ms ahead of the ledger; set the sender's clock")


def remembered_id(command: Command) -> str:
    """The ID under which `command` is applied once; "" for one whose own numbers see to that."""
    return "" if command.WhichOneof("action") == "lease_request" else command.command_id
