"""The memory bank: a durable store of (picture, text) memories with nearest-neighbour search."""

from __future__ import annotations

from tinyalign.bank.bank import Bank, MemoryBank, search_banks
from tinyalign.bank.errors import BankError, InputError, TinyAlignError
from tinyalign.bank.health import Nearness, Report, Stats
from tinyalign.bank.memory import Hit, Memory, NewMemory, content_hash
from tinyalign.bank.opening import create_bank, open_bank

__all__ = [
    "Bank",
    "BankError",
    "Hit",
    "InputError",
    "Memory",
    "MemoryBank",
    "Nearness",
    "NewMemory",
    "Report",
    "Stats",
    "TinyAlignError",
    "content_hash",
    "create_bank",
    "open_bank",
    "search_banks",
]
