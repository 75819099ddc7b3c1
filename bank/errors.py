"""The small error hierarchy every part of tinyalign shares."""

from __future__ import annotations


class TinyAlignError(Exception):
    """Something failed that is not the user's fault (a command line ends with exit code 1)."""


class InputError(TinyAlignError, ValueError):
    """What was given cannot be used; the message is one clear line (exit code 2)."""


class BankError(InputError):
    """A bank file cannot be used: missing, damaged, of a newer format or of another model."""
