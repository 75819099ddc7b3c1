"""The memory bank: a durable store of (picture, text) memories with nearest-neighbour search."""

from __future__ import annotations

from tinyalign.bank.bank import Bank, search_banks
from tinyalign.bank.errors import BankError, InputError, TinyAlignError
from tinyalign.bank.health import Nearness, Report, Stats
from tinyalign.bank.memory import Hit, Memory, NewMemory, content_hash

__all__ = [
    "Bank",
    "BankError",
    "Hit",
    "InputError",
    "Memory",
    "Nearness",
    "NewMemory",
    "Report",
    "Stats",
    "TinyAlignError",
    "content_hash",
    "search_banks",
]
