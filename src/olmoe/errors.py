"""Errors that a user can cause; the message of each is one sentence with the offending value and the remedy.

The command line prints the sentence and exits with code 2; anything else that escapes is a bug of
ours and keeps its traceback.
"""

from __future__ import annotations

import reprlib

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120


def shown(value: object) -> str:
    """`repr(value)` cut to a length that fits into a sentence, for values that come out of files."""
    return _REPR.repr(value)


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what, and how to fix it."""


class ConfigError(UserError):
    """A model or training configuration is invalid, unknown or contradictory."""


class CheckpointError(UserError):
    """A checkpoint is missing, truncated, foreign, or does not fit its configuration."""


class TokenizerError(UserError):
    """A tokenizer file is missing or unreadable, or its ids do not fit the model."""


class BackendUnavailableError(UserError):
    """A backend that was asked for by name cannot run here; the message says why."""
