"""The soft vocabulary: which LM tokens an image token may be a mixture of, and names as slots.

A name is spelled right-aligned over the connector's name slots ("a", "a", " polar", " bear"), so
the head noun always stands in the last slot and a shorter name is a graceful answer to an
uncertain one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

COLOURS = "red orange yellow green blue purple pink brown black grey white teal gold silver".split()
NUMBERS = "one two three four five six".split()
PLACES = "left right top bottom centre".split()
FILLER = " a"  # stands in name slots that a short name leaves free


def name_ids(tokenizer: Tokenizer, name: str, slots: int) -> list[int]:
    """Token ids of a name over `slots` slots: right-aligned, its last tokens if it is longer."""
    ids = tokenizer.encode(" " + name, add_special_tokens=False).ids
    filler = tokenizer.encode(FILLER, add_special_tokens=False).ids
    return (filler * slots + ids)[-slots:]


def word_id(tokenizer: Tokenizer, word: str) -> int:
    """The last token of a word: the word itself for the common words used as attributes."""
    return tokenizer.encode(" " + word, add_special_tokens=False).ids[-1]


def soft_vocabulary(tokenizer: Tokenizer, names: Iterable[str], words: Sequence[str]) -> list[int]:
    """Sorted ids of all tokens that a name or an attribute word may need."""
    ids: set[int] = set()
    for text in (*names, *words, FILLER.strip()):
        ids.update(tokenizer.encode(" " + text, add_special_tokens=False).ids)
    return sorted(ids)
