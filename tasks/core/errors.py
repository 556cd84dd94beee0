"""What a user is meant to see: one exception, and no secret."""

from __future__ import annotations

import re


def without_secrets(text: str) -> str:
    """The text, its addresses without passwords and signatures: fit for messages, metadata and pages."""
    text = re.sub(r"://[^/@\s]*@", "://", text)
    return re.sub(r"(https?://[^\s?\"']+)\?[^\s\"']*", r"\1", text)


class UserError(Exception):
    """A user's mistake: one sentence that says what is wrong and what would be right. The command line exits with 2."""
