"""Many pictures and texts into a bank: reading lists of them, and adding them batch by batch."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyalign.bank import Bank, NewMemory
from tinyalign.bank.memory import Metadata, metadata_json
from tinyalign.runtime.errors import InputError, PictureError
from tinyalign.runtime.images import load_picture
from tinyalign.runtime.model import TinyAlign

BATCH = 32  # memories a transaction; what is committed is kept when adding is interrupted
COLUMNS = {"image", "text", "metadata"}
SUFFIXES = tuple(
    ".jpg .jpeg .jpe .png .gif .bmp .ppm .pgm .webp .tif .tiff .avif .jp2 .ico".split()
)


@dataclass(frozen=True)
class Item:
    """A picture and a text to remember."""

    image: Path
    text: str
    metadata: Metadata
    place: str  # what to call it in messages: a file, or a file and a line


@dataclass(frozen=True)
class Failure:
    """A picture that could not be read."""

    item: Item
    reason: str


@dataclass(frozen=True)
class Taught:
    """What became of the items: ids of new memories, ids of those known before, failures."""

    added: tuple[int, ...]
    known: tuple[int, ...]
    failed: tuple[Failure, ...]


def read_jsonl(text: str, name: str, folder: Path) -> list[Item]:
    """Items from lines of ``{"image", "text", "metadata"}``; pictures are looked for in ``folder``.

    A line that is something else raises InputError with its number. Empty lines are left out.
    """
    items = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold other line separators
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "too deep")
            raise InputError(f"{place}: this is not JSON ({reason})") from None
        if not isinstance(data, dict):
            raise InputError(f"{place}: this is not a JSON object")
        items.append(_item(data, place, folder))
    return items


def read_csv(text: str, name: str, folder: Path) -> list[Item]:
    """Items from a table with columns image and text; metadata is JSON, other columns are added."""
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True, restkey="")
    items = []
    try:
        for row in rows:
            place = f"{name}, line {rows.line_num}"
            if "" in row:
                raise InputError(f"{place}: more fields than the first line has names")
            data: dict[str, Any] = {key: row[key] for key in ("image", "text") if key in row}
            try:
                given = json.loads(row.get("metadata") or "{}")
            except (ValueError, RecursionError):
                given = None
            if not isinstance(given, dict):
                raise InputError(f"{place}: metadata is not a JSON object")
            others = {key: value for key, value in row.items() if key not in COLUMNS and value}
            items.append(_item(data | {"metadata": others | given}, place, folder))
    except csv.Error as error:
        raise InputError(f"{name}, line {rows.line_num}: {error}") from None
    return items


def read_llava(text: str, name: str, folder: Path) -> list[Item]:
    """Items from LLaVA's JSON: a list of entries with "image" and "conversations" or "caption".

    Each question of a conversation becomes a memory with its answer; of a request without a
    question mark ("Describe the picture.") only the answer is kept. InputError names the entry.
    """
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{name}{where}: this is not JSON") from None
    if not isinstance(entries, list):
        raise InputError(f"{name}: this is not a JSON list of conversations or captions")
    items = []
    for number, entry in enumerate(entries, 1):
        place = f"{name}, entry {number}"
        for told in _told(entry, place):
            items.append(_item({"image": entry.get("image"), "text": told}, place, folder))
    return items


def read_folder(folder: Path, text: str | None) -> list[Item]:
    """All pictures in a folder and those below it; without ``text``, the file's name is the text.

    Of a file's name, ``_`` and ``-`` become spaces. Hidden files are left out.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise InputError(f"{folder} holds no pictures")
    return [Item(p, text if text is not None else spoken(p), {}, str(p)) for p in found]


def spoken(path: Path) -> str:
    """A file's name as a text: ``red_cup-2.jpg`` -> ``red cup 2``."""
    return " ".join(path.stem.replace("_", " ").replace("-", " ").split())


def source_of(image: Path) -> str:
    """A picture's path as a memory's source; bytes that are not UTF-8 become question marks."""
    return os.fsencode(image).decode("utf-8", "replace")


def teach(
    model: TinyAlign,
    items: Sequence[Item],
    path: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> Taught:
    """Add items to the bank at ``path``, a batch at a time; it is created if it is not there.

    What the bank holds already is skipped, so an interrupted ``teach`` is continued by calling it
    again. All texts and metadata are checked before anything is added: InputError. A picture that
    cannot be read is a failure; the rest is added. ``progress`` gets the number of items done.
    """
    for item in items:
        try:
            model.check_text(item.text)
            metadata_json(item.metadata)
        except InputError as error:
            raise InputError(f"{item.place}: {error}") from None
    added: list[int] = []
    known: list[int] = []
    failed: list[Failure] = []
    bank = Bank.open(path, model.parts.manifest.fingerprint) if path.exists() else None
    try:
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            new: dict[str, NewMemory] = {}  # by content hash
            twins: list[str] = []
            for item in batch:
                try:
                    picture = load_picture(item.image, model.parts.manifest.image.background)
                except PictureError as error:
                    failed.append(Failure(item, str(error)))
                    continue
                digest = model.content_hash(picture, item.text)
                old = bank.find(digest) if bank else None
                if old is not None:
                    known.append(old)
                elif digest in new:
                    twins.append(digest)
                else:
                    source = source_of(item.image)
                    new[digest] = model.memory(picture, item.text, source, item.metadata)
            if new:
                bank = bank or create_bank(model, path)
                ids = dict(zip(new, bank.add(new.values()), strict=True))
                added += ids.values()
                known += [ids[digest] for digest in twins]
            progress(start + len(batch))
    finally:
        if bank is not None:
            bank.close()
    return Taught(tuple(added), tuple(known), tuple(failed))


def create_bank(model: TinyAlign, path: str | Path) -> Bank:
    """A new, empty bank for a model at `path`; BankError if something is there already."""
    manifest = model.parts.manifest
    return Bank.create(
        path, manifest.fingerprint, model.parts.keys.width, manifest.compressor.width
    )


def _item(data: dict[str, Any], place: str, folder: Path) -> Item:
    """One entry of a list, checked for its names and types."""
    if unknown := set(data) - COLUMNS:
        raise InputError(f"{place}: unknown name {min(unknown)!r} (image, text, metadata)")
    for name in ("image", "text"):
        if not isinstance(data.get(name), str) or not data[name].strip():
            raise InputError(f"{place}: {name} is missing or no text")
    metadata = data.get("metadata", {})
    if not isinstance(metadata, dict):
        raise InputError(f"{place}: metadata is not a JSON object")
    return Item(folder / data["image"], data["text"], metadata, place)


def _told(entry: Any, place: str) -> list[Any]:
    """What one LLaVA entry says about its picture: a text for each memory."""
    if isinstance(entry, dict) and "caption" in entry:
        return [entry["caption"]]
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    try:
        speakers = [turn["from"] for turn in turns or ()]
        values = [turn["value"].replace("<image>", " ").strip() for turn in turns or ()]
    except (TypeError, KeyError, AttributeError):
        speakers = []
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise InputError(f"{place}: no caption and no conversation of human and gpt in turns")
    pairs = zip(values[::2], values[1::2], strict=True)
    return [f"{question} {answer}" if "?" in question else answer for question, answer in pairs]
