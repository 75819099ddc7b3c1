"""Connecting to Qdrant: addresses of collections, one client for each, and clear errors.

    qdrant://HOST:PORT/COLLECTION        a server, over HTTP (port 6333 unless given)
    qdrants://HOST:PORT/COLLECTION       the same over HTTPS
    qdrant:///FOLDER/COLLECTION          a folder of this machine (the client's local mode)

The API key for a server is taken from the environment variable QDRANT_API_KEY.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tinyalign.bank.errors import BankError, InputError, TinyAlignError

try:
    from qdrant_client import QdrantClient, models
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
except ModuleNotFoundError as error:
    raise InputError(
        f"a bank in Qdrant needs its client ({error.name} is missing): "
        "pip install 'tinyalign[qdrant]'"
    ) from None

__all__ = ["Address", "Connection", "models", "parse_address"]

DEFAULT_PORT = 6333
TIMEOUT_SECONDS = 30
FORBIDDEN = set('/\\<>:"|?*\0')  # Qdrant allows these in no collection's name
MESSAGE_LENGTH = 200  # of what a server says of an error


@dataclass(frozen=True)
class Address:
    """Where a collection is: on a server (``url``) or in a ``folder``."""

    text: str  # as it was given
    url: str
    folder: Path | None
    collection: str

    def __str__(self) -> str:
        return self.text


def parse_address(text: str) -> Address:
    """What an address names; InputError if it is none."""
    scheme, _, rest = text.partition("://")
    place, _, collection = rest.rpartition("/")
    if not collection or collection in (".", "..") or FORBIDDEN & set(collection) or not place:
        raise InputError(
            f"{text} is no address of a bank: qdrant://HOST:PORT/COLLECTION, or "
            "qdrant:///FOLDER/COLLECTION in a folder of this machine"
        )
    if place.startswith("/"):
        return Address(text, "", Path(place), collection)
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    if not host or parts.path or parts.query or parts.fragment:
        raise InputError(f"{text} is no address of a bank: {place} is no HOST:PORT")
    if parts.username is not None:
        raise InputError("a bank's address holds no password: the key goes into QDRANT_API_KEY")
    host = f"[{host}]" if ":" in host else host
    protocol = "https" if scheme == "qdrants" else "http"
    return Address(text, f"{protocol}://{host}:{port}", None, collection)


class Connection:
    """A client for one collection. Banks of this process in the same folder share its client."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._open = True
        if address.folder is None:
            self._folder = None
            with _explained(address):
                self._client = QdrantClient(
                    url=address.url,
                    api_key=os.environ.get("QDRANT_API_KEY") or None,
                    timeout=TIMEOUT_SECONDS,
                    check_compatibility=False,  # it warns from a thread; errors say more
                )
        else:
            self._folder = _enter(address, address.folder)
            self._client = self._folder.client

    @contextmanager
    def client(self) -> Iterator[QdrantClient]:
        """The client, for calls whose errors become one clear line."""
        if not self._open:
            raise BankError(f"{self.address} is closed")
        with self._folder.lock if self._folder else nullcontext(), _explained(self.address):
            yield self._client

    def close(self) -> None:
        """Give the client back; harmless when that is done already."""
        if self._open:
            self._open = False
            if self._folder is None:
                self._client.close()
            else:
                _leave(self._folder)


# --- folders: one client each, since it locks the folder ------------------------------------


@dataclass
class _Folder:
    path: Path
    client: QdrantClient
    lock: threading.RLock  # the client's local mode is not made for threads
    users: int


_folders: dict[Path, _Folder] = {}
_entering = threading.Lock()


def _enter(address: Address, path: Path) -> _Folder:
    with _entering, _explained(address):
        path = path.resolve()
        folder = _folders.get(path)
        if folder is None:
            client = QdrantClient(path=str(path), force_disable_check_same_thread=True)
            folder = _folders[path] = _Folder(path, client, threading.RLock(), 0)
            atexit.register(client.close)  # while all that it needs for that is still there
        folder.users += 1
        return folder


def _leave(folder: _Folder) -> None:
    with _entering, folder.lock:
        folder.users -= 1
        if not folder.users:
            del _folders[folder.path]
            atexit.unregister(folder.client.close)
            folder.client.close()


# --- errors --------------------------------------------------------------------------------


@contextmanager
def _explained(address: Address) -> Iterator[None]:
    """Turn what the client raises into one clear line."""
    try:
        yield
    except TinyAlignError:
        raise
    except Exception as error:
        raise BankError(_explanation(address, error)) from error


def _explanation(address: Address, error: Exception) -> str:
    if isinstance(error, ResponseHandlingException):
        return _no_answer(address, error.source)
    if isinstance(error, ResourceExhaustedResponse):
        return f"{address}: the server has too much to do; try again later"
    if isinstance(error, UnexpectedResponse):
        return _refusal(address, error)
    if isinstance(error, RuntimeError) and "already accessed" in str(error):
        return (
            f"{address} is in use by another process: a folder is for one process at a time, "
            "several need a Qdrant server"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{address} cannot be used: {error.strerror}"
    if isinstance(error, ValueError) and address.folder is None:
        return _no_answer(address, error)
    return f"{address} cannot be read or written: {_short(str(error) or type(error).__name__)}"


def _no_answer(address: Address, cause: Exception) -> str:
    kind = type(cause).__name__
    if "Timeout" in kind:
        return f"{address}: {address.url} does not answer within {TIMEOUT_SECONDS} s"
    if "Connect" in kind or "Network" in kind or "Protocol" in kind or "ReadError" in kind:
        return f"{address}: no Qdrant server answers at {address.url} ({_short(str(cause))})"
    return f"{address}: what {address.url} answers is not understood; is it a Qdrant server?"


def _refusal(address: Address, error: UnexpectedResponse) -> str:
    if error.status_code in (401, 403):
        return f"{address}: the server refuses: set QDRANT_API_KEY to a key that may do this"
    if error.status_code == 404:
        return f"{address} does not exist (any more)"
    if error.status_code == 409:
        return f"{address} already exists"
    try:
        reason = str(error.structured()["status"]["error"])
    except (ValueError, KeyError, TypeError):
        reason = error.reason_phrase
    return f"{address}: the server says: {_short(reason)} (HTTP {error.status_code})"


def _short(text: str) -> str:
    """A message on one line."""
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_LENGTH else line[: MESSAGE_LENGTH - 3] + "..."
