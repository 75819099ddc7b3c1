"""Keys for banks of any size: real ones first, then ones made from them. Used by `bank.py`.

The first keys are those of real pictures: all training pictures, class prototypes and scenes of
the feature cache, in random order. What follows is *moved*: the encoder's features of a random real
picture plus 0.7 to 1.3 times the difference of two views of another real picture, which is what
one more view of a thing looks like to the encoder (image parts of moved keys and what they were
made from: cosine .91 in the median, 10th percentile .78; of two real views of a picture: emoji .77
and .54, clip art .90 and .69). So keys lie in clusters as real ones do: at a million, some 65
around each real picture. The text part of a key is that of a random memory of the default bank.

Half of the queries are pictures held out of training, unlike anything in the bank; the other half
are moved pictures of the bank: another view of something known.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyalign.bank import Bank
from tinyalign.runtime.keys import load_key_arrays, make_keys
from tinyalign.training.features import load_features
from tinyalign.training.parts import DEFAULT_WEIGHTS

ROWS_AT_ONCE = 16_384
Floats = NDArray[np.float32]


class Keys:
    """Draws keys and queries; the same seed gives the same ones, and a larger bank starts alike."""

    def __init__(self, seed: int) -> None:
        cells, records = load_features()
        self._pooled = cells[:, 0].astype(np.float32)  # [n, Dv]
        self._arrays = load_key_arrays(DEFAULT_WEIGHTS / "key.npz")
        with Bank.open(DEFAULT_WEIGHTS / "bank.sqlite", read_only=True) as bank:
            keys = np.stack([memory.key for memory in bank.list()])
        width = self._arrays.image_projection.shape[1]
        self._texts = keys[np.linalg.norm(keys[:, width:], axis=1) > 0.01][:, width:]
        self._seed = seed
        random = np.random.default_rng(seed)
        train = [row for row, record in enumerate(records) if record.split == "train"]
        self._real = random.permutation(train)
        self._held = random.permutation(
            [row for row, record in enumerate(records) if record.split == "held"]
        )
        views: dict[str, list[int]] = {}
        for row in train:
            views.setdefault(records[row].id, []).append(row)
        self._pairs = np.array([(a, b) for v in views.values() for a in v for b in v if a != b])

    @property
    def real(self) -> int:
        """How many keys are those of real pictures."""
        return len(self._real)

    def keys(self, count: int) -> NDArray[np.float16]:
        """Keys [count, Dk] as a bank stores them."""
        random = np.random.default_rng([self._seed, 1])
        parts = [self._with_text(self._pooled[self._real], random)]
        while sum(map(len, parts)) < count:
            parts.append(self._moved(self._real, ROWS_AT_ONCE, random))
        return np.concatenate(parts)[:count].astype(np.float16)

    def queries(self, memories: int, count: int) -> Floats:
        """Queries [count, Dk] to a bank of some size: held-out pictures and moved ones in turns."""
        random = np.random.default_rng([self._seed, 2])
        held = self._with_text(self._pooled[self._held[: count // 2]], random)
        moved = self._moved(self._real[:memories], len(held), random)
        return np.stack([held, moved], axis=1).reshape(2 * len(held), -1)

    def _moved(self, rows: NDArray[np.int64], count: int, random: np.random.Generator) -> Floats:
        one, two = self._pairs[random.integers(len(self._pairs), size=count)].T
        step = random.uniform(0.7, 1.3, (count, 1)).astype(np.float32)
        moved = self._pooled[random.choice(rows, count)]
        moved += step * (self._pooled[two] - self._pooled[one])
        return self._with_text(np.clip(moved, 0, None), random)

    def _with_text(self, pooled: Floats, random: np.random.Generator) -> Floats:
        alpha = self._arrays.alpha
        image = make_keys(pooled, None, self._arrays)[:, : self._arrays.image_projection.shape[1]]
        texts = self._texts[random.integers(len(self._texts), size=len(pooled))]
        keys = np.concatenate([np.sqrt(1 - alpha) * image, texts], axis=1)
        return (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)


def nearest(keys: NDArray[np.float16], queries: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
    """By exact search, the rows [Q, k] of the k nearest keys, nearest first, and their scores."""
    rows = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    for start in range(0, len(keys), ROWS_AT_ONCE):
        part = queries @ keys[start : start + ROWS_AT_ONCE].astype(np.float32).T
        numbers = np.broadcast_to(np.arange(start, start + part.shape[1]), part.shape)
        rows, scores = np.hstack([rows, numbers]), np.hstack([scores, part])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        rows, scores = (np.take_along_axis(values, best, axis=1) for values in (rows, scores))
    return rows, scores


def cached(folder: Path, count: int, queries: int, seed: int) -> Path:
    """A folder with keys.npy, queries.npy and the exact answers' scores, made if need be."""
    recipe = hashlib.sha256((DEFAULT_WEIGHTS / "key.npz").read_bytes()).hexdigest()[:8]
    place = folder / f"{count}-{queries}-{seed}-{recipe}"
    if not (place / "scores.npy").exists():
        place.mkdir(parents=True, exist_ok=True)
        source = Keys(seed)
        keys, asked = source.keys(count), source.queries(count, queries)
        np.save(place / "keys.npy", keys)
        np.save(place / "queries.npy", asked)
        np.save(place / "real.npy", min(count, source.real))
        np.save(place / "scores.npy", nearest(keys, asked, 5)[1])
    return place
