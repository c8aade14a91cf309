"""What the command line can tell a person: one sentence with the mend, and an exit code.

    TaximeterError (exit 1)      something was found wrong: a difference, a part that does not answer
    ├── NotReadyError            a part is not there or not ready
    └── MisuseError (exit 2)     the command, its arguments or its configuration are wrong
        ├── ConfigError          names the key, the value (never a secret's) and the mend
        └── InputFileError       names the file, the line, the field, the value and the mend

An expected failure is one of these, never a traceback. Anything else is a bug and shows itself as one.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "EXIT_MISUSED",
    "EXIT_WELL",
    "EXIT_WRONG",
    "ConfigError",
    "InputFileError",
    "MisuseError",
    "NotReadyError",
    "TaximeterError",
]

EXIT_WELL: Final = 0
EXIT_WRONG: Final = 1
EXIT_MISUSED: Final = 2


class TaximeterError(Exception):
    """Something was found wrong; the text is one sentence with the mend."""

    exit_code: int = EXIT_WRONG


class NotReadyError(TaximeterError):
    """A part is not there, or was not ready in time."""


class MisuseError(TaximeterError):
    """The command was not used as it can be used."""

    exit_code = EXIT_MISUSED


class ConfigError(MisuseError):
    """The configuration cannot be used."""


class InputFileError(MisuseError):
    """A file that was handed over cannot be used."""
