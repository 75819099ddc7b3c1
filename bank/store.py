"""The durable truth of a bank: one SQLite file. docs/memory-bank.md describes the format.

A working bank is in WAL mode, so others read while one writes. A sealed bank (``Store.seal``) is
in rollback-journal mode: a single clean file that can be shipped and read from a read-only
directory. Opening never changes the mode.

Keys are never changed in place and ids are never used again, so whatever was derived from an id
(the search index) stays true until the id is gone.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyalign.bank import memory as codec
from tinyalign.bank.errors import BankError, InputError
from tinyalign.bank.memory import Halves, Memory, Metadata, Row, Value
from tinyalign.bank.sqlite import check_file, connect, connect_read_only, explained, pragma

FORMAT = 2
APPLICATION_ID = 0x7441424B  # "tABK" in SQLite's application_id
MAX_WIDTH = 65_536
GENERATIONS_KEPT = 1000  # an index older than this many write transactions is rebuilt
IDS_PER_QUERY = 500
KEYS_PER_QUERY = 8192
INTEGRITY_PROBLEMS = 10  # of the file, as SQLite reports them

SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID",
    "CREATE TABLE generations (generation INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL)",
    """CREATE TABLE memories (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        content_hash BLOB NOT NULL UNIQUE,
        key BLOB NOT NULL,
        latents BLOB NOT NULL,
        scales BLOB NOT NULL,
        text TEXT NOT NULL,
        source TEXT NOT NULL,
        metadata TEXT NOT NULL,
        checksum INTEGER NOT NULL)""",
    "CREATE TABLE thumbnails (id INTEGER PRIMARY KEY, image BLOB NOT NULL)",
)
TABLES = {"meta", "generations", "memories", "thumbnails"}
SET_FLOOR = "INSERT OR REPLACE INTO meta VALUES ('score_floor', ?)"
SELECT = (
    "SELECT m.id, m.content_hash, m.key, m.latents, m.scales, m.text, m.source, m.metadata, "
    "t.image, m.checksum FROM memories m LEFT JOIN thumbnails t ON t.id = m.id"
)


@dataclass(frozen=True)
class Header:
    """What is fixed when a bank is created."""

    fingerprint: str  # of encoder, preprocessing, key recipe and compressor
    key_width: int  # Dk
    latent_width: int  # d
    name: str


@dataclass(frozen=True)
class Generation:
    """A state of the bank. The random token tells diverged copies of a file apart."""

    number: int
    token: str


def create_store(path: Path, header: Header, score_floor: float | None = None) -> Store:
    """Create a bank file in WAL mode; BankError if there is one already."""
    check_header(header)
    if score_floor is not None:
        score_floor = codec.check_floor(score_floor)
    with explained(path):
        if path.exists() and (not path.is_file() or path.stat().st_size > 0):
            raise BankError(f"{path} already exists")
        connection = connect(path, "rwc")
    try:
        with explained(path):
            connection.execute("BEGIN EXCLUSIVE")
            if pragma(connection, "schema_version") != 0:
                raise BankError(f"{path} already exists")
            for statement in SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            connection.executemany("INSERT INTO meta VALUES (?, ?)", list(vars(header).items()))
            if score_floor is not None:
                connection.execute(SET_FLOOR, (score_floor,))
            _next_generation(connection)
            connection.execute("COMMIT")
            connection.execute("PRAGMA journal_mode = WAL")
    except BaseException:
        connection.close()
        raise
    return Store(path, connection, header, read_only=False)


def open_store(path: Path, read_only: bool) -> Store:
    """Open a bank file; BankError says what is wrong with one that cannot be used."""
    check_file(path)
    with explained(path):
        connection = connect_read_only(path) if read_only else connect(path, "rw")
    try:
        with explained(path):
            return Store(path, connection, _read_header(path, connection), read_only)
    except BaseException:
        connection.close()
        raise


class Store:
    """One open bank file. Safe to share between threads: statements run one at a time."""

    def __init__(
        self, path: Path, connection: sqlite3.Connection, header: Header, read_only: bool
    ) -> None:
        self.path = path
        self.header = header
        self.read_only = read_only
        self._connection = connection
        self._lock = threading.RLock()

    def close(self) -> None:
        """Close the file; harmless when it is closed already."""
        with self._lock:
            self._connection.close()

    def seal(self) -> None:
        """Make the bank a single dense file without -wal and -shm; nobody else may have it open."""
        self._check_writable()
        with self._lock, explained(self.path):
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            if pragma(self._connection, "journal_mode = DELETE") != "delete":
                raise BankError(f"{self.path} cannot be sealed while another process has it open")

    def compact(self) -> None:
        """Give the space of removed memories back to the file system; the mode stays as it is."""
        self._check_writable()
        with self._lock, explained(self.path):
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Everything read inside belongs to one state of the bank."""
        with self._transaction("BEGIN"):
            yield

    # --- reading ---------------------------------------------------------------------------

    def count(self) -> int:
        """How many memories there are."""
        return int(self._rows("SELECT count(*) FROM memories")[0][0])

    def generation(self) -> Generation:
        """The current state: it changes with every write, by whichever process."""
        rows = self._rows("SELECT max(generation), token FROM generations")
        number, token = rows[0]
        if not isinstance(number, int) or not isinstance(token, str):
            raise BankError(f"{self.path} is damaged: it has no generation")
        return Generation(number, token)

    def score_floor(self) -> float | None:
        """The score below which a memory has nothing to say, or None if none is set."""
        rows = self._rows("SELECT value FROM meta WHERE name = 'score_floor'")
        try:
            return codec.check_floor(rows[0][0]) if rows else None
        except InputError as error:
            raise BankError(f"{self.path} is damaged: {error}") from None

    def knows(self, generation: Generation) -> bool:
        """Whether ``generation`` is a recent state in the history of this very file."""
        query = "SELECT 1 FROM generations WHERE generation = ? AND token = ?"
        return bool(self._rows(query, (generation.number, generation.token)))

    def ids(self, where: Metadata | None = None) -> NDArray[np.int64]:
        """Ids of the memories that match ``where``, ascending."""
        condition, values = _where(where)
        rows = self._rows(f"SELECT m.id FROM memories m{condition}", values)
        return np.sort(np.array([row[0] for row in rows], np.int64))

    def keys(self, first_id: int = 0) -> tuple[NDArray[np.int64], Halves]:
        """Ids [N], ascending from ``first_id``, and their keys fp16 [N, Dk]."""
        ids, keys = [np.empty(0, np.int64)], [np.empty((0, self.header.key_width), np.float16)]
        query = "SELECT id, key FROM memories WHERE id >= ? ORDER BY id LIMIT ?"
        while rows := self._rows(query, (first_id, KEYS_PER_QUERY)):
            ids.append(np.array([number for number, _ in rows], np.int64))
            keys.append(self._stacked(rows))
            first_id = rows[-1][0] + 1
        return np.concatenate(ids), np.concatenate(keys)

    def memories(self, where: Metadata | None = None) -> list[Memory]:
        """All memories that match ``where``, by id."""
        condition, values = _where(where)
        return self._memories(f"{condition} ORDER BY m.id", values)

    def memories_by_id(self, ids: Sequence[int]) -> dict[int, Memory]:
        """The memories with these ids; ids that do not exist are left out."""
        found: dict[int, Memory] = {}
        for start in range(0, len(ids), IDS_PER_QUERY):
            part = [int(number) for number in ids[start : start + IDS_PER_QUERY]]
            marks = ",".join("?" * len(part))
            found |= {m.id: m for m in self._memories(f" WHERE m.id IN ({marks})", part)}
        return found

    def find(self, content_hash: bytes) -> int | None:
        """The id of the memory with this content hash, or None."""
        rows = self._rows("SELECT id FROM memories WHERE content_hash = ?", (content_hash,))
        return int(rows[0][0]) if rows else None

    def rows(self) -> Iterator[tuple[int, Row, bytes | None]]:
        """Every memory as it is stored, by id, with its thumbnail; BankError at a damaged one."""
        after = -1
        query = f"{SELECT} WHERE m.id > ? ORDER BY m.id LIMIT ?"
        while part := self._rows(query, (after, IDS_PER_QUERY)):
            for row in part:
                self._decode(row)
                yield row[0], Row(*row[1:-2]), row[-2]
            after = part[-1][0]

    def thumbnail_count(self) -> int:
        """How many memories have a thumbnail."""
        return int(self._rows("SELECT count(*) FROM thumbnails")[0][0])

    def problems(self) -> list[str]:
        """What is wrong with the file and its rows, one line each; empty if all is well."""
        checked = self._rows(f"PRAGMA integrity_check({INTEGRITY_PROBLEMS})")
        found = [f"the file: {line}" for (line,) in checked if line != "ok"]
        ids = self.ids().tolist()
        for start in range(0, len(ids), IDS_PER_QUERY):
            found += self._bad_memories(ids[start : start + IDS_PER_QUERY])
        query = "SELECT id FROM thumbnails WHERE id NOT IN (SELECT id FROM memories)"
        found += [f"thumbnail {number} belongs to no memory" for (number,) in self._rows(query)]
        return found

    # --- writing ---------------------------------------------------------------------------

    def add(self, rows: Sequence[tuple[Row, bytes | None]]) -> list[int]:
        """Add (row, thumbnail) pairs in one transaction; a known content hash gives its old id."""
        self._check_writable()
        with self._transaction("BEGIN IMMEDIATE"):
            before = self._connection.total_changes
            ids = [self._add_one(row, thumbnail)[0] for row, thumbnail in rows]
            if self._connection.total_changes != before:
                _next_generation(self._connection)
        return ids

    def copy(
        self, rows: Iterable[tuple[Row, bytes | None]], score_floor: float | None = None
    ) -> int:
        """Add checked (row, thumbnail) pairs in one transaction; how many were not known yet.

        A bank that is empty and has no score floor takes this one.
        """
        self._check_writable()
        with self._transaction("BEGIN IMMEDIATE"):
            adopts = score_floor is not None and not self.count() and self.score_floor() is None
            if adopts:
                self._connection.execute(SET_FLOOR, (score_floor,))
            added = sum(self._add_one(row, thumbnail)[1] for row, thumbnail in rows)
            if added or adopts:
                _next_generation(self._connection)
        return added

    def set_score_floor(self, value: float | None) -> None:
        """Store a score floor, or with None remove it."""
        self._check_writable()
        if value is not None:
            value = codec.check_floor(value)
        with self._transaction("BEGIN IMMEDIATE"):
            if value is None:
                self._connection.execute("DELETE FROM meta WHERE name = 'score_floor'")
            else:
                self._connection.execute(SET_FLOOR, (value,))
            _next_generation(self._connection)

    def update(
        self, number: int, source: str | None, metadata: str | None, thumbnail: bytes | None
    ) -> None:
        """Change what is given (not None) of one memory in place."""
        self._check_writable()
        with self._transaction("BEGIN IMMEDIATE"):
            row, picture = self._stored(number)
            if source is not None:
                row = row._replace(source=source)
            if metadata is not None:
                row = row._replace(metadata=metadata)
            self._write(number, row, picture if thumbnail is None else thumbnail)
            _next_generation(self._connection)

    def replace(self, number: int, row: Row, thumbnail: bytes | None) -> int:
        """Put another memory in the place of one; its id, a new one if the key is another."""
        self._check_writable()
        with self._transaction("BEGIN IMMEDIATE"):
            old, picture = self._stored(number)
            twin = self.find(row.content_hash)
            if twin not in (None, number):
                raise InputError(f"memory {twin} of {self.path} has that picture and text")
            if old.key == row.key:
                self._write(number, row, picture if thumbnail is None else thumbnail)
            else:
                self._remove_one(number)
                number, _ = self._add_one(row, thumbnail)
            _next_generation(self._connection)
        return number

    def remove(self, ids: Sequence[int]) -> None:
        """Remove memories in one transaction; an id that does not exist removes none of them."""
        self._check_writable()
        with self._transaction("BEGIN IMMEDIATE"):
            for number in ids:
                self._remove_one(number)
            if ids:
                _next_generation(self._connection)

    # --- inside ----------------------------------------------------------------------------

    def _stacked(self, rows: Sequence[tuple[int, Any]]) -> Halves:
        """The keys fp16 [N, Dk] of (id, key) rows; BankError at a damaged one."""
        width = self.header.key_width
        for number, blob in rows:
            if not isinstance(blob, bytes) or len(blob) != 2 * width:
                raise self._damaged(number)
        keys = np.frombuffer(b"".join(blob for _, blob in rows), "<f2").reshape(len(rows), width)
        finite = np.isfinite(keys).all(axis=1)
        if not finite.all():
            raise self._damaged(rows[int(np.argmin(finite))][0])
        return keys

    def _bad_memories(self, ids: Sequence[int]) -> list[str]:
        """A line for each of these memories that is damaged; those that are gone are left out."""
        try:
            self.memories_by_id(ids)
        except BankError:
            if len(ids) == 1:
                return [f"memory {ids[0]} cannot be read"]
            return [line for number in ids for line in self._bad_memories([number])]
        return []

    def _add_one(self, row: Row, thumbnail: bytes | None) -> tuple[int, bool]:
        """The memory's id, and whether it is new."""
        execute = self._connection.execute
        query = "SELECT id FROM memories WHERE content_hash = ?"
        if known := execute(query, (row.content_hash,)).fetchone():
            return int(known[0]), False
        names, marks = ",".join(Row._fields), ",".join("?" * len(row))
        query = f"INSERT INTO memories ({names}, checksum) VALUES ({marks}, ?)"
        number = int(execute(query, (*row, codec.checksum(row, thumbnail))).lastrowid or 0)
        self._set_thumbnail(number, thumbnail)
        return number, True

    def _write(self, number: int, row: Row, thumbnail: bytes | None) -> None:
        """Put a row and its thumbnail in the place of a memory, under the same id."""
        names = ",".join(f"{name} = ?" for name in (*Row._fields, "checksum"))
        values = (*row, codec.checksum(row, thumbnail), number)
        self._connection.execute(f"UPDATE memories SET {names} WHERE id = ?", values)
        self._set_thumbnail(number, thumbnail)

    def _stored(self, number: int) -> tuple[Row, bytes | None]:
        """A memory as it is stored; InputError if there is none, BankError if it is damaged."""
        rows = self._rows(f"{SELECT} WHERE m.id = ?", (number,))
        if not rows:
            raise self._unknown(number)
        self._decode(rows[0])
        return Row(*rows[0][1:-2]), rows[0][-2]

    def _remove_one(self, number: int) -> None:
        if not self._connection.execute("DELETE FROM memories WHERE id = ?", (number,)).rowcount:
            raise self._unknown(number)
        self._connection.execute("DELETE FROM thumbnails WHERE id = ?", (number,))

    def _set_thumbnail(self, number: int, thumbnail: bytes | None) -> None:
        if thumbnail is not None:
            query = "INSERT OR REPLACE INTO thumbnails VALUES (?, ?)"
            self._connection.execute(query, (number, thumbnail))

    def _memories(self, condition: str, values: Sequence[Value]) -> list[Memory]:
        return [self._decode(row) for row in self._rows(f"{SELECT}{condition}", values)]

    def _decode(self, row: tuple[Any, ...]) -> Memory:
        number, *columns, thumbnail, checksum = row
        stored = Row(*columns)
        try:
            if codec.checksum(stored, thumbnail) != checksum:
                raise ValueError("bad checksum")
            widths = self.header.key_width, self.header.latent_width
            return codec.decode((number, stored, thumbnail), *widths)
        except (TypeError, ValueError, AttributeError, RecursionError):
            raise self._damaged(number) from None

    def _rows(self, query: str, values: Sequence[Value | bytes] = ()) -> list[tuple[Any, ...]]:
        with self._lock, explained(self.path):
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        with self._lock, explained(self.path):
            self._connection.execute(begin)
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _check_writable(self) -> None:
        if self.read_only:
            raise BankError(f"{self.path} is open for reading only")

    def _unknown(self, number: int) -> InputError:
        return InputError(f"{self.path} has no memory {number}")

    def _damaged(self, number: int) -> BankError:
        return BankError(
            f"{self.path} is damaged: memory {number} cannot be read; remove it, or take the bank "
            "from a backup"
        )


def _next_generation(connection: sqlite3.Connection) -> None:
    insert = "INSERT INTO generations (token) VALUES (?)"
    newest = connection.execute(insert, (secrets.token_hex(8),)).lastrowid or 0
    oldest = newest - GENERATIONS_KEPT
    connection.execute("DELETE FROM generations WHERE generation <= ?", (oldest,))


def _where(where: Metadata | None) -> tuple[str, list[Value]]:
    """A metadata filter as SQL; a string also matches the number or bool it spells."""
    conditions: list[str] = []
    values: list[Value] = []
    for name, value in (where or {}).items():
        codec.check_value(name, value)
        if isinstance(value, bool):
            test = f"j.type = '{str(value).lower()}'"
        elif isinstance(value, str):
            text = (
                "CASE WHEN j.type IN ('true', 'false') THEN j.type ELSE CAST(j.value AS TEXT) END"
            )
            test = f"{text} = ?"
        else:
            test = "j.type IN ('integer', 'real') AND j.value = ?"
        exists = f"EXISTS (SELECT 1 FROM json_each(m.metadata) j WHERE j.key = ? AND {test})"
        conditions.append(exists)
        values += [name] if isinstance(value, bool) else [name, value]
    return (" WHERE " + " AND ".join(conditions) if conditions else ""), values


def _read_header(path: Path, connection: sqlite3.Connection) -> Header:
    if pragma(connection, "application_id") != APPLICATION_ID:
        raise BankError(f"{path} is an SQLite file but not a memory bank")
    version = pragma(connection, "user_version")
    if version > FORMAT:
        raise BankError(
            f"{path} has bank format {version}, newer than {FORMAT}, which this version of "
            "tinyalign reads: upgrade it"
        )
    if version < FORMAT:
        raise BankError(
            f"{path} has bank format {version}, this version of tinyalign reads {FORMAT}: export "
            "it with the version that made it and import that folder into a new bank"
        )
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    if missing := TABLES - {name for (name,) in names}:
        raise BankError(f"{path} is damaged: table {min(missing)} is missing")
    meta = dict(connection.execute("SELECT name, value FROM meta").fetchall())
    try:
        header = Header(**{name: meta[name] for name in Header.__dataclass_fields__})
        check_header(header)
    except (KeyError, InputError):
        raise BankError(f"{path} is damaged: its header is incomplete") from None
    return header


def check_header(header: Header) -> None:
    """What a new bank is to be; InputError if that is impossible."""
    for text in (header.fingerprint, header.name):
        if not isinstance(text, str) or not text:
            raise InputError("a bank needs a fingerprint and a name")
    for width in (header.key_width, header.latent_width):
        if not isinstance(width, int) or not 0 < width <= MAX_WIDTH:
            raise InputError(f"a bank's key and latent widths are 1 to {MAX_WIDTH}, not {width!r}")
