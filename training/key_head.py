"""The key head: a projection of the frozen features that brings pictures of one thing together.

It starts as the whitening of `keys.py` and learns by contrast (InfoNCE, arXiv 1807.03748): of two
views, styles or sides of a thing each is to find the other among the things of its batch. It stays
one matrix, so a key costs what it cost before. Frozen before any bank is built; only concepts of
the training split take part. `benchmarks/retrieval.py` measures it on the held-out ones.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tinyalign.runtime.keys import KeyArrays, rounded
from tinyalign.training.features import STYLES, Record
from tinyalign.training.styles import thing_of

SOURCES = ("emoji", "furniture", "clipart", "prototypes", *STYLES)


@dataclass(frozen=True)
class HeadRecipe:
    """How the key head is trained."""

    steps: int = 600
    batch: int = 512  # things
    rate: float = 3e-4
    warmup: int = 50
    temperature: float = 0.05
    styled: float = 0.7  # share of the batch that is known in several styles
    across: float = 0.8  # how often a pair is of two styles where there are two
    noise: float = 0.3  # relative, on every feature
    other: float = 0.15  # at most this share of another picture's features is mixed in


DEFAULT = HeadRecipe()


def things_of(records: Sequence[Record]) -> dict[str, list[int]]:
    """Training rows by the thing they show; held-out concepts and single rows are left out."""
    things: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        if record.split == "train" and record.source in SOURCES:
            things.setdefault(_thing(record), []).append(row)
    return {thing: rows for thing, rows in things.items() if len(rows) > 1}


def learn_key_head(
    keys: KeyArrays,
    pooled: NDArray[np.float32],
    records: Sequence[Record],
    seed: int,
    recipe: HeadRecipe = DEFAULT,
) -> KeyArrays:
    """The key recipe with a learned image projection; half a minute on two cores.

    Args:
        keys: fitted by `keys.fit_key`.
        pooled: the encoder's pooled features [n, Dv] of all records.
        records: n; those of the training split are learned from.
        seed: of the batches.
    """
    things = things_of(records)
    styled = [t for t, rows in things.items() if len({records[row].source for row in rows}) > 1]
    names = np.array([record.name for record in records])
    features, mean = torch.from_numpy(pooled), torch.from_numpy(keys.image_mean)
    start = torch.from_numpy(keys.image_projection)
    everything, rows = list(things), [row for found in things.values() for row in found]
    spread = ((features[rows] - mean) @ start).std()
    projection = torch.nn.Parameter(start / (10 * spread))  # [Dv, di]; its scale is free
    optimizer = torch.optim.AdamW([projection], lr=recipe.rate, weight_decay=0.05)
    rng = Random(f"{seed}/key head")
    noise = torch.Generator().manual_seed(seed)
    for step in range(recipe.steps):
        share = min(1, (step + 1) / recipe.warmup) * (1 + np.cos(np.pi * step / recipe.steps)) / 2
        optimizer.param_groups[0]["lr"] = recipe.rate * share
        count = min(len(styled), int(recipe.batch * recipe.styled))
        drawn = rng.sample(styled, count)
        drawn += rng.sample(everything, min(len(everything), recipe.batch - count))
        pairs = [_pair(things[t], records, rng, recipe.across) for t in dict.fromkeys(drawn)]
        sides = []
        for picked in zip(*pairs, strict=True):
            seen = features[list(picked)]
            seen = seen * (1 + recipe.noise * torch.randn(seen.shape, generator=noise))
            part = recipe.other * torch.rand(len(seen), 1, generator=noise)
            seen = (1 - part) * seen + part * features[rng.choices(rows, k=len(seen))]
            sides.append(F.normalize((seen - mean) @ projection, dim=-1))
        alike = names[[a for a, _ in pairs]]
        loss = _contrast(sides[0], sides[1], alike[:, None] == alike[None], recipe.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"key head {step + 1}/{recipe.steps}  {loss.item():.3f}", file=sys.stderr)
    learned = projection.detach() * 10 * spread
    return rounded(replace(keys, image_projection=learned.numpy()))


def _contrast(one: Tensor, two: Tensor, alike: NDArray[np.bool_], temperature: float) -> Tensor:
    """InfoNCE both ways of n pairs [n, di]; things with the same name do not count as others."""
    scores = one @ two.T / temperature
    excused = torch.from_numpy(alike) & ~torch.eye(len(one), dtype=torch.bool)
    scores = scores.masked_fill(excused, -1e4)
    right = torch.arange(len(one))
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


def _pair(
    rows: Sequence[int], records: Sequence[Record], rng: Random, across: float
) -> tuple[int, int]:
    one = rng.choice(rows)
    other = [row for row in rows if row != one]
    styles = [row for row in other if records[row].source != records[one].source]
    return one, rng.choice(styles if styles and rng.random() < across else other)


def _thing(record: Record) -> str:
    apart = record.source in ("clipart", "prototypes")
    return record.id if apart else thing_of(record.id)
