"""Many pictures and texts into a bank, a batch at a time.

items ─► pictures, read side by side ─► those the bank does not know ─► encoder ─► bank
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyalign.bank import NewMemory, opening
from tinyalign.bank.bank import MemoryBank
from tinyalign.bank.memory import metadata_json
from tinyalign.bank.store import Header
from tinyalign.runtime.errors import InputError, PictureError
from tinyalign.runtime.images import load_for, resize, thumbnail
from tinyalign.runtime.items import Item
from tinyalign.runtime.model import TinyAlign

BATCH = 32  # memories a transaction; what is committed is kept when adding is interrupted


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


@dataclass(frozen=True, eq=False)
class Batch:
    """Items, encoded."""

    hashes: tuple[str, ...]  # content hash of every item whose picture could be read, in order
    new: tuple[NewMemory, ...]  # those that were not known, each once
    failed: tuple[Failure, ...]


def teach(
    model: TinyAlign,
    items: Sequence[Item],
    bank: MemoryBank,
    progress: Callable[[int], None] = lambda done: None,
) -> Taught:
    """Add items to a bank, a batch at a time.

    What the bank holds already is skipped, so an interrupted ``teach`` is continued by calling it
    again. All texts and metadata are checked before anything is added: InputError. A picture that
    cannot be read is a failure; the rest is added. ``progress`` gets the number of items done.
    """
    check_items(model, items)
    done = Taught((), (), ())
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        batch = encode_items(model, part, bank.find)
        before = {content: bank.find(content) for content in batch.hashes}
        ids = bank.add(batch.new)
        now = before | dict(zip((m.content_hash for m in batch.new), ids, strict=True))
        done = tally(done, batch.hashes, before, now, batch.failed)
        progress(start + len(part))
    return done


def check_items(model: TinyAlign, items: Iterable[Item]) -> None:
    """InputError if a text or metadata cannot be stored; it names the first and counts the rest."""
    wrong = []
    for item in items:
        try:
            model.check_text(item.text)
            metadata_json(item.metadata)
        except InputError as error:
            wrong.append(f"{item.place}: {error}")
    if wrong:
        others = f" (and {len(wrong) - 1} more like this)" if len(wrong) > 1 else ""
        raise InputError(wrong[0] + others)


def encode_items(
    model: TinyAlign, items: Sequence[Item], find: Callable[[str], int | None]
) -> Batch:
    """Look at the pictures of checked items; those are left out whose content hash ``find`` knows.

    The result does not depend on which items come together, to the last bit.
    """
    pool = ThreadPoolExecutor(model.parts.threads)
    try:
        read = list(pool.map(lambda item: _read(model, item), items))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all of them
    pictures = [picture for picture in read if isinstance(picture, _Read)]
    failed = tuple(failure for failure in read if isinstance(failure, Failure))
    new: dict[str, _Read] = {}
    for picture in pictures:
        if find(picture.content_hash) is None:
            new.setdefault(picture.content_hash, picture)
    memories = []
    encoded = model.encode_many([picture.pixels for picture in new.values()])
    for picture, seen in zip(new.values(), encoded, strict=True):
        item = picture.item
        memory = model.memory(seen, item.text, source_of(item.image), item.metadata)
        memories.append(replace(memory, thumbnail=picture.thumbnail))
    return Batch(tuple(p.content_hash for p in pictures), tuple(memories), failed)


def tally(
    done: Taught,
    hashes: Sequence[str],
    before: Mapping[str, int | None],
    now: Mapping[str, int | None],
    failed: Sequence[Failure],
) -> Taught:
    """``done`` and what became of a batch: ids by content hash before and after it was added."""
    added, known = list(done.added), list(done.known)
    unseen = {content for content in hashes if before[content] is None}
    for content in hashes:
        number = now[content]
        if number is not None:  # None: another process has removed it since
            (added if content in unseen else known).append(number)
        unseen.discard(content)
    return Taught(tuple(added), tuple(known), (*done.failed, *failed))


def header(model: TinyAlign, name: str) -> Header:
    """What a bank for this model is made for."""
    manifest = model.parts.manifest
    return Header(manifest.fingerprint, model.parts.keys.width, manifest.memory.width, name)


def model_floor(model: TinyAlign) -> float:
    """The score below which the model itself does not use a memory: what a new bank starts with."""
    return model.parts.manifest.prompt.similarity[-1][1]


def create_bank(model: TinyAlign, name: str | Path) -> MemoryBank:
    """A new, empty bank for a model in a file or at an address, with the model's score floor.

    BankError if something is there already.
    """
    h = header(model, "")
    widths = h.key_width, h.latent_width
    return opening.create_bank(name, h.fingerprint, *widths, score_floor=model_floor(model))


def source_of(image: Path) -> str:
    """A picture's path as a memory's source; bytes that are not UTF-8 become question marks."""
    return os.fsencode(image).decode("utf-8", "replace")


@dataclass(frozen=True, eq=False)
class _Read:
    """An item's picture as the encoder sees it, u8 [S, S, 3], and as people see it."""

    item: Item
    pixels: NDArray[np.uint8]
    thumbnail: bytes
    content_hash: str


def _read(model: TinyAlign, item: Item) -> _Read | Failure:
    spec = model.parts.manifest.image
    try:
        picture = load_for(item.image, spec)
    except PictureError as error:
        return Failure(item, str(error))
    pixels = resize(picture, spec)
    return _Read(item, pixels, thumbnail(picture), model.content_hash(pixels, item.text))
