"""The feature cache: every view of every picture through the frozen encoder, once.

A source is two append-only files in `<cache>/features`: `<source>.f16` (cells [n, 10, 1280],
float16) and `<source>.jsonl` (one record a row, see `Record`). They can be read while they grow,
and
a run that was stopped continues where it was. Thumbnails for the default bank lie in
`<source>.thumbs.jsonl`.

    python -m tinyalign.training.features [source ...]
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tinyalign.runtime.images import load_picture, preprocess
from tinyalign.runtime.manifest import ImageSpec
from tinyalign.training import pictures as source_pictures
from tinyalign.training import styles
from tinyalign.training.composites import draw_scene, make_scenes
from tinyalign.training.pictures import (
    EASY_COLOURS,
    Picture,
    easy_truth,
    imagenet_classes,
    read_image,
)
from tinyalign.training.sources import SourceError, cache_dir, vision_weights
from tinyalign.training.styles import read_styled
from tinyalign.training.views import dominant_colour, has_alpha, rng_of, thumbnail, view
from tinyalign.training.vision import CELLS, IMAGE_SIZE, WIDTH, load_vision

ORDER = ("emoji", "photos", "easy_vqa", "furniture", "prototypes", "composites", "clipart")
STYLES = (*styles.EMOJI_STYLES, "turned")  # only the key head learns from them
VIEWS = {"emoji": 3, "photos": 2, "easy_vqa": 1, "furniture": 2, "clipart": 2}
VIEWS |= {"noto": 2, "twemoji": 2, "flat": 1, "turned": 1}
SCENES = 8000
RULES = 2  # of what records say; raise it where a rule changes
BATCH = 16
SLOW = 10  # pictures a second, under which every batch is reported
PROTOTYPE_VIEWS = 2
IMAGE = ImageSpec(
    size=IMAGE_SIZE,
    mean=(127.0, 127.0, 127.0),
    scale=(128.0, 128.0, 128.0),
    resample="bicubic",
    background=(255, 255, 255),
)
_ROW_BYTES = CELLS * WIDTH * 2

Cells = NDArray[np.float32]


@dataclass(frozen=True)
class Record:
    """What is known of one row of features. Texts are "" and lists empty where nothing is known.

    `id` names the picture (the same for its views), `concept` what the split goes by. `task` says
    what a generated scene was made to ask; `names` and `pictures` list its objects, left one first
    in a pair.
    `colour` is given only where it is clear-cut. `count` is the number of objects (0: not known).
    """

    id: str
    view: int
    source: str
    split: str
    name: str
    concept: str
    kind: str
    gloss: str
    licence: str
    creator: str
    colour: str = ""
    count: int = 0
    position: str = ""
    task: str = ""
    names: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Job:
    """A row to be made: its record and its picture RGB."""

    record: Record
    image: Image.Image
    thumbnail: bytes = b""


def features_dir(cache: Path | None = None) -> Path:
    """Where the feature files lie: records made by other rules (colours, say) lie elsewhere."""
    return (cache or cache_dir()) / f"features-{RULES}"


def load_features(
    cache: Path | None = None, sources: Sequence[str] = ORDER
) -> tuple[NDArray[np.float16], list[Record]]:
    """Cells f16 [n, 10, 1280] and their records of all sources that are there, even in part.

    Of one source alone the array is a memory map; of several a copy. Raises SourceError when none
    is there.
    """
    arrays, records = [], []
    for source in sources:
        path = features_dir(cache) / f"{source}.f16"
        if not path.is_file():
            continue
        found = read_records(path.with_suffix(".jsonl"))
        rows = min(len(found), path.stat().st_size // _ROW_BYTES)
        if rows:
            arrays.append(np.memmap(path, np.float16, "r", shape=(rows, CELLS, WIDTH)))
            records += found[:rows]
    if not arrays:
        raise SourceError(f"no features in {features_dir(cache)}: run the feature step first")
    return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)), records


def load_thumbnails(cache: Path | None = None, sources: Sequence[str] = ORDER) -> dict[str, bytes]:
    """Small WebP pictures of training pictures by picture id."""
    found: dict[str, bytes] = {}
    for source in sources:
        path = features_dir(cache) / f"{source}.thumbs.jsonl"
        if path.is_file():
            found |= read_thumbnails(path)
    return found


def read_thumbnails(path: Path) -> dict[str, bytes]:
    """The same of one file."""
    entries = map(json.loads, path.read_text().splitlines())
    return {entry["id"]: base64.b64decode(entry["webp"]) for entry in entries}


def build_features(cache: Path | None = None, sources: Sequence[str] = ORDER + STYLES) -> None:
    """Make what is missing of the feature cache; progress with time left on stderr."""
    cache = cache or cache_dir()
    features_dir(cache).mkdir(parents=True, exist_ok=True)
    for source in sources:
        if source == "prototypes":
            _build_prototypes(cache)
        else:
            _build_source(source, cache)


# ------------------------------------------------------------------ pictures -> rows


def jobs(source: str, done: set[tuple[str, int]], cache: Path) -> Iterator[Job]:
    """The rows of a source that are not done yet, in a fixed order."""
    if source == "composites":
        yield from _scene_jobs(done, cache)
    else:
        yield from picture_jobs(_pictures(source, cache), done, cache)


def picture_jobs(
    pictures: Sequence[Picture], done: set[tuple[str, int]], cache: Path
) -> Iterator[Job]:
    """The views of some pictures that are not done yet."""
    for picture in pictures:
        source = picture.source
        todo = [v for v in range(VIEWS[source]) if (picture.id, v) not in done]
        if not todo:
            continue
        try:
            image = read_styled(picture, cache) if source in STYLES else read_image(picture, cache)
        except (ValueError, OSError) as error:
            print(f"{picture.id} left out: {error}", file=sys.stderr)
            continue
        colour = _colour(picture, image)
        for index in todo:
            small = b""
            if index == 0 and picture.split == "train" and source not in STYLES:
                small = thumbnail(image)
            yield Job(record_of(picture, index, colour), _view(picture, image, index), small)


def record_of(picture: Picture, view: int, colour: str) -> Record:
    """The record of one view of a picture."""
    return Record(
        picture.id, view, picture.source, picture.split, picture.name, picture.concept,
        picture.kind,
        picture.gloss, picture.licence, picture.creator, colour, 1, questions=picture.questions,
    )  # fmt: skip


def _view(picture: Picture, image: Image.Image, index: int) -> Image.Image:
    plain = picture.source == "easy_vqa" or (picture.source == "photos" and index == 0)
    if plain:
        return load_picture(image)
    rng = rng_of(f"view/{picture.id}/{index}")
    return view(image, rng, gentle=picture.source in ("clipart", "furniture", "turned"))


def _colour(picture: Picture, image: Image.Image) -> str:
    if picture.source == "easy_vqa":
        return easy_truth(picture.questions, EASY_COLOURS).replace("gray", "grey")
    return dominant_colour(image) if has_alpha(image) else ""


def _scene_jobs(done: set[tuple[str, int]], cache: Path) -> Iterator[Job]:
    pool = [
        p for p in source_pictures.emoji(cache) + source_pictures.furniture(cache)
        if p.kind != "face" and len(p.name.split()) <= 2
    ]  # fmt: skip
    by_id = {p.id: p for p in pool}

    @lru_cache(maxsize=256)
    def cutout(id: str) -> Image.Image:
        return read_image(by_id[id], cache)

    for scene in make_scenes(pool, SCENES):
        if (scene.id, 0) in done:
            continue
        shown = by_id.get(scene.pictures[0])
        one = len(set(scene.names)) == 1
        colour = scene.colour
        if shown and one:
            colour = dominant_colour(cutout(shown.id))
        record = Record(
            scene.id, 0, "composites", scene.split, scene.names[0] if one else "",
            shown.concept if shown and one else "", shown.kind if shown and one else "", "",
            shown.licence if shown else "CC0-1.0", shown.creator if shown else "", colour,
            scene.count, scene.position, scene.task, scene.names, scene.pictures,
        )  # fmt: skip
        yield Job(record, draw_scene(scene, cutout))


def _build_source(source: str, cache: Path) -> None:
    path = features_dir(cache) / f"{source}.f16"
    done = done_rows(path)
    total = _total(source, cache)
    if len(done) < total:
        append_rows(path, jobs(source, done, cache), len(done), total, encoder(cache))


def done_rows(path: Path, row_bytes: int = _ROW_BYTES) -> set[tuple[str, int]]:
    """(picture id, view) of a file's rows; what was only half written is cut off."""
    return {(record.id, record.view) for record in _trim_to_whole_rows(path, row_bytes)}


def append_rows(
    path: Path,
    stream: Iterator[Job],
    done: int,
    total: int,
    encode: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    image: ImageSpec = IMAGE,
) -> None:
    """Encode jobs and append them to a file and those beside it; progress with time left on stderr.

    `encode` turns pixels f32 [B, 3, S, S], as `image` says, into a row for each picture.
    """
    started, made = time.monotonic(), 0
    thumbs_path = path.with_suffix(".thumbs.jsonl")
    with (
        path.open("ab") as rows,
        path.with_suffix(".jsonl").open("a") as index,
        thumbs_path.open("a") as thumbs,
        ThreadPoolExecutor(1) as ahead,
    ):

        def next_batch() -> tuple[list[Job], NDArray[np.float32]]:
            batch = list(islice(stream, BATCH))
            pixels = [preprocess(job.image, image) for job in batch]
            return batch, np.stack(pixels) if pixels else np.zeros((0, 3, 1, 1), np.float32)

        waiting = ahead.submit(next_batch)
        while True:
            batch, pixels = waiting.result()
            if not batch:
                break
            waiting = ahead.submit(next_batch)
            rows.write(encode(pixels).astype(np.float16).tobytes())
            rows.flush()
            index.writelines(json.dumps(asdict(job.record)) + "\n" for job in batch)
            index.flush()
            for job in batch:
                if job.thumbnail:
                    webp = base64.b64encode(job.thumbnail).decode()
                    thumbs.write(json.dumps({"id": job.record.id, "webp": webp}) + "\n")
            thumbs.flush()
            made += len(batch)
            speed = made / (time.monotonic() - started)
            if made % (BATCH * 10) == 0 or made + done >= total or speed < SLOW:
                left = max(total - made - done, 0) / speed
                print(
                    f"features {path.stem}: {made + done}/{total}, "
                    f"{speed:.1f}/s, {left:.0f} s left",
                    file=sys.stderr, flush=True,
                )  # fmt: skip


def _total(source: str, cache: Path) -> int:
    if source == "composites":
        return SCENES
    return VIEWS[source] * len(_pictures(source, cache))


def _pictures(source: str, cache: Path) -> list[Picture]:
    if source == "turned":
        return styles.turned_furniture(cache)
    if source in STYLES:
        return styles.styled_emoji(source, cache)
    return source_pictures.pictures_of(source, cache)


def encoder(cache: Path) -> Callable[[NDArray[np.float32]], Cells]:
    """pixels f32 [B, 3, 260, 260] -> cells f32 [B, 10, 1280], through ONNX Runtime.

    ONNX Runtime is over twice as fast here as torch on two cores; the graph is kept in the cache.
    """
    import onnxruntime
    import torch

    graph = features_dir(cache) / "encoder.onnx"
    if not graph.is_file():
        temporary = graph.with_suffix(f".{os.getpid()}")
        torch.onnx.export(
            load_vision(vision_weights(cache)), (torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE),),
            str(temporary), input_names=["pixels"], output_names=["cells"],
            dynamic_axes={"pixels": {0: "batch"}, "cells": {0: "batch"}}, dynamo=False,
        )  # fmt: skip
        temporary.replace(graph)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(2, len(os.sched_getaffinity(0)))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(graph), options, ["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels})[0]


# ------------------------------------------------------------------ class prototypes


def _build_prototypes(cache: Path) -> None:
    """Pseudo-features of the 1000 classes, see `prototype_cells`."""
    path = features_dir(cache) / "prototypes.f16"
    classes = imagenet_classes(cache)
    if len(_trim_to_whole_rows(path, _ROW_BYTES)) == len(classes) * PROTOTYPE_VIEWS:
        return
    stored, records = load_features(cache, ("emoji", "furniture"))
    keep = np.array([record.split == "train" for record in records])
    real = np.asarray(stored)[keep].astype(np.float32)
    model = load_vision(vision_weights(cache))
    weight = model.classifier.weight.numpy()
    cells = prototype_cells(real, weight, model.classifier.bias.numpy())
    path.write_bytes(cells.astype(np.float16).tobytes())
    rows = [
        record_of(picture, index, "") for picture in classes for index in range(PROTOTYPE_VIEWS)
    ]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    logits = cells[:, 0] @ weight.T + model.classifier.bias.numpy()
    right = (logits.argmax(1) == np.repeat(np.arange(len(classes)), PROTOTYPE_VIEWS)).mean()
    print(
        f"features prototypes: {len(rows)} rows, classified as themselves {right:.3f}",
        file=sys.stderr,
    )


def prototype_cells(real: Cells, weight: Cells, bias: Cells) -> Cells:
    """Pseudo-cells f32 [classes * 2, 10, 1280] from real cells [n, 10, 1280] and the classifier.

    `mean + s (W_c - mean W)`, clipped at 0, with a part of a real picture's residual grid.
    The step s is what confidently classified real pictures show along their class's direction.
    """
    mean = real[:, 0].mean(0)
    direction = weight - weight.mean(0)
    logits = real[:, 0] @ weight.T + bias
    odds = np.exp(logits - logits.max(1, keepdims=True))
    confident = odds.max(1) / odds.sum(1) > 0.5
    best = logits[confident].argmax(1)
    steps = ((real[confident, 0] - mean) * direction[best]).sum(1) / (direction[best] ** 2).sum(1)
    step = float(np.median(steps)) if len(steps) else 10.0
    print(
        f"features prototypes: step {step:.2f} from {len(steps)} confident pictures",
        file=sys.stderr,
    )
    rng = np.random.default_rng(0)
    found = []
    for index in range(len(weight)):
        for _ in range(PROTOTYPE_VIEWS):
            pooled = mean + step * rng.uniform(0.8, 1.4) * direction[index]
            grid = real[rng.integers(len(real))]
            residual = rng.uniform(0.15, 0.7) * (grid[1:] - grid[:1])
            parts = np.clip(np.clip(pooled, 0, None) + residual, 0, None)
            found.append(np.concatenate((parts.mean(0, keepdims=True), parts)))
    return np.stack(found).astype(np.float32)


# ------------------------------------------------------------------ files


def read_records(path: Path) -> list[Record]:
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().split("\n")[:-1]:  # what follows the last newline is being written
        entry = json.loads(line)
        for key in ("names", "pictures"):
            entry[key] = tuple(entry[key])
        entry["questions"] = tuple((question, answer) for question, answer in entry["questions"])
        records.append(Record(**entry))
    return records


def _trim_to_whole_rows(path: Path, row_bytes: int) -> list[Record]:
    """Cut both files of a source to the rows both hold; returns the records left."""
    if not path.is_file():
        path.with_suffix(".jsonl").unlink(missing_ok=True)
        return []
    index = path.with_suffix(".jsonl")
    records = read_records(index)
    rows = min(len(records), path.stat().st_size // row_bytes)
    if path.stat().st_size != rows * row_bytes:
        os.truncate(path, rows * row_bytes)
    whole = index.read_text() if index.is_file() else ""
    kept = "".join(whole.splitlines(keepends=True)[:rows])
    if kept != whole:  # others may be reading: nothing is written where nothing is wrong
        index.with_suffix(".tmp").write_text(kept)
        index.with_suffix(".tmp").replace(index)
    return records[:rows]


if __name__ == "__main__":
    build_features(sources=sys.argv[1:] or ORDER + STYLES)
