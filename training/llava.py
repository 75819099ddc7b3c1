"""Training on anybody's pictures: questions and answers in LLaVA's JSON.

    [{"image": "cup.jpg", "concept": "cup",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                        {"from": "gpt", "value": "A cup."}]}, ...]

`read_data` checks a file, `encode_data` puts its pictures into the feature cache. Its rows are then
a source like any other: asked as they are (`questions.py`), with a share in `episodes.SHARES`, and
memories in the training bank. All entries of a concept are on one side of the split; the concept is
the entry's own ("concept", also in "metadata"), else the path of its picture without the extension.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer

from tinyalign.bank.memory import check_text
from tinyalign.runtime.errors import InputError, PictureError
from tinyalign.runtime.images import load_picture, resize, thumbnail
from tinyalign.runtime.items import llava_entries, llava_turns
from tinyalign.runtime.manifest import ImageSpec
from tinyalign.runtime.prompt import encode_text
from tinyalign.training.features import (
    IMAGE,
    Job,
    Record,
    append_rows,
    done_rows,
    encoder,
    features_dir,
)
from tinyalign.training.pictures import split_of
from tinyalign.training.sources import cache_dir
from tinyalign.training.views import rng_of, unmirrored_view

SOURCE = "llava"  # of all records, whatever file they are from
VIEWS = 2  # the picture as it is, and cropped and lit differently
LISTED = 20  # pictures that cannot be read are named up to this many


@dataclass(frozen=True)
class Shown:
    """A picture file and the record of its first view, with all that is asked about it."""

    file: Path
    record: Record


@dataclass(frozen=True)
class Data:
    """What a JSON file holds.

    Attributes:
        name: the file, for messages.
        source: names its files in the feature cache; another one when the file changes.
        pictures: each once, in the order of their first entries.
        entries: all of them.
        pictureless: entries about no picture, which are left out.
        several: entries with several pictures, of which only the first is used.
    """

    name: str
    source: str
    pictures: tuple[Shown, ...]
    entries: int
    pictureless: int
    several: int


def read_data(path: Path, images: Path | None = None) -> Data:
    """Read and check a JSON file; its pictures are looked for in `images`, else beside it.

    Raises InputError, naming the file and the entry, for whatever is not as it should be. Pictures
    are not opened here.
    """
    folder = path.parent if images is None else images
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of pictures")
    found: dict[str, Shown] = {}
    entries = llava_entries(text, str(path))
    pictureless = several = 0
    for number, entry in enumerate(entries, 1):
        place = f"{path}, entry {number}"
        turns = _turns(entry, place)
        names = _images(entry, place)
        if not names:
            pictureless += 1
            continue
        several += len(names) > 1
        file = folder / names[0]
        concept = _concept(entry, names[0], place)
        record = Record(
            _id(file), 0, SOURCE, split_of(concept), "", concept, "", "", "", "", questions=turns
        )
        if known := found.get(record.id):  # a picture of an earlier entry
            if known.record.concept != concept:
                raise InputError(
                    f"{place}: the concept of {names[0]} was {known.record.concept!r} before, "
                    f"here it is {concept!r}: a picture has one"
                )
            record = replace(record, questions=known.record.questions + turns)
        found[record.id] = Shown(file, record)
    content = hashlib.sha256(raw).hexdigest()
    key = "\n".join((os.path.realpath(path), content, os.path.realpath(folder)))
    source = f"{SOURCE}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}"
    return Data(str(path), source, tuple(found.values()), len(entries), pictureless, several)


def check_together(data: Sequence[Data]) -> None:
    """InputError for a file given twice, and for a picture that one file holds out and another
    trains on."""
    sides: dict[str, str] = {}
    for number, one in enumerate(data):
        if one.source in {earlier.source for earlier in data[:number]}:
            raise InputError(f"{one.name} is given twice")
        for shown in one.pictures:
            if sides.setdefault(shown.record.id, shown.record.split) != shown.record.split:
                raise InputError(
                    f"{one.name}: {shown.file} is held out in one file and trained on in another: "
                    'give it the same "concept" in both'
                )


def encode_data(data: Data, cache: Path | None = None) -> None:
    """Put what is missing of a file's pictures into the feature cache and say what it holds.

    Pictures that cannot be read are left out. Raises InputError when none is left to train on.
    """
    cache = cache or cache_dir()
    features_dir(cache).mkdir(parents=True, exist_ok=True)
    path = features_dir(cache) / f"{data.source}.f16"
    done = done_rows(path)
    total = VIEWS * len(data.pictures)
    unread: dict[str, str] = {}  # picture id -> why
    if len(done) < total:
        append_rows(path, jobs(data, done, unread), len(done), total, encoder(cache))
    report_data(data, unread)


def report_data(data: Data, unread: dict[str, str]) -> None:
    """Say what a file holds and why some pictures were not read; InputError when none is left."""
    sides = Counter(s.record.split for s in data.pictures if s.record.id not in unread)
    for line in _report(data, sides, list(unread.values())):
        print(line, file=sys.stderr)
    if not sides["train"]:
        raise InputError(f"{data.name}: no picture is left to train on")


def jobs(
    data: Data, done: set[tuple[str, int]], unread: dict[str, str], spec: ImageSpec = IMAGE
) -> Iterator[Job]:
    """The rows that are not done yet; fills `unread` with pictures that cannot be read."""
    for shown in data.pictures:
        record = shown.record
        todo = [view for view in range(VIEWS) if (record.id, view) not in done]
        if not todo:
            continue
        try:
            picture = load_picture(shown.file)
        except PictureError as error:
            unread[record.id] = str(error)
            continue
        for view in todo:
            if view == 0:
                image = Image.fromarray(resize(picture, spec))  # small: a batch of them waits
            else:
                image = unmirrored_view(picture, rng_of(f"view/{record.id}/{view}"))
            small = thumbnail(picture) if view == 0 and record.split == "train" else b""
            yield Job(replace(record, view=view), image, small)


def cut_text(tokenizer: Tokenizer, text: str, longest: int) -> str:
    """The text, or as many whole words of it as fit into `longest` tokens."""
    ids = encode_text(tokenizer, text)
    if len(ids) <= longest:
        return text
    end = tokenizer.encode(text, add_special_tokens=False).offsets[longest - 1][1]
    words, space, _ = text[: end + 1].rpartition(" ")
    return words if space else text[:end]


def _report(data: Data, sides: Counter[str], reasons: Sequence[str]) -> Iterator[str]:
    yield (
        f"{data.name}: {data.entries} entries, {sides.total()} pictures, {sides['train']} of them "
        f"to train on and {sides['held']} held out"
    )
    if data.pictureless:
        yield f"  {data.pictureless} entries without a picture are left out"
    if data.several:
        yield f"  {data.several} entries with several pictures: the first is used"
    if reasons:
        yield f"  {len(reasons)} pictures cannot be read and are left out:"
        yield from (f"    {reason}" for reason in reasons[:LISTED])
        if len(reasons) > LISTED:
            yield f"    and {len(reasons) - LISTED} more"


def _turns(entry: Any, place: str) -> tuple[tuple[str, str], ...]:
    """Checked questions and answers."""
    turns = []
    for question, answer in llava_turns(entry, place):
        for what, text in (("question", question), ("answer", answer)):
            if not _valid(text, what, place):
                raise InputError(f"{place}: the {what} is empty")
        turns.append((question, answer.strip()))
    return tuple(turns)


def _images(entry: dict[str, Any], place: str) -> list[str]:
    """Checked paths of an entry's pictures, none where it has none."""
    given = entry.get("image")
    names = given if isinstance(given, list) else [] if given is None else [given]
    for name in names:
        if not _valid(name, "image", place) or "\0" in name:
            raise InputError(f"{place}: the image is no path")
    return names


def _concept(entry: dict[str, Any], image: str, place: str) -> str:
    metadata = entry.get("metadata")
    inner = metadata.get("concept") if isinstance(metadata, dict) else None
    given = entry.get("concept", inner)
    if given is None:
        return os.path.splitext(os.path.normpath(image))[0]  # noqa: PTH122
    if not _valid(given, "concept", place):
        raise InputError(f"{place}: the concept is empty")
    return str(given)


def _valid(text: object, what: str, place: str) -> bool:
    """Whether a text holds something; InputError when it is no text."""
    try:
        return bool(check_text(text, what).strip())
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _id(file: Path) -> str:
    """Names a picture file, the same from whichever JSON file and by whichever path."""
    real = os.path.realpath(file)
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]
    return f"{SOURCE}/{digest}/{Path(real).name}"
