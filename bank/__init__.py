"""The memory bank: a durable store of (picture, text) memories with nearest-neighbour search."""

from __future__ import annotations

from tinyalign.bank.errors import BankError, InputError, TinyAlignError

__all__ = ["BankError", "InputError", "TinyAlignError"]
