"""The data card: its numbers are counted, and its text is Markdown."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")

from tinyalign.training.data_card import ABOUT, card, filled
from tinyalign.training.features import ORDER, STYLES, Record
from tinyalign.training.pictures import split_of


def test_every_source_is_told() -> None:
    assert set(ABOUT) == {*ORDER, *STYLES}


def test_numbers_are_counted() -> None:
    def record(source: str, number: int, view: int) -> Record:
        name = f"cup {number}"
        side = "held" if source == "photos" else split_of(name)
        return Record(f"{source}/{number}", view, source, side, name, name, "toy", "", "MIT", "Ann",
                      "red")  # fmt: skip

    records = {s: [record(s, i // 2, i % 2) for i in range(40)] for s in ABOUT}
    text = card(records)
    held = sum(split_of(f"cup {i}") == "held" for i in range(20))
    assert (
        f"| 20 | 40 | 20 | {20 - held} | {held} | asked 29 %, naming 17 %, key head, bank |" in text
    )
    assert "both sides: 0; rows on another side than their concept's hash: 0." in text.replace(
        "\n", " "
    )
    assert "| emoji | colour | red 20 | 0 |" in text and "| emoji | MIT | 20 | Ann 20 |" in text
    records["noto"].append(replace(records["noto"][0], split="other"))
    assert "concept's hash: 1." in card(records).replace("\n", " ")


def test_paragraphs_are_filled_and_code_is_not_broken() -> None:
    words = "word " * 20
    block = f"- one\n  two {words}`code that stays whole`\n- three"
    lines = filled(block).split("\n")
    assert all(len(line) <= 110 for line in lines) and lines[0].startswith("- one two word")
    assert "`code that stays whole`" in filled(block) and lines[-1] == "- three"
    assert filled("| a |\n| b |") == "| a |\n| b |"
