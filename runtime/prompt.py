"""The prompt, built by one function for training and for the runtime.

Order: system, image pieces, memories (nearest first), question. Every piece of text is tokenized by
itself, without BOS, so the token ids do not depend on what stands beside a piece. Template pieces
may hold special tokens such as ``<|im_start|>``; in the user's question they are only letters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tinyalign.runtime.errors import QuestionError
from tinyalign.runtime.manifest import PromptSpec


@dataclass(frozen=True)
class TokenSegment:
    """Text: token ids to look up in the embedding table."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class ImageSegment:
    """Rows ``start:stop`` of the connector's image tokens [T, D]."""

    start: int
    stop: int


@dataclass(frozen=True)
class MemorySegment:
    """All tokens [m, D] of the retrieved memory ``index`` (0 = nearest)."""

    index: int


Segment: TypeAlias = TokenSegment | ImageSegment | MemorySegment


def build_prompt(
    spec: PromptSpec, tokenizer: Tokenizer, question: str, similarities: Sequence[str] = ()
) -> tuple[Segment, ...]:
    """The prompt as segments, with one memory for each word in ``similarities`` (nearest first).

    Raises QuestionError for a question that is empty or cannot be encoded.
    """
    segments: list[Segment] = [TokenSegment(encode_template(tokenizer, spec.system))]
    slot = 0
    for piece in spec.image:
        if isinstance(piece, int):
            segments.append(ImageSegment(slot, slot + piece))
            slot += piece
        else:
            segments.append(TokenSegment(encode_template(tokenizer, piece)))
    for index, word in enumerate(similarities):
        text = spec.memory.replace("{similarity}", word)
        segments += [TokenSegment(encode_template(tokenizer, text)), MemorySegment(index)]
    if similarities:
        segments.append(TokenSegment(encode_template(tokenizer, spec.memory_end)))
    before, after = spec.question.split("{question}")
    segments += [
        TokenSegment(encode_template(tokenizer, before)),
        TokenSegment(encode_question(tokenizer, question)),
        TokenSegment(encode_template(tokenizer, after)),
    ]
    return _join(segments)


def encode_template(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of a template piece; special tokens in it become their single id."""
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    if not special:
        return encode_text(tokenizer, text)
    ids: list[int] = []
    longest_first = sorted(special, key=len, reverse=True)
    for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
        ids += [special[part]] if part in special else encode_text(tokenizer, part)
    return tuple(ids)


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of plain text (a question, a memory's text): special tokens in it are only letters.

    Sets the tokenizer's ``encode_special_tokens`` once, which is how the library spells this.
    """
    if not tokenizer.encode_special_tokens:
        tokenizer.encode_special_tokens = True
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids) if text else ()


def encode_question(tokenizer: Tokenizer, question: str) -> tuple[int, ...]:
    """Token ids of a question without surrounding white space; QuestionError if it is empty."""
    question = question.strip()
    if not question:
        raise QuestionError("the question is empty")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError:
        raise QuestionError("the question is not valid text (broken UTF-8)") from None
    return encode_text(tokenizer, question)


def similarity_word(spec: PromptSpec, score: float, floor: float | None = None) -> str | None:
    """The word for a retrieval score, or None below the floor (the memory is dropped).

    ``floor`` is the bank's own; without one the model's last floor counts.
    """
    last_word, last_floor = spec.similarity[-1]
    if score < (last_floor if floor is None else floor):
        return None
    return next((word for word, least in spec.similarity if score >= least), last_word)


def relevant(spec: PromptSpec, scores: Sequence[float]) -> int:
    """How many of the retrieved memories are used, by their scores, highest first.

    A clear winner stands alone: what scores more than ``spec.margin`` less shows something else.
    """
    return sum(score >= scores[0] - spec.margin for score in scores)


def token_count(segments: Sequence[Segment], memory_lengths: Sequence[int] = ()) -> int:
    """Number of LM tokens of a prompt whose memories have the given numbers of tokens."""
    count = 0
    for segment in segments:
        if isinstance(segment, TokenSegment):
            count += len(segment.ids)
        elif isinstance(segment, ImageSegment):
            count += segment.stop - segment.start
        else:
            count += memory_lengths[segment.index]
    return count


def embed(
    segments: Sequence[Segment],
    embeddings: NDArray[np.float16] | NDArray[np.float32],
    image_tokens: NDArray[np.float32],
    memories: Sequence[NDArray[np.float32]] = (),
) -> NDArray[np.float32]:
    """Prompt rows f32 [N, D] from embeddings [V, D], image tokens [T, D] and memories [m, D]."""
    rows: list[NDArray[np.float32]] = []
    for segment in segments:
        if isinstance(segment, TokenSegment):
            rows.append(embeddings[list(segment.ids)].astype(np.float32))
        elif isinstance(segment, ImageSegment):
            rows.append(image_tokens[segment.start : segment.stop])
        else:
            rows.append(memories[segment.index])
    return np.concatenate(rows, axis=0, dtype=np.float32)


def _join(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Join neighbouring texts into one segment and leave out empty ones."""
    joined: list[Segment] = []
    for segment in segments:
        if isinstance(segment, TokenSegment):
            if not segment.ids:
                continue
            if joined and isinstance(last := joined[-1], TokenSegment):
                joined[-1] = TokenSegment(last.ids + segment.ids)
                continue
        joined.append(segment)
    return tuple(joined)
