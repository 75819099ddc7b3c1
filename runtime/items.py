"""What to remember, read from lists: JSON lines, tables, LLaVA's JSON, folders of pictures."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tinyalign.bank.memory import Metadata
from tinyalign.runtime.errors import InputError

COLUMNS = {"image", "text", "metadata"}
# The last three are pictures that cannot be read: better to say so than to pass them over.
SUFFIXES = tuple(
    ".jpg .jpeg .jpe .png .gif .bmp .ppm .pgm .webp .tif .tiff .avif .jp2 .ico "
    ".heic .heif .jxl".split()
)


@dataclass(frozen=True)
class Item:
    """A picture and a text to remember."""

    image: Path
    text: str
    metadata: Metadata
    place: str  # what to call it in messages: a file, or a file and a line


def read_jsonl(text: str, name: str, folder: Path) -> list[Item]:
    """Items from lines of ``{"image", "text", "metadata"}``; pictures are looked for in ``folder``.

    A line that is something else raises InputError with its number. Empty lines are left out.
    """
    items = []
    for place, data in json_lines(text, name):
        if not isinstance(data, dict):
            raise InputError(f"{place}: this is not a JSON object")
        items.append(_item(data, place, folder))
    return items


def json_lines(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """(place for messages, value) of every line that is not empty; InputError if it is no JSON."""
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold other line separators
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "too deep")
            raise InputError(f"{place}: this is not JSON ({reason})") from None


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


def read_llava(text: str, name: str, folder: Path) -> tuple[list[Item], list[str]]:
    """Items from LLaVA's JSON: a list of entries with "image" and "conversations" or "caption".

    Each question of a conversation becomes a memory with its answer; of a request without a
    question mark ("Describe the picture.") only the answer is kept. Where "image" is a list, each
    of its pictures is remembered with the text. An entry without "image" is about no picture: it
    is left out, and its place is in the second list. InputError names the entry.
    """
    items = []
    pictureless = []
    for number, entry in enumerate(llava_entries(text, name), 1):
        place = f"{name}, entry {number}"
        texts = [told(question, answer) for question, answer in llava_turns(entry, place)]
        images = entry.get("image")
        if images is None:
            pictureless.append(place)
            continue
        for image in images if isinstance(images, list) else [images]:
            items += [_item({"image": image, "text": told}, place, folder) for told in texts]
    return items, pictureless


def llava_entries(text: str, name: str) -> list[Any]:
    """The entries of LLaVA's JSON, not yet checked; InputError where it is no JSON list."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{name}{where}: this is not JSON") from None
    if not isinstance(entries, list):
        raise InputError(f"{name}: this is not a JSON list of conversations or captions")
    return entries


def llava_turns(entry: Any, place: str) -> list[tuple[str, Any]]:
    """Questions of an entry with their answers, without the ``<image>`` marker.

    A caption is the answer to a request. InputError where there is neither.
    """
    if isinstance(entry, dict) and "caption" in entry:
        return [("Describe the picture.", entry["caption"])]
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    try:
        speakers = [turn["from"] for turn in turns or ()]
        values = [turn["value"].replace("<image>", " ").strip() for turn in turns or ()]
    except (TypeError, KeyError, AttributeError):
        speakers = []
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise InputError(f"{place}: no caption and no conversation of human and gpt in turns")
    return list(zip(values[::2], values[1::2], strict=True))


def told(question: str, answer: Any) -> Any:
    """What a memory says of a question and its answer: of a request only the answer."""
    return f"{question} {answer}" if "?" in question else answer


def read_folder(folder: Path, text: str | None) -> list[Item]:
    """All pictures in a folder and those below it; without ``text``, the file's name is the text.

    Of a file's name, ``_`` and ``-`` become spaces. Hidden files are left out. A link that leads
    nowhere is a picture that cannot be read; a folder that cannot be read raises InputError.
    """
    found = sorted(path for path in _files(folder) if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{folder} holds no pictures")
    return [Item(p, text if text is not None else spoken(p), {}, str(p)) for p in found]


def spoken(path: Path) -> str:
    """A file's name as a text: ``red_cup-2.jpg`` -> ``red cup 2``."""
    return " ".join(path.stem.replace("_", " ").replace("-", " ").split())


def _files(folder: Path) -> Iterator[Path]:
    """Files and dead links below a folder, without hidden ones."""

    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"cannot read {error.filename}: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if path.is_file() or not path.exists():
                yield path


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
