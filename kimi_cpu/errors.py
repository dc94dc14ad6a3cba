"""Errors that a user can act on: what is wrong, where, and what to do.

Every error that input, files or the machine can cause is a `UserError`; the command line
prints `error: MESSAGE` and `hint: HINT` and exits with `exit_code`. Anything else is a bug.
"""

from __future__ import annotations


class UserError(Exception):
    """One line of what is wrong and where, plus a hint what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(UserError):
    """The command, an option or an argument is wrong (exit code 2)."""

    exit_code = 2


class LowMemoryError(UsageError):
    """The memory that may be used does not hold what must be there at the same time."""


class ConfigError(UserError):
    """`config.json` is missing, malformed, or describes a model that this engine does not run."""


class CheckpointError(UserError):
    """A weight file is missing, truncated, malformed, or disagrees with the config."""


class TokenizerError(UserError):
    """The tokenizer files are missing or malformed."""


class TemplateError(UserError):
    """The chat template is missing, malformed, or fails on these messages."""


class MessageError(UserError):
    """A conversation is malformed (a role, a tool call or a content of the wrong form)."""


class ContextError(UserError):
    """The tokens do not fit the model's context, or an id lies outside the vocabulary."""
