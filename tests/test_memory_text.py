"""How a memory's text is parted into chunks, and what an answer that repeats it would say next."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from tinyalign.runtime.memory_text import MemoryText, add_copy_bonus, copies, read_memory

TOKENIZER = tiny_model.tokenizer()


def chunks_of(text: str, longest: int = 99, chunks: int = 4) -> list[str]:
    read = read_memory(TOKENIZER, text, longest, chunks)
    return [said(read, span) for span in read.members]


def said(read: MemoryText, span: range) -> str:
    return str(TOKENIZER.decode(list(read.ids[span.start : span.stop])))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is A. So B. Or C. An D.", ["It is A.", " So B.", " Or C.", " An D."]),
        ("A b. C d. E f. G h. I j.", ["A b. C d.", " E f.", " G h.", " I j."]),
        ("Stop", ["Stop"]),  # too short to part
        ("ab: cd ef gh, ij kl", ["ab:", " cd ", "ef gh,", " ij kl"]),
        ("a 3.5 b", ["a ", "3.5 b"]),  # a point inside a number ends nothing
        ("unbreakable", ["unbreakable"]),
        ("", []),
    ],
)
def test_chunks(text: str, expected: list[str]) -> None:
    assert chunks_of(text) == expected


def test_text_beyond_the_limit_is_left_out() -> None:
    read = read_memory(TOKENIZER, "One two. Three four.", longest=12, chunks=4)
    assert TOKENIZER.decode(list(read.ids)) == "One two. Thr"
    assert [said(read, span) for span in read.members][-1] == " Thr"


@given(st.text(max_size=60), st.integers(1, 40), st.integers(1, 5))
def test_chunks_part_the_whole_text(text: str, longest: int, chunks: int) -> None:
    read = read_memory(TOKENIZER, text, longest, chunks)
    assert len(read.members) <= chunks
    places = [place for span in read.members for place in span]
    assert places == list(range(len(read.ids)))
    assert all(len(span) > 0 for span in read.members)
    assert [token for sentence in read.to_copy() for token in sentence] == list(read.ids)


def test_sentences_are_copied_one_by_one() -> None:
    read = read_memory(TOKENIZER, "A cup. Its owner is Bo.", 99, 4)
    assert [TOKENIZER.decode(list(s)) for s in read.to_copy()] == ["A cup.", " Its owner is Bo."]


def test_the_longest_match_says_what_comes_next() -> None:
    sentences = [(1, 2, 3, 4), (9, 3, 5), (2, 3, 6)]
    assert copies([7, 2, 3], sentences, 3) == (2, frozenset({4, 6}))
    assert copies([1, 2, 3], sentences, 3) == (3, frozenset({4}))
    assert copies([1, 2, 3], sentences, 1) == (1, frozenset({4, 5, 6}))
    assert copies([8, 3], sentences, 3) == (1, frozenset({4, 5, 6}))
    assert copies([2, 3, 4], sentences, 3) == (0, frozenset())  # a sentence's end leads nowhere
    assert copies([], sentences, 3) == (0, frozenset())
    assert copies([3], [], 3) == (0, frozenset())


def test_the_bonus_grows_with_the_match() -> None:
    logits = np.zeros(10, np.float32)
    add_copy_bonus(logits, [2, 3], [(1, 2, 3, 4), (9, 3, 5)], (0.5, 2.0))
    assert logits.tolist() == [0, 0, 0, 0, 2.0, 0, 0, 0, 0, 0]


def test_offsets_of_another_tokenizer() -> None:
    """Chunks go by letters of the text, not by how a tokenizer marks a space."""
    words = ["We", "call", "it", "Bo", ".", "Its", "home", "is", "here"]
    other = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="We"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    read = read_memory(other, "We call it Bo. Its home is here.", 99, 2)
    assert read.chunks == (0, 5)
