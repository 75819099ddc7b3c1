"""A bank as a folder that people and other programs can read: JSONL and thumbnails.

    bank.json           what the bank was made for, and its score floor (null if it has none)
    memories.jsonl      one memory a line, by id; vectors as base64 of the stored bytes
    thumbnails/ID.webp  the pictures (whatever their encoding: the name is only for people)

Everything but the ids comes back bit for bit; ids belong to one file.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinyalign.bank.errors import BankError, InputError
from tinyalign.bank.memory import (
    Row,
    Stored,
    check_floor,
    check_row,
    check_text,
    decode_metadata,
    metadata_json,
)
from tinyalign.bank.store import FORMAT, Header

HEADER = "bank.json"
MEMORIES = "memories.jsonl"
THUMBNAILS = "thumbnails"


def export_bank(
    header: Header, score_floor: float | None, rows: Iterable[Stored], directory: Path
) -> int:
    """Write a bank to a new folder, whole or not at all; returns how many memories there are."""
    if directory.exists():
        raise InputError(f"{directory} already exists")
    if not directory.parent.is_dir():
        raise InputError(f"there is no directory {directory.parent}")
    temporary = Path(tempfile.mkdtemp(prefix=directory.name + ".", dir=directory.parent))
    try:
        count = _write(header, score_floor, rows, temporary)
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return count


def read_header(directory: Path) -> Header:
    """What an exported folder's bank was made for; BankError if the folder is none."""
    return _read_header(directory)[0]


def _read_header(directory: Path) -> tuple[Header, float | None]:
    """The header and the score floor."""
    try:
        data = json.loads((directory / HEADER).read_text("utf-8"))
        version = data.pop("format")
        if isinstance(version, int) and version > FORMAT:
            raise BankError(f"{directory} has bank format {version}, newer than {FORMAT}")
        floor = data.pop("score_floor", None)
        return Header(**data), None if floor is None else check_floor(floor)
    except OSError as error:
        raise BankError(f"{directory} is no exported bank: {HEADER}: {error.strerror}") from None
    except BankError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BankError(f"{directory / HEADER} is not the header of an exported bank") from None


def read_export(
    directory: Path, header: Header
) -> tuple[Iterator[tuple[Row, bytes | None]], float | None]:
    """The (row, thumbnail) pairs of an exported folder, to be read once, and its score floor.

    ``header`` is that of the bank to add them to; BankError if the folder is of another model.
    """
    exported, floor = _read_header(directory)
    if exported.fingerprint != header.fingerprint:
        raise BankError(
            f"{directory} was made for another model (fingerprint {exported.fingerprint[:12]}, the "
            f"bank's is {header.fingerprint[:12]})"
        )
    return _read(directory, header), floor


def _write(
    header: Header, score_floor: float | None, rows: Iterable[Stored], directory: Path
) -> int:
    (directory / THUMBNAILS).mkdir()
    data = {"format": FORMAT, **asdict(header), "score_floor": score_floor}
    text = json.dumps(data, ensure_ascii=False, indent=2)
    (directory / HEADER).write_text(text + "\n", "utf-8")
    count = 0
    with (directory / MEMORIES).open("w", encoding="utf-8", newline="\n") as file:
        for number, row, thumbnail in rows:
            line = _to_json(number, row)
            if thumbnail is not None:
                name = f"{THUMBNAILS}/{number}.webp"
                (directory / name).write_bytes(thumbnail)
                line["thumbnail"] = name
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return count


def _to_json(number: int, row: Row) -> dict[str, Any]:
    vectors = {name: _base64(getattr(row, name)) for name in ("key", "latents", "scales")}
    return {
        "id": number,
        "text": row.text,
        "source": row.source,
        "metadata": decode_metadata(row.metadata),
        "content_hash": row.content_hash.hex(),
        **vectors,
    }


def _read(directory: Path, header: Header) -> Iterator[tuple[Row, bytes | None]]:
    path = directory / MEMORIES
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row, name = _from_json(json.loads(line))
                    check_row(row, header.key_width, header.latent_width)
                    yield row, None if name is None else _thumbnail(directory, name)
                except (InputError, KeyError, TypeError, ValueError, RecursionError) as error:
                    reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
                    raise InputError(f"{path}, line {number}: {reason}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _from_json(line: Any) -> tuple[Row, str | None]:
    """A line's row, not yet checked, and the name of its thumbnail."""
    if not isinstance(line, dict):
        raise InputError("this is not a JSON object")
    key, latents, scales = (_bytes(line[name], name) for name in ("key", "latents", "scales"))
    row = Row(
        content_hash=bytes.fromhex(line["content_hash"]),
        key=key,
        latents=latents,
        scales=scales,
        text=check_text(line["text"], "text"),
        source=check_text(line["source"], "source"),
        metadata=metadata_json(line["metadata"]),
    )
    if len(row.content_hash) != 32:
        raise InputError("the content hash is not a hex SHA-256 (64 digits)")
    return row, line.get("thumbnail")


def _thumbnail(directory: Path, name: object) -> bytes:
    """The picture's bytes; names lead into the folder of thumbnails only."""
    folder, _, file = str(name).partition("/")
    if folder != THUMBNAILS or not file or Path(file).name != file:
        raise InputError(f"{name!r} is not a file in {THUMBNAILS}/")
    try:
        return (directory / THUMBNAILS / file).read_bytes()
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: object, name: str) -> bytes:
    with contextlib.suppress(binascii.Error, ValueError):
        if isinstance(text, str):
            return base64.b64decode(text, validate=True)
    raise InputError(f"{name} is not base64")
