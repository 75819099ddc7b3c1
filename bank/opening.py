"""Banks by their names: a file, or an address in Qdrant (``qdrant://...``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeGuard

from tinyalign.bank.bank import Bank, MemoryBank

SCHEMES = ("qdrant://", "qdrants://")


def is_address(name: str | os.PathLike[str]) -> TypeGuard[str]:
    """Whether a bank's name is an address in Qdrant and not a file's."""
    return isinstance(name, str) and name.startswith(SCHEMES)


def open_bank(
    name: str | os.PathLike[str],
    fingerprint: str | None = None,
    read_only: bool = False,
    label: str = "",
) -> MemoryBank:
    """Open a bank; with a ``fingerprint``, one made for another model is refused.

    ``label`` replaces the stored name in hits. BankError says what is wrong with a bank that
    cannot be used.
    """
    if is_address(name):
        from tinyalign.bank.qdrant import QdrantBank

        return QdrantBank.open(name, fingerprint, read_only, label)
    return Bank.open(name, fingerprint, read_only, label)


def open_if_there(name: str | os.PathLike[str], fingerprint: str | None) -> MemoryBank | None:
    """Open a bank for writing, or None if there is none of that name."""
    if is_address(name):
        from tinyalign.bank.qdrant import QdrantBank

        return QdrantBank.open_if_there(name, fingerprint)
    return Bank.open(name, fingerprint) if Path(name).exists() else None


def create_bank(
    name: str | os.PathLike[str],
    fingerprint: str,
    key_width: int,
    latent_width: int,
    score_floor: float | None = None,
) -> MemoryBank:
    """Create a bank and open it for writing; BankError if there is one already."""
    if is_address(name):
        from tinyalign.bank.qdrant import QdrantBank

        return QdrantBank.create(
            name, fingerprint, key_width, latent_width, score_floor=score_floor
        )
    return Bank.create(name, fingerprint, key_width, latent_width, score_floor=score_floor)
