"""SQLite for bank files: connecting, looking at a file before SQLite does, and clear errors."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyalign.bank.errors import BankError

MAX_VALUE_BYTES = 16 << 20  # no text, thumbnail or blob in a bank is larger
BUSY_SECONDS = 10.0
SETTINGS = (
    "synchronous = FULL",
    "fullfsync = ON",  # macOS: through the disk's own cache as well
    "trusted_schema = OFF",
    "cell_size_check = ON",
)


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open with ``mode`` (SQLite's: ro, rw, rwc) for use from any thread, one at a time."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        for setting in SETTINGS:
            connection.execute(f"PRAGMA {setting}")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # reads the file
    except BaseException:
        connection.close()
        raise
    return connection


def connect_read_only(path: Path) -> sqlite3.Connection:
    """WAL mode writes beside the file; where that is impossible, nobody can change it either."""
    try:
        return connect(path, "ro")
    except sqlite3.OperationalError as error:
        cannot_write = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
        if _code(error) not in cannot_write and not _no_shared_memory(error):
            raise
    if not _size(path, "-wal") and not _size(path, "-journal"):
        return connect(path, "ro&immutable=1")
    try:
        connect(path, "rw").close()  # takes back what a killed process left half-written
        return connect(path, "ro")
    except sqlite3.OperationalError:
        raise BankError(
            f"{path} was not closed cleanly and its directory is read-only: "
            "open it once where it can be written"
        ) from None


def check_file(path: Path) -> None:
    """Refuse what is no SQLite file or is cut short, before SQLite looks at it."""
    try:
        if not path.exists():
            raise BankError(f"{path} does not exist")
        if not path.is_file():
            raise BankError(f"{path} is not a file")
        with path.open("rb") as file:
            head = file.read(100)
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise BankError(f"{path} is empty, not a memory bank")
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
        raise BankError(f"{path} is not a memory bank (not an SQLite file)")
    page = int.from_bytes(head[16:18], "big")
    declared = (65_536 if page == 1 else page) * int.from_bytes(head[28:32], "big")
    if _size(path) < declared and not _size(path, "-wal") and not _size(path, "-journal"):
        raise BankError(
            f"{path} is cut short: {_size(path)} of {declared} bytes; take it from a backup"
        )


def _size(path: Path, suffix: str = "") -> int:
    try:
        return path.with_name(path.name + suffix).stat().st_size
    except OSError:
        return 0


def pragma(connection: sqlite3.Connection, name: str) -> Any:
    """The value that a PRAGMA answers with."""
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what SQLite raises into one clear line."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError, OverflowError) as error:
        raise BankError(_explanation(path, error)) from error
    except OSError as error:
        raise BankError(f"{path} cannot be used: {error.strerror}") from None


def _explanation(path: Path, error: Exception) -> str:
    code = _code(error)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"{path} is locked by another process for over {BUSY_SECONDS:.0f} s; try again"
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK:
        return f"{path} was left half-written by a process that was killed: open it again"
    if code == sqlite3.SQLITE_READONLY:
        return f"{path} cannot be written: it or its directory is read-only"
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return f"{path} cannot be opened: no such directory, or no permission"
    if code == sqlite3.SQLITE_FULL or _no_shared_memory(error):
        return f"{path} cannot be written: no space is left; nothing was changed"
    if code == sqlite3.SQLITE_IOERR:
        return f"{path} cannot be read or written: the disk reports an error"
    if code == sqlite3.SQLITE_TOOBIG:
        return f"a text or thumbnail is over {MAX_VALUE_BYTES >> 20} MiB; {path} was not changed"
    if isinstance(error, OverflowError):
        return f"{path} has no such memory: ids are 64-bit numbers"
    if isinstance(error, sqlite3.ProgrammingError):
        return f"{path} is closed"
    return f"{path} is damaged: SQLite cannot read it; take it from a backup"


def _no_shared_memory(error: Exception) -> bool:
    """Whether there was no space for the -shm file, which even readers in WAL mode need."""
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHMSIZE


def _code(error: Exception) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF  # the primary part of the code
