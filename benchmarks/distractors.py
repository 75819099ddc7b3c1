"""Memories that are beside the taught ones in `teach.py`: real pictures first, then made-up ones.

The default bank's memories come first. What follows them, in this order, shows training pictures
only, never a held-out one:

    views      other views of the default bank's pictures (emoji, furniture, clip art)
    classes    the second pseudo-features of the encoder's classes
    scenes     drawn scenes
    shapes     easy-vqa's training pictures
    mixtures   cells of two pictures of one source, mixed: a new thing among those that there are
    moved      one picture's cells, changed as two views of another picture differ: one more view

The last two take turns and never end. Half of them all are told under an invented name with one to
three facts, just like the taught things; the others have the texts of a real bank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from random import Random

import numpy as np
from numpy.typing import NDArray

from tinyalign.training.facts import ATTRIBUTES, UNSEEN_ATTRIBUTES, Fact, draw_fact, invented_name
from tinyalign.training.features import Record
from tinyalign.training.questions import questions_of, sentence
from tinyalign.training.world import SHOWN, bank_rows, memory_text

RIVALS = 0.5  # share with an invented name and facts
SORTS = {"emoji": "views", "furniture": "views", "clipart": "views", "prototypes": "classes",
         "composites": "scenes", "easy_vqa": "shapes"}  # fmt: skip


@dataclass(frozen=True)
class Distractor:
    """A memory to be: cells f32 [C, Dv], its text, and what it is (see above)."""

    cells: NDArray[np.float32]
    text: str
    sort: str
    rival: bool


def distractors(
    cells: NDArray[np.float16], records: Sequence[Record], names: Collection[str], seed: int
) -> Iterator[Distractor]:
    """All distractors after the default bank's, without end; none is called by one of ``names``."""
    rng = Random(seed)
    views = views_by_id(records)
    rows = [i for i, record in enumerate(records) if record.split == "train"]
    for row, features, sort in chain(
        _real(cells, records, rows, views), _made_up(cells, records, rows, views, rng)
    ):
        rival = rng.random() < RIVALS
        if rival:
            name = invented_name(rng)
            while name in names:
                name = invented_name(rng)
            text = told(name, draw_facts(rng, rng.choice([1, 2, 3])))
        else:
            text = plain_text(records[row], rng)
        yield Distractor(features, text, sort, rival)


def views_by_id(records: Sequence[Record]) -> dict[str, list[int]]:
    """The rows of every picture."""
    views: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        views.setdefault(record.id, []).append(row)
    return views


def draw_facts(rng: Random, number: int, unseen: bool | None = None) -> list[Fact]:
    """Facts of different kinds: any kinds, or exactly one (or none) that training never sees."""
    kinds = rng.sample((*ATTRIBUTES, *UNSEEN_ATTRIBUTES) if unseen is None else ATTRIBUTES, number)
    if unseen:
        kinds[rng.randrange(number)] = rng.choice(UNSEEN_ATTRIBUTES)
    return [draw_fact(rng, kind) for kind in kinds]


def told(name: str, facts: Sequence[Fact]) -> str:
    """What a person says to teach a thing."""
    return " ".join([sentence(name), *(fact.tell for fact in facts)])


def plain_text(record: Record, rng: Random) -> str:
    """What the default bank would say of a picture; of a scene, what a caption would."""
    if record.source != "composites":
        return memory_text(record)
    return next(item.answer for item in questions_of(record, rng) if item.type == "caption")


Made = tuple[int, NDArray[np.float32], str]  # the row whose text it has, cells, sort


def _real(
    cells: NDArray[np.float16],
    records: Sequence[Record],
    rows: Sequence[int],
    views: dict[str, list[int]],
) -> Iterator[Made]:
    known = set(bank_rows(records, views))
    for sort in dict.fromkeys(SORTS.values()):
        for row in rows:
            if row not in known and SORTS.get(records[row].source) == sort:
                yield row, cells[row].astype(np.float32), sort


def _made_up(
    cells: NDArray[np.float16],
    records: Sequence[Record],
    rows: Sequence[int],
    views: dict[str, list[int]],
    rng: Random,
) -> Iterator[Made]:
    of_source = {source: [r for r in rows if records[r].source == source] for source in SHOWN}
    for number in count():
        row = rng.choice(of_source[rng.choice(SHOWN)])
        features, source = cells[row].astype(np.float32), records[row].source
        if number % 2:
            share = rng.uniform(0.3, 0.7)
            other = cells[rng.choice(of_source[source])].astype(np.float32)
            yield row, share * features + (1 - share) * other, "mixtures"
            continue
        one, two = rng.sample(views[records[rng.choice(of_source[source])].id], 2)
        moved = cells[two].astype(np.float32) - cells[one].astype(np.float32)
        yield row, np.clip(features + rng.uniform(0.5, 1.0) * moved, 0, None), "moved"
