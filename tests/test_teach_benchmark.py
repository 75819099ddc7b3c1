"""benchmarks/teach.py: what it teaches beside what, and what it counts as right."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tinyalign.training.facts import UNSEEN_ATTRIBUTES
from tinyalign.training.features import Record

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import common
import distractors
import teach_lessons
import teach_report

RECORD = Record("", 0, "emoji", "train", "cat", "cat", "animal", "", "MIT", "")
SPLITS = ("train", "held")


@pytest.fixture
def world() -> tuple[np.ndarray, list[Record]]:
    """Two views of four pictures of each source, every second of them held out."""
    records = [
        replace(RECORD, id=f"{source}/{i}", view=view, source=source, split=SPLITS[i % 2])
        for source in ("emoji", "furniture", "clipart", "prototypes")
        for i in range(4)
        for view in range(2)
    ]
    cells = np.arange(len(records), dtype=np.float16)[:, None, None] * np.ones((1, 10, 8))
    return cells.astype(np.float16), records


def test_interval_is_wilsons() -> None:
    assert common.interval([True] * 94 + [False] * 6) == {
        "share": 0.94,
        "n": 100,
        "low": 0.875,
        "high": 0.972,
    }
    assert common.interval([True] * 10)["low"] == 0.722  # not 1, as by the normal approximation


def test_names_are_found_as_words() -> None:
    assert common.says("This is a Zorvin.", "zorvin")
    assert not common.says("This is a zorvinium.", "zorvin")
    assert common.says("Its part number is KX-204.", "KX-204")
    assert not common.says("It costs 1204 euros.", "204")


def test_distractors_show_training_pictures_only_and_real_ones_first(world) -> None:
    cells, records = world
    found = list(islice(distractors.distractors(cells, records, (), seed=1), 400))
    real = [d for d in found if d.sort in ("views", "classes")]
    assert [d.sort for d in found[: len(real)]] == ["views"] * 6 + ["classes"] * 2
    held = {row for row, record in enumerate(records) if record.split == "held"}
    assert {int(d.cells[0, 0]) for d in real}.isdisjoint(held)
    assert {d.sort for d in found[len(real) :]} == {"mixtures", "moved"}
    assert 0.4 < sum(d.rival for d in found) / len(found) < 0.6
    assert all("cat" in d.text for d in found if not d.rival)


def test_distractors_are_the_same_every_time_and_have_no_taught_name(world) -> None:
    first = list(islice(distractors.distractors(*world, (), seed=1), 50))
    again = list(islice(distractors.distractors(*world, (), seed=1), 50))
    assert [d.text for d in first] == [d.text for d in again]
    assert all(np.array_equal(a.cells, b.cells) for a, b in zip(first, again, strict=True))
    name = next(d.text for d in first if d.rival).split(".")[0].split()[-1]
    others = islice(distractors.distractors(*world, {name}, seed=1), 50)
    assert not any(common.says(d.text, name) for d in others)


def test_one_fact_is_of_an_unseen_kind_where_that_is_wanted() -> None:
    unseen = {attribute.name for attribute in UNSEEN_ATTRIBUTES}
    for seed in range(20):
        rng = teach_lessons.rng_of(str(seed))
        kinds = [fact.attribute for fact in distractors.draw_facts(rng, 3, unseen=True)]
        assert len(unseen.intersection(kinds)) == 1
        assert len(set(kinds)) == 3
        kinds = [fact.attribute for fact in distractors.draw_facts(rng, 3, unseen=False)]
        assert not unseen.intersection(kinds)


@pytest.mark.parametrize(
    ("kind", "wanted", "answer", "right"),
    [
        ("name", "zorvin", "This is a zorvin.", True),
        ("name", "zorvin", "This is a zorvit.", False),
        ("fact", "Mira", "Its owner is Mira.", True),
        ("fact", "Mira", "Its owner is Mira. It costs 45 euros.", False),
        ("fact", "45 euros", "It costs 45 euros.", True),
        ("fact", "45", "There are 45 euros in stock.", False),
        ("untold", "", "I do not know.", True),
        ("untold", "", "Its owner is Mira.", False),
    ],
)
def test_what_is_right(kind, wanted, answer, right) -> None:
    values = ("Mira", "45 euros", "45")
    lesson = teach_lessons.Lesson("emoji/1", 0, 1, "zorvin", "", 9, values, ())
    question = teach_lessons.Question(kind, "?", wanted)
    assert teach_lessons.is_right_answer(lesson, question, answer) is right


def test_differences_are_paired() -> None:
    assert teach_report.difference("1111", "1111") == (0.0, 0.0)
    change, half = teach_report.difference("1" * 100, "1" * 90 + "0" * 10)
    assert change == pytest.approx(-0.1)
    assert half == pytest.approx(1.96 * 0.03)
