"""Decoding: from the first token of an answer to its end, several tokens a run where it can be.

Answers repeat memories. So while an answer says what a memory says, the rest of that sentence is a
*draft*: one run of the language model reads all of it, which costs little more than one token, and
gives the model's own choice after each. Tokens are kept as long as the draft agrees with these
choices, so the answer is the one that decoding token by token gives (lossless speculative decoding,
arXiv 2211.17192, with n-gram lookup for the draft). With sampling every choice is drawn from the
model's own distribution as well, so that the distribution stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tinyalign.runtime.lm import Floats, LanguageModel, LmState

LONGEST_MATCH = 3  # tokens of the answer that are looked up
FIRST_DRAFT = 8  # tokens; doubled when all of a draft was right, cut when it was not
LONGEST_DRAFT = 15  # one run of 16 tokens costs twice a single step

Choose = Callable[[Floats, Sequence[int]], int]  # logits [V] after an answer so far -> next token


def draft(answer: Sequence[int], sentences: Sequence[Sequence[int]]) -> Sequence[int]:
    """What follows the longest run of the answer's last tokens that stands in a sentence.

    Of several places the first counts (the nearest memory's); () where there is none.
    """
    for length in range(min(LONGEST_MATCH, len(answer)), 0, -1):
        last = tuple(answer[len(answer) - length :])
        for sentence in sentences:
            for start in range(len(sentence) - length):
                if tuple(sentence[start : start + length]) == last:
                    return sentence[start + length :]
    return ()


def continue_answer(
    lm: LanguageModel,
    state: LmState,
    embeddings: NDArray[np.float16],
    token: int,
    choose: Choose,
    stop: frozenset[int],
    limit: int,
    sentences: Sequence[Sequence[int]] = (),
) -> Iterator[list[int]]:
    """The tokens after an answer's first one, as many at once as a run of the model gave.

    Args:
        state: has read the prompt and has room for ``limit`` tokens more.
        embeddings: [V, D].
        token: the answer's first one.
        choose: picks a token.
        stop: ends the answer and is given too, as the last one.
        limit: tokens of the answer at most, the first one counted.
        sentences: what the answer may repeat; none: one token a run.
    """
    answer = [token]
    longest = FIRST_DRAFT
    while answer[-1] not in stop and len(answer) < limit:
        room = min(longest, limit - len(answer) - 1)
        guess = draft(answer, sentences)[:room]
        rows = embeddings[[answer[-1], *guess]].astype(np.float32)  # [1 + G, D]
        logits = lm.forward(state, rows, tuple(range(len(rows))))  # [1 + G, V]
        new: list[int] = []
        for place, row in enumerate(logits):
            new.append(choose(row, answer))
            answer.append(new[-1])
            if new[-1] in stop or place == len(guess) or new[-1] != guess[place]:
                break
        right = len(new) - 1  # tokens of the draft that the model chose too
        state.length -= len(guess) - right  # the others were never said
        if guess:
            longest = min(LONGEST_DRAFT, 2 * longest) if right == len(guess) else right + 1
        yield new
