"""The memory bank: add memories, find the nearest, look at them, remove them.

    with Bank.create("things.sqlite", fingerprint, key_width=256, latent_width=96) as bank:
        bank.add([NewMemory(key, latents, "my cup: the blue one with a crack")])
        for hit in bank.search(query, k=3):
            print(hit.id, hit.score, hit.text)

What is found is safe on disk (``store``); how it is found fast is in ``index``.
"""

from __future__ import annotations

import builtins
import operator
import os
import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Protocol

from tinyalign.bank import health, index, transfer
from tinyalign.bank.errors import BankError, InputError
from tinyalign.bank.health import Report, Stats
from tinyalign.bank.memory import (
    Floats,
    Hit,
    Memory,
    Metadata,
    NewMemory,
    Stored,
    check_key,
    check_text,
    encode,
    hash_bytes,
    metadata_json,
)
from tinyalign.bank.store import Header, Store, create_store, open_store


class Bank:
    """An open bank file. Threads may share one; other processes may read and write the same file.

    Make one with ``Bank.create`` or ``Bank.open``. What cannot be used raises ``InputError``, a
    file that cannot be used ``BankError`` (a kind of ``InputError``).
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._snapshot: index.Snapshot | None = None
        self._refreshing = threading.Lock()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        fingerprint: str,
        key_width: int,
        latent_width: int,
        name: str = "",
        score_floor: float | None = None,
    ) -> Bank:
        """Create a bank and open it for writing; ``name`` is the file's stem unless given."""
        path = Path(path)
        header = Header(fingerprint, key_width, latent_width, name or path.stem)
        return cls(create_store(path, header, score_floor), header.name)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        fingerprint: str | None = None,
        read_only: bool = False,
        name: str = "",
    ) -> Bank:
        """Open a bank; with a ``fingerprint``, one made for another model is refused.

        ``name`` replaces the stored name in hits. Reading only works in a directory that cannot be
        written, and puts nothing beside a sealed bank but the index cache of a large one.
        """
        store = open_store(Path(path), read_only)
        made_for = store.header.fingerprint
        if fingerprint is not None and made_for != fingerprint:
            store.close()
            raise BankError(
                f"{path} was made for another model (fingerprint {made_for[:12]}, the model's is "
                f"{fingerprint[:12]}): use that model, or make the bank again with this one"
            )
        return cls(store, name or store.header.name)

    @property
    def path(self) -> Path:
        """The bank's file."""
        return self._store.path

    @property
    def name(self) -> str:
        """The name that hits carry."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """What the bank was made for: encoder, preprocessing, key recipe and compressor."""
        return self._store.header.fingerprint

    @property
    def key_width(self) -> int:
        """Numbers in a key, Dk."""
        return self._store.header.key_width

    @property
    def latent_width(self) -> int:
        """Numbers in one latent, d."""
        return self._store.header.latent_width

    @property
    def read_only(self) -> bool:
        """Whether the bank is open for reading only."""
        return self._store.read_only

    @property
    def score_floor(self) -> float | None:
        """The score below which a memory is not relevant; None if the bank has no floor.

        It is stored for whoever asks the bank: ``search`` itself does not apply it.
        """
        return self._store.score_floor()

    def set_score_floor(self, value: float | None) -> None:
        """Store a score floor (-1 to 1), or with None remove it."""
        self._store.set_score_floor(value)

    def calibrate(self) -> float:
        """Measure a score floor on the bank's own memories, store and return it.

        It is the 10th percentile of how near the nearest other memory comes, over at most 800
        memories. InputError below 20 memories.
        """
        value = health.measured_floor(self._store)
        self.set_score_floor(value)
        return value

    def __len__(self) -> int:
        return self._store.count()

    def __enter__(self) -> Bank:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; harmless when it is closed already."""
        self._store.close()

    def seal(self) -> None:
        """Make the bank one dense file that can be shipped, with nothing beside it but the cache.

        It can still be opened for writing. No other process may have it open meanwhile.
        """
        self._store.seal()

    def compact(self) -> None:
        """Give the space of removed memories back to the file system."""
        self._store.compact()

    def add(self, memories: Iterable[NewMemory]) -> builtins.list[int]:
        """Add memories and return their ids, in order; all of them or, on an error, none.

        A memory whose content hash is in the bank already is skipped and gives the id it has there.
        When this returns, the memories are safe on disk and the next search finds them.
        """
        rows = []
        for position, memory in enumerate(memories):
            try:
                rows.append((encode(memory, self.key_width, self.latent_width), memory.thumbnail))
            except InputError as error:
                raise InputError(f"memory {position + 1} of those to add: {error}") from None
        return self._store.add(rows)

    def get(self, id: int) -> Memory:
        """The memory with this id; InputError if there is none."""
        number = operator.index(id)
        found = self._store.memories_by_id([number])
        if number not in found:
            raise InputError(f"{self.path} has no memory {number}")
        return found[number]

    def find(self, content_hash: str) -> int | None:
        """The id of the memory with this content hash (hex), or None."""
        return self._store.find(hash_bytes(content_hash))

    def list(self, where: Metadata | None = None) -> builtins.list[Memory]:
        """All memories, by id, or those whose metadata has every name and value in ``where``.

        A string in ``where`` also matches the number or bool it spells: "5" finds 5 and "5".
        """
        return self._store.memories(where)

    def update(
        self,
        id: int,
        *,
        source: str | None = None,
        metadata: Metadata | None = None,
        thumbnail: bytes | None = None,
    ) -> None:
        """Change what is given of a memory; ``metadata`` replaces all there is.

        Another text or picture means another key and other latents: ``replace`` is for that.
        """
        self._store.update(
            operator.index(id),
            None if source is None else check_text(source, "source"),
            None if metadata is None else metadata_json(metadata),
            thumbnail,
        )

    def replace(self, id: int, memory: NewMemory) -> int:
        """Put another memory in the place of one, in one step; returns its id.

        Keys never change in a bank, so the id is a new one unless the key is the same. InputError
        if a third memory has that content hash.
        """
        row = encode(memory, self.key_width, self.latent_width)
        return self._store.replace(operator.index(id), row, memory.thumbnail)

    def remove(self, ids: Iterable[int]) -> None:
        """Remove memories; an id that does not exist raises InputError and none is removed."""
        self._store.remove(sorted({operator.index(number) for number in ids}))

    def search(
        self,
        key: Floats,
        k: int = 3,
        where: Metadata | None = None,
        exclude: frozenset[int] = frozenset(),
    ) -> builtins.list[Hit]:
        """The k memories with the highest dot product with ``key`` [Dk], best first, ties by id.

        Fewer than k where the bank (or what ``where`` and ``exclude`` leave of it) has fewer.
        """
        query = check_key(key, self.key_width)
        if not isinstance(k, int) or k < 1:
            raise InputError(f"k is 1 or more, not {k!r}")
        snapshot = self._current()
        allowed = self._store.ids(where) if where else None
        found = snapshot.search(query, k, allowed, exclude)
        memories = self._store.memories_by_id([number for number, _ in found])
        return [self._hit(memories[number], score) for number, score in found if number in memories]

    def rows(self) -> Generator[Stored, None, None]:
        """Every memory as it is stored, by id: (id, row, thumbnail), all of one state."""
        with self._store.reading():
            yield from self._store.rows()

    def merge(self, other: MemoryBank) -> int:
        """Add all memories of another bank, in one step; returns how many were not known yet.

        An empty bank without a score floor takes the other's.
        """
        check_same_model(self, other)
        if isinstance(other, Bank) and self.path.resolve() == other.path.resolve():
            raise InputError(f"{self.path} cannot be merged into itself")
        with closing(other.rows()) as rows:
            pairs = ((row, small) for _, row, small in rows)
            return self._store.copy(pairs, other.score_floor)

    def export(self, directory: str | os.PathLike[str]) -> int:
        """Write all memories to a new folder as JSONL and thumbnails; returns how many."""
        store = self._store
        with store.reading():
            rows = store.rows()
            return transfer.export_bank(store.header, store.score_floor(), rows, Path(directory))

    def import_folder(self, directory: str | os.PathLike[str]) -> int:
        """Add what ``export`` wrote, in one step; returns how many were not known yet.

        An empty bank without a score floor takes the exported one.
        """
        return self._store.copy(*transfer.read_export(Path(directory), self._store.header))

    def stats(self) -> Stats:
        """The bank in numbers."""
        return health.stats(self._store)

    def verify(self) -> Report:
        """Read the whole bank and say what is wrong with it."""
        return health.verify(self._store)

    def reindex(self) -> None:
        """Build the search index anew; searching does so by itself where it is needed."""
        with self._refreshing:
            self._snapshot = index.rebuild(self._store)

    def _current(self) -> index.Snapshot:
        with self._refreshing:
            if self._snapshot is None or self._snapshot.generation != self._store.generation():
                self._snapshot = index.refresh(self._store, self._snapshot)
            return self._snapshot

    def _hit(self, memory: Memory, score: float) -> Hit:
        m = memory
        return Hit(m.id, score, m.text, m.source, m.metadata, m.latents, self._name)


class MemoryBank(Protocol):
    """What every bank can do, in a file (``Bank``) or in Qdrant (``qdrant.QdrantBank``)."""

    @property
    def path(self) -> Path | str: ...
    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def key_width(self) -> int: ...
    @property
    def latent_width(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def score_floor(self) -> float | None: ...
    def set_score_floor(self, value: float | None) -> None: ...
    def calibrate(self) -> float: ...
    def __len__(self) -> int: ...
    def __enter__(self) -> MemoryBank: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def close(self) -> None: ...
    def add(self, memories: Iterable[NewMemory]) -> builtins.list[int]: ...
    def get(self, id: int) -> Memory: ...
    def find(self, content_hash: str) -> int | None: ...
    def list(self, where: Metadata | None = None) -> builtins.list[Memory]: ...
    def rows(self) -> Generator[Stored, None, None]: ...
    def update(
        self,
        id: int,
        *,
        source: str | None = None,
        metadata: Metadata | None = None,
        thumbnail: bytes | None = None,
    ) -> None: ...
    def replace(self, id: int, memory: NewMemory) -> int: ...
    def remove(self, ids: Iterable[int]) -> None: ...
    def search(
        self,
        key: Floats,
        k: int = 3,
        where: Metadata | None = None,
        exclude: frozenset[int] = frozenset(),
    ) -> builtins.list[Hit]: ...
    def merge(self, other: MemoryBank) -> int: ...
    def export(self, directory: str | os.PathLike[str]) -> int: ...
    def import_folder(self, directory: str | os.PathLike[str]) -> int: ...
    def stats(self) -> Stats: ...
    def verify(self) -> Report: ...
    def reindex(self) -> None: ...
    def compact(self) -> None: ...
    def seal(self) -> None: ...


def check_same_model(bank: MemoryBank, other: MemoryBank) -> None:
    """BankError if two banks were made for different models."""
    if other.fingerprint != bank.fingerprint:
        raise BankError(
            f"{other.path} and {bank.path} were made for different models (fingerprints "
            f"{other.fingerprint[:12]} and {bank.fingerprint[:12]})"
        )


def search_banks(
    banks: Sequence[MemoryBank], key: Floats, k: int = 3, where: Metadata | None = None
) -> list[Hit]:
    """The k best hits of several banks for one model, best first, ties in the banks' order."""
    if len({bank.fingerprint for bank in banks}) > 1:
        names = ", ".join(str(bank.path) for bank in banks)
        raise BankError("the banks were made for different models: " + names)
    hits = [hit for bank in banks for hit in bank.search(key, k, where)]
    return sorted(hits, key=lambda hit: -hit.score)[:k]
