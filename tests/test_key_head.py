"""The key head brings views and styles of one thing together; it learns from training ones only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tinyalign.runtime.keys import KeyArrays, make_keys
from tinyalign.training.features import Record
from tinyalign.training.key_head import HeadRecipe, learn_key_head, things_of
from tinyalign.training.keys import fit_key
from tinyalign.training.styles import thing_of

DV, WIDTH, THINGS = 24, 8, 80
RECIPE = HeadRecipe(steps=80, batch=48, rate=3e-3, warmup=5, noise=0.05)


def record(source: str, number: int, view: int, split: str = "train") -> Record:
    name = f"thing{number}"
    return Record(f"{source}/{number}", view, source, split, name, name, "", "", "", "")


@pytest.fixture(scope="module")
def drawn() -> tuple[NDArray[np.float32], list[Record]]:
    """Things as two makers draw them: each shifts and stretches half of the features its own way.

    What tells a thing from others lies in features that vary little; style is what varies most."""
    rng = np.random.default_rng(0)
    rows, records = [], []
    styles = {"emoji": rng.normal(size=(4, DV)), "noto": rng.normal(size=(4, DV))}
    for number in range(THINGS):
        thing = rng.normal(size=DV) * np.r_[np.ones(DV // 2), np.zeros(DV // 2)]
        for source, manner in styles.items():
            for view in range(2):
                looks = 3 * rng.normal(size=4) @ manner
                rows.append(thing + looks * np.r_[np.zeros(DV // 2), np.ones(DV // 2)])
                records.append(record(source, number, view, "held" if number % 4 == 0 else "train"))
    return np.array(rows, np.float32), records


def found_first(keys: KeyArrays, pooled: NDArray[np.float32], records: list[Record]) -> float:
    """How often a held-out thing in one style finds itself in the other among all things."""
    made = make_keys(pooled, None, keys)
    gallery = [i for i, r in enumerate(records) if r.source == "emoji" and r.view == 0]
    asked = [
        i for i, r in enumerate(records) if r.source == "noto" and r.view == 0 and r.split == "held"
    ]
    best = (made[asked] @ made[gallery].T).argmax(1)
    return float(
        np.mean(
            [records[q].name == records[gallery[b]].name for q, b in zip(asked, best, strict=True)]
        )
    )


def fitted(pooled: NDArray[np.float32]) -> KeyArrays:
    texts = np.random.default_rng(1).normal(size=(30, 12)).astype(np.float32)
    return fit_key(pooled, texts, WIDTH, 4, 0.1)


def test_it_finds_held_out_things_in_another_style(
    drawn: tuple[NDArray[np.float32], list[Record]],
) -> None:
    pooled, records = drawn
    before = fitted(pooled)
    after = learn_key_head(before, pooled, records, seed=0, recipe=RECIPE)
    assert found_first(after, pooled, records) > found_first(before, pooled, records) + 0.2
    assert (after.text_projection == before.text_projection).all()
    assert after.image_projection.shape == before.image_projection.shape


def test_the_same_seed_gives_the_same_head(
    drawn: tuple[NDArray[np.float32], list[Record]],
) -> None:
    pooled, records = drawn
    short = replace(RECIPE, steps=5)
    one, two = (learn_key_head(fitted(pooled), pooled, records, 3, short) for _ in range(2))
    assert (one.image_projection == two.image_projection).all()


def test_held_out_pictures_change_nothing(
    drawn: tuple[NDArray[np.float32], list[Record]],
) -> None:
    pooled, records = drawn
    held = np.array([r.split == "held" for r in records])
    keys, short = fitted(pooled), replace(RECIPE, steps=5)
    other = np.where(held[:, None], np.float32(7), pooled)
    one, two = (learn_key_head(keys, rows, records, 3, short) for rows in (pooled, other))
    assert (one.image_projection == two.image_projection).all()


def test_styles_and_sides_of_a_thing_belong_together() -> None:
    assert thing_of("emoji/1f34e") == thing_of("noto/1f34e") == "1f34e"
    assert thing_of("turned/Scopia/12/50") == thing_of("furniture/Scopia/12") == "Scopia/12"
    records = [
        record("emoji", 1, 0), record("noto", 1, 0), record("clipart", 1, 0),
        record("clipart", 1, 1), record("twemoji", 2, 0), record("photos", 3, 0),
        record("photos", 3, 1), record("noto", 4, 0, "held"), record("emoji", 4, 0, "held"),
    ]  # fmt: skip
    assert things_of(records) == {"1": [0, 1], "clipart/1": [2, 3]}
