"""The values that asking takes and gives."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tinyalign.bank import Hit


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """A picture as the model sees it: made once, then asked about as often as wanted."""

    cells: NDArray[np.float32]  # [C, Dv], row 0 the whole picture, the others a grid of its parts
    image_tokens: NDArray[np.float32]  # [T, D]
    token_ids: NDArray[np.int64]  # [T], the vocabulary's nearest token to each image token
    pixel_hash: str  # SHA-256 of the pixels the encoder saw
    model: str  # of the model that made it; another one refuses it

    @property
    def pooled(self) -> NDArray[np.float32]:
        """The whole picture's features [Dv]."""
        features: NDArray[np.float32] = self.cells[0]
        return features


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one answer.

    ``encode``: from the picture file to image tokens. ``retrieve``: key and bank search.
    ``prefill``: memory tokens and reading the prompt. ``first_token`` is the sum of these, the time
    from the question to the first token. ``decode``: all tokens after the first.
    """

    encode: float
    retrieve: float
    prefill: float
    decode: float
    first_token: float


@dataclass(frozen=True)
class Answer:
    """An answer, what it rests on and what it took."""

    text: str
    memories: tuple[Hit, ...]  # nearest first
    timings: Timings
    tokens: int  # number of tokens in the answer
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]  # the model ended, or max_tokens did
    runs: int = 0  # of the language model after the prompt
    reused: int = 0  # prompt tokens not read anew: the last prompt began with them


class AnswerStream(Iterator[str]):
    """Pieces of an answer as they come; ``answer`` holds the whole one after the last piece."""

    def __init__(self, pieces: Generator[str, None, Answer]) -> None:
        self._pieces = pieces
        self._answer: Answer | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self._answer = end.value
            raise StopIteration from None

    @property
    def answer(self) -> Answer:
        """The whole answer; reads what is left of the stream first."""
        for _ in self:
            pass
        if self._answer is None:
            raise RuntimeError("the stream was closed before its end")
        return self._answer

    def close(self) -> None:
        """Stop answering."""
        self._pieces.close()
