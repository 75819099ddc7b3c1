"""A memory's text as the model uses it: tokens, their chunks for the latents, and what to copy.

    text ─► tokens ─► at most C chunks ─► compressor ─► one latent a chunk
                  └─► sentences ─► what an answer that repeats a memory would say next

A latent keeps what a chunk is about but not the order of its tokens. So while an answer repeats a
memory's words, the word that follows them there gets a bonus (a pointer, as in copy networks):
the language model chooses where to start and whether to go on, the text says how it goes on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tinyalign.runtime.prompt import encode_text

SENTENCE_END = re.compile(r"[.!?]+(?=\s)")
CLAUSE_END = re.compile(r"[,;:]+(?=\s)")
SPLIT_ABOVE = 6  # a chunk of more tokens is halved while there are chunks to spare


@dataclass(frozen=True)
class MemoryText:
    """Token ids of a memory's text, and where its sentences and its chunks start."""

    ids: tuple[int, ...]
    sentences: tuple[int, ...]  # first token of each sentence, ascending from 0
    chunks: tuple[int, ...]  # first token of each chunk, ascending from 0

    @property
    def members(self) -> list[range]:
        """The places of every chunk's tokens."""
        return _spans(self.chunks, len(self.ids))

    def to_copy(self) -> list[tuple[int, ...]]:
        """The tokens of every sentence."""
        return [self.ids[span.start : span.stop] for span in _spans(self.sentences, len(self.ids))]


def read_memory(tokenizer: Tokenizer, text: str, longest: int, chunks: int) -> MemoryText:
    """Tokens of a text, cut to ``longest``, with at most ``chunks`` chunks.

    Chunks are the sentences; where there are more, the shortest neighbours are joined, and where
    there are fewer, long ones are parted at a comma or in the middle.
    """
    text = text.strip()
    ids = encode_text(tokenizer, text)[:longest]
    if not ids:
        return MemoryText((), (), ())
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets[: len(ids)]
    sentences = _starts(SENTENCE_END, text, offsets)
    clauses = _starts(CLAUSE_END, text, offsets)
    words = [i for i, (start, _) in enumerate(offsets) if start == 0 or text[start - 1].isspace()
             or text[start].isspace()]  # fmt: skip
    found = list(sentences)
    while len(found) > chunks:
        sizes = [span.stop - span.start for span in _spans(found, len(ids))]
        joined = [sizes[i - 1] + sizes[i] for i in range(1, len(found))]
        del found[joined.index(min(joined)) + 1]
    while len(found) < chunks:
        span = max(_spans(found, len(ids)), key=len)
        inside = [i for i in clauses if i in span and i > span.start]
        inside = inside or [i for i in words if i in span and i > span.start]
        if len(span) <= SPLIT_ABOVE or not inside:
            break
        middle = (span.start + span.stop) / 2
        found = sorted([*found, min(inside, key=lambda i: abs(i - middle))])
    return MemoryText(ids, tuple(sentences), tuple(found))


def continuations(
    answer: Sequence[int], sentences: Sequence[Sequence[int]], longest: int
) -> tuple[int, list[Sequence[int]]]:
    """How sentences go on where they say what the answer said last: (length of the match, rests).

    The match is the longest run of at most ``longest`` last tokens of the answer that stands in
    some sentence and does not end it; (0, nothing) where there is none.
    """
    for length in range(min(longest, len(answer)), 0, -1):
        last = tuple(answer[len(answer) - length :])
        found = [
            sentence[i + length :]
            for sentence in sentences
            for i in range(len(sentence) - length)
            if tuple(sentence[i : i + length]) == last
        ]
        if found:
            return length, found
    return 0, []


def copies(
    answer: Sequence[int], sentences: Sequence[Sequence[int]], longest: int
) -> tuple[int, frozenset[int]]:
    """What may come next if an answer repeats a sentence: (length of the match, next tokens)."""
    length, found = continuations(answer, sentences, longest)
    return length, frozenset(rest[0] for rest in found)


def add_copy_bonus(
    logits: NDArray[np.float32],
    answer: Sequence[int],
    sentences: Sequence[Sequence[int]],
    bonus: Sequence[float],
) -> None:
    """Add ``bonus[length - 1]`` to the logits [V] of what ``copies`` finds, in place."""
    length, found = copies(answer, sentences, len(bonus))
    for token in found:
        logits[token] += bonus[length - 1]


def _starts(pattern: re.Pattern[str], text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """0 and the places of the tokens that begin after a match of ``pattern``."""
    starts = [0]
    for match in pattern.finditer(text):
        after = next((i for i, (_, end) in enumerate(offsets) if end > match.end()), 0)
        if after > starts[-1]:
            starts.append(after)
    return starts


def _spans(starts: Sequence[int], length: int) -> list[range]:
    ends = [*starts[1:], length] if starts else []
    return [range(a, b) for a, b in zip(starts, ends, strict=True)]
