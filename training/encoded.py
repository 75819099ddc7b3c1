"""Pictures through the encoder of another model, once, into a run directory.

`pictures.f16` has a row of numbers for each view of a picture, `pictures.jsonl` what is known of it
and `pictures.thumbs.jsonl` small pictures for a bank. What was stopped goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyalign.runtime.manifest import ImageSpec
from tinyalign.training import llava
from tinyalign.training.features import (
    VIEWS,
    Job,
    Record,
    append_rows,
    done_rows,
    jobs,
    picture_jobs,
    read_records,
)
from tinyalign.training.pictures import Picture, pictures_of
from tinyalign.training.sources import cache_dir

LEAST = 12  # pictures of a source, however small the scale
PICTURES_NAME = "pictures.f16"
THUMBNAILS_NAME = "pictures.thumbs.jsonl"


def encode_pictures(
    directory: Path,
    counts: Mapping[str, int],
    data: Sequence[llava.Data],
    encode: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    width: int,
    image: ImageSpec,
) -> tuple[NDArray[np.float16], list[Record]]:
    """Encode what is missing; rows [n, width], mapped from the file, and their records.

    Args:
        directory: of the run.
        counts: how many pictures of each source, "composites" (drawn scenes) among them.
        data: pictures of one's own, all of them.
        encode: pixels f32 [B, 3, S, S] -> rows f32 [B, width].
        width: numbers a row.
        image: what the encoder takes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PICTURES_NAME
    done = done_rows(path, 2 * width)
    scenes = counts.get("composites", 0)
    chosen = [choose(source, n) for source, n in counts.items() if source != "composites"]
    total = sum(VIEWS[picture.source] for found in chosen for picture in found)
    total += scenes + sum(llava.VIEWS * len(one.pictures) for one in data)
    unread: list[dict[str, str]] = [{} for _ in data]

    def stream() -> Iterator[Job]:
        for found in chosen:
            yield from picture_jobs(found, done, cache_dir())
        left = scenes - sum(id.startswith("composites/") for id, _ in done)
        yield from islice(jobs("composites", done, cache_dir()), max(0, left)) if scenes else ()
        for one, failed in zip(data, unread, strict=True):
            yield from llava.jobs(one, done, failed, image)

    if len(done) < total:
        append_rows(path, stream(), len(done), total, encode, image)
    for one, failed in zip(data, unread, strict=True):
        llava.report_data(one, failed)
    records = read_records(path.with_suffix(".jsonl"))
    return np.memmap(path, np.float16, "r", shape=(len(records), width)), records


def choose(source: str, count: int) -> list[Picture]:
    """Some pictures of a source, the same ones every time; more of them for a greater count."""
    found = pictures_of(source)
    found.sort(key=lambda picture: hashlib.sha256(picture.id.encode()).digest())
    return found[:count]


def scaled_counts(counts: Mapping[str, int], scale: float) -> dict[str, int]:
    """How many pictures of each source at another scale."""
    return {source: max(LEAST, round(count * scale)) for source, count in counts.items()}
