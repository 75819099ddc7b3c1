"""What a bank is like and whether it is sound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyalign.bank import index
from tinyalign.bank.errors import InputError
from tinyalign.bank.index import IndexState
from tinyalign.bank.memory import Floats, Halves
from tinyalign.bank.store import Store

SAMPLE = 200  # memories whose nearest other memory is looked for
FLOOR_SAMPLE = 800  # the same, to measure a score floor
FLOOR_MEMORIES = 20  # fewer say nothing about a floor
FLOOR_PERCENTILE = 10  # as the model's own floor (training/keys.py)
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Nearness:
    """How near the nearest other memory comes: percentiles of the score over a sample."""

    p10: float
    p50: float
    p90: float


@dataclass(frozen=True)
class Stats:
    """A bank in numbers."""

    name: str
    fingerprint: str  # what it was made for: encoder, preprocessing, key recipe, compressor
    key_width: int
    latent_width: int
    memories: int
    thumbnails: int
    file_bytes: int | None  # of the bank file and what SQLite keeps beside it; None on a server
    bytes_per_memory: float | None  # 0 for an empty bank
    index: IndexState
    index_bytes: int  # of the cache beside it
    nearest: Nearness | None  # None below two memories
    score_floor: float | None  # None if the bank has none of its own


@dataclass(frozen=True)
class Report:
    """What ``Bank.verify`` found; ``problems`` is empty for a sound bank."""

    memories: int
    index: IndexState  # "stale" and "missing" are no problem: the index is built again
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


def stats(store: Store) -> Stats:
    """Count and measure; reads all keys."""
    header, count = store.header, store.count()
    size = sum(_bytes(store.path.with_name(store.path.name + end)) for end in ("", "-wal"))
    return Stats(
        name=header.name,
        fingerprint=header.fingerprint,
        key_width=header.key_width,
        latent_width=header.latent_width,
        memories=count,
        thumbnails=store.thumbnail_count(),
        file_bytes=size,
        bytes_per_memory=size / count if count else 0.0,
        index=index.state(store),
        index_bytes=sum(map(_bytes, index.cache_files(store.path))),
        nearest=_nearness(store),
        score_floor=store.score_floor(),
    )


def verify(store: Store) -> Report:
    """Read everything there is: the file's structure, every memory, the index cache."""
    return Report(store.count(), index.state(store), tuple(store.problems()))


def measured_floor(store: Store) -> float:
    """The 10th percentile of the nearest other memory's score; InputError below 20 memories."""
    _, keys = store.keys()
    check_enough(store.path, len(keys))
    return floor_of(_nearest_scores(keys, FLOOR_SAMPLE))


def check_enough(path: object, memories: int) -> None:
    """InputError if a bank has too few memories to measure a score floor on."""
    if memories < FLOOR_MEMORIES:
        raise InputError(
            f"{path} has {memories} memories: a score floor is measured on "
            f"{FLOOR_MEMORIES} or more; set one by hand"
        )


def floor_of(nearest: Floats) -> float:
    """A score floor from the scores [S] of memories' nearest other memories."""
    floor = float(np.percentile(nearest, FLOOR_PERCENTILE))
    return min(max(floor, -1.0), 1.0)


def nearness_of(nearest: Floats) -> Nearness:
    """Percentiles of the scores [S] of memories' nearest other memories."""
    return Nearness(*(float(value) for value in np.percentile(nearest, [10, 50, 90])))


def _nearness(store: Store) -> Nearness | None:
    _, keys = store.keys()
    return nearness_of(_nearest_scores(keys, SAMPLE)) if len(keys) > 1 else None


def _nearest_scores(keys: Halves, count: int) -> Floats:
    """The score of the nearest other key [S], for up to ``count`` keys evenly spread."""
    sample = np.unique(np.linspace(0, len(keys) - 1, count).astype(np.int64))
    mine = keys[sample].astype(np.float32)
    best = np.full(len(sample), -np.inf, np.float32)
    for start in range(0, len(keys), ROWS_AT_ONCE):
        scores = mine @ keys[start : start + ROWS_AT_ONCE].astype(np.float32).T  # [S, rows]
        here = (sample >= start) & (sample < start + ROWS_AT_ONCE)
        scores[here, sample[here] - start] = -np.inf  # not with itself
        best = np.maximum(best, scores.max(axis=1))
    return best


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
