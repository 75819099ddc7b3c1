"""What training draws from: cached features, their keys, and the bank of training memories.

The retrieval rules hold here, in one place (`World.retrieve`): a query is made from the picture
and the question only, never from an answer; a picture retrieves neither itself nor another view of
itself, a scene none of the pictures it is made of; and only training pictures are in the bank.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tinyalign.runtime.items import told
from tinyalign.runtime.keys import KeyArrays, make_key, make_keys
from tinyalign.runtime.prompt import encode_text
from tinyalign.training.features import STYLES, Record
from tinyalign.training.keys import calibrate, fit_key
from tinyalign.training.llava import cut_text
from tinyalign.training.parts import Parts
from tinyalign.training.questions import sentence
from tinyalign.training.recipe import Recipe


@dataclass(frozen=True)
class World:
    """All pictures' features, and the memories of the training ones.

    Attributes:
        cells: fp16 [n, C, Dv].
        records: n, what is known about each row.
        views: picture id -> its rows.
        bank: rows that are memories (one view of each training picture).
        bank_keys: f32 [m, di + dt].
        bank_texts: m texts.
    """

    cells: NDArray[np.float16]
    records: Sequence[Record]
    views: dict[str, list[int]]
    bank: NDArray[np.int64]
    bank_keys: NDArray[np.float32]
    bank_texts: Sequence[str]
    parts: Parts
    embeddings: torch.Tensor  # [V, D], stays on the CPU wherever the parts are
    image_tokens: NDArray[np.float16] | None = None  # [n, T, D], of a connector that stays as it is

    def key(self, row: int, text: str) -> NDArray[np.float32]:
        """Key [di + dt] of a row's picture with a text."""
        assert self.parts.keys is not None
        mean = text_mean(self.parts.tokenizer, self.embeddings, text)
        return make_key(self.cells[row, 0], mean, self.parts.keys)

    def retrieve(self, row: int, question: str, count: int) -> list[tuple[int, float]]:
        """Nearest memories of a row's picture and a question, without the picture itself, its views
        and, for a scene, the pictures it is made of.

        Returns (place in the bank, score) pairs, nearest first.
        """
        scores = self.bank_keys @ self.key(row, question)
        own = {self.records[row].id, *self.records[row].pictures}
        found: list[tuple[int, float]] = []
        for place in np.argsort(-scores)[: count + len(own)]:  # the bank has one view of each
            if self.records[self.bank[place]].id not in own:
                found.append((int(place), float(scores[place])))
        return found[:count]


def memory_text(record: Record) -> str:
    """What a memory of a training picture says: name, kind and what it is, or its first answer."""
    if record.source == "llava":
        return str(told(*record.questions[0]))
    if record.source == "easy_vqa":
        return f"This is a {record.colour} {record.name}."
    text = sentence(record.name)[:-1]
    if record.kind and record.kind != record.name:
        text += f", a kind of {record.kind}"
    return text + (f": {record.gloss}." if record.gloss else ".")


def text_mean(tokenizer: Tokenizer, table: torch.Tensor, text: str) -> NDArray[np.float32]:
    """Mean token embedding [D] of a text that is not empty; `table` [V, D] is on the CPU."""
    ids = encode_text(tokenizer, text)
    mean: NDArray[np.float32] = table[list(ids)].float().mean(0).numpy()
    return mean


def make_world(
    parts: Parts, cells: NDArray[np.float16], records: Sequence[Record], recipe: Recipe
) -> World:
    """Build the bank; fit the key recipe unless the parts have one."""
    if parts.keys is None:
        parts.keys = fit_keys(parts, cells, records, recipe)
    views = views_of(records)
    bank = bank_rows(records, views)
    whole = [memory_text(records[row]) for row in bank]
    longest = parts.compressor.shape.max_text_tokens
    texts = [cut_text(parts.tokenizer, text, longest) for text in whole]
    if cut := sum(a != b for a, b in zip(texts, whole, strict=True)):
        print(f"{cut} memories are cut: they hold at most {longest} tokens", file=sys.stderr)
    table = parts.embeddings.detach()
    means = np.stack([text_mean(parts.tokenizer, table, text) for text in texts])
    keys = make_keys(cells[bank, 0].astype(np.float32), means, parts.keys)
    return World(cells, records, views, np.array(bank), keys, texts, parts, table)


def fit_keys(
    parts: Parts, cells: NDArray[np.float16], records: Sequence[Record], recipe: Recipe
) -> KeyArrays:
    """The key recipe of the training pictures and of the bank's texts."""
    apart = ("prototypes", *STYLES)
    train = [i for i, r in enumerate(records) if r.split == "train" and r.source not in apart]
    bank = bank_rows(records, views_of(records))
    memories = [memory_text(records[row]) for row in bank]
    means = np.stack([text_mean(parts.tokenizer, parts.embeddings, text) for text in memories])
    return fit_key(
        cells[train, 0].astype(np.float32), means,
        recipe.image_key_width, recipe.text_key_width, recipe.alpha,
    )  # fmt: skip


def views_of(records: Sequence[Record]) -> dict[str, list[int]]:
    """Rows of every picture."""
    views: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        views.setdefault(record.id, []).append(row)
    return views


def bank_rows(records: Sequence[Record], views: dict[str, list[int]]) -> list[int]:
    """One row of every training picture and class prototype, the first view, in the order of the
    records."""
    rows: list[int] = []
    shapes: set[str] = set()  # one memory of each plain shape and colour is enough
    for row, record in enumerate(records):
        if record.split != "train" or record.source in ("composites", *STYLES):
            continue
        if views[record.id][0] != row:
            continue
        if record.source == "easy_vqa":
            text = memory_text(record)
            if text in shapes:
                continue
            shapes.add(text)
        rows.append(row)
    return rows


def calibrated_similarity(
    world: World, seed: int, sample: int = 800
) -> tuple[tuple[str, float], ...]:
    """Similarity words with floors from how near *other* pictures come."""
    rng = Random(seed)
    rows = [i for i, r in enumerate(world.records) if r.split == "train" and r.source in SHOWN]
    nearest = [
        world.retrieve(row, "What is this?", 1)[0][1]
        for row in rng.sample(rows, min(sample, len(rows)))
    ]
    return calibrate(np.array(nearest, dtype=np.float32))


def with_floors(world: World, recipe: Recipe) -> World:
    """The same world; similarity words with floors that fit it are in the parts' prompt now."""
    floors = calibrated_similarity(world, recipe.seed)
    world.parts.prompt = replace(world.parts.prompt, similarity=floors)
    return world


def words_of(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """Names of the training pictures, and words for their kinds."""
    train = [record for record in records if record.split == "train"]
    names, kinds = {r.name for r in train if r.name}, {r.kind for r in train if r.kind}
    return sorted(names), sorted(kinds)


SHOWN = ("emoji", "clipart", "furniture")  # sources of single things to name


def cells_of(world: World, rows: Sequence[int]) -> torch.Tensor:
    """Features f32 [len(rows), C, Dv]."""
    return torch.from_numpy(np.asarray(world.cells[list(rows)], dtype=np.float32))


def image_tokens_of(world: World, rows: Sequence[int], device: torch.device) -> torch.Tensor:
    """Image tokens f32 [len(rows), T, D] on a device: the stored ones, else the connector's."""
    if world.image_tokens is None:
        return world.parts.image_tokens(cells_of(world, rows).to(device))
    stored = np.asarray(world.image_tokens[list(rows)], dtype=np.float32)
    return torch.from_numpy(stored).to(device)
