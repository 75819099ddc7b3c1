"""What the accuracy benchmarks share: pictures from cached features, questions, scoring."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from tinyalign.runtime import EncodedPicture, TinyAlign
from tinyalign.training.features import Record
from tinyalign.training.questions import NUMBERS, Item, questions_of

LOOK_TYPES = ("colour", "count", "position", "yesno", "shape")


def interval(right: Iterable[bool]) -> dict[str, float]:
    """Share of true values, their number, and the 95 % interval of the share (Wilson)."""
    values = [bool(value) for value in right]
    n = len(values)
    if not n:
        return {"share": 0.0, "n": 0, "low": 0.0, "high": 1.0}
    share, z = sum(values) / n, 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return {"share": round(share, 3), "n": n, "low": round(low, 3), "high": round(high, 3)}


def seen(model: TinyAlign, like: EncodedPicture, cells: NDArray[np.float16]) -> EncodedPicture:
    """An encoded picture from cached features [C, Dv]; all else is as in ``like``."""
    cells32 = cells.astype(np.float32)
    tokens, ids = model.parts.connector.run(["image_tokens", "token_ids"], {"cells": cells32[None]})
    return dataclasses.replace(like, cells=cells32, image_tokens=tokens[0], token_ids=ids[0])


def blank(model: TinyAlign) -> EncodedPicture:
    """An encoded picture for ``seen`` to start from."""
    return model.encode(np.zeros((64, 64, 3), np.uint8))


def says(answer: str, name: str) -> bool:
    """Whether the answer holds the name as words."""
    return f" {words_of(name)} " in f" {words_of(answer)} "


def words_of(text: str) -> str:
    """Lower case, words parted by one space, no punctuation but hyphens."""
    return " ".join(re.sub(r"[^a-z0-9 -]+", " ", text.lower()).split())


def look_questions(
    records: Sequence[Record],
    each: int,
    rng: Random,
    wanted: Callable[[Record], bool] = lambda record: True,
) -> dict[str, list[tuple[int, Item]]]:
    """Questions on looks about held-out rows: at most ``each`` of every source and type.

    Keys are like "scenes count" or "easy-vqa shape"; values are (row, question with its answer).
    """
    asked: dict[str, list[tuple[int, Item]]] = defaultdict(list)
    held = [i for i, record in enumerate(records) if record.split == "held" and wanted(record)]
    rng.shuffle(held)
    for row in held:
        source = "easy-vqa" if records[row].source == "easy_vqa" else "scenes"
        items = questions_of(records[row], rng)
        rng.shuffle(items)
        types: set[str] = set()
        for item in items:
            group = f"{source} {item.type}"
            if item.type in LOOK_TYPES and item.type not in types and len(asked[group]) < each:
                types.add(item.type)
                asked[group].append((row, item))
    return dict(sorted(asked.items()))


def is_right(item: Item, answer: str) -> bool:
    """Whether an answer agrees with the item in what was asked for."""
    if item.type == "yesno":
        return answer.lower().startswith(item.label)
    if item.type == "count":
        return says(answer, NUMBERS[int(item.label)])
    return says(answer, item.label)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in rows]


def note(text: str) -> None:
    """Progress on stderr."""
    print(text, file=sys.stderr, flush=True)
