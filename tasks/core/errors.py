"""The one exception that a user is meant to see."""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake: one sentence that says what is wrong and what would be right. The command line exits with 2."""
