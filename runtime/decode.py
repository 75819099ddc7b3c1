"""Decoding: from the first token of an answer to its end, several tokens a run where it can be.

Much of an answer can be guessed: it repeats a memory, names what the image tokens read as, or says
what answers often say. So after each token the *draft* is what followed it in one of these texts.
One run of the language model reads all of it, which costs much less than as many runs, and gives
the model's own choice after each token. Where nothing was said before that could be repeated, the
guess is the token that most often follows the last one (`next_tokens.bin`).

Tokens are kept as long as the draft agrees with these choices, so the answer is the one that
decoding token by token gives (lossless speculative decoding, arXiv 2211.17192, with n-gram lookup
for the draft). With sampling every choice is drawn from the model's own distribution as well, so
that the distribution stays the same.

Every run reads two tokens or more. ONNX Runtime has kernels of their own for a single row, whose
rounding differs (by up to 0.8 in a logit of the int8 graph); from two rows on results are the same
to the last bit, however many are read at once. So drafts, prompts read in parts, and what was
cached can never change an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tinyalign.runtime.lm import Floats, LanguageModel, LmState
from tinyalign.runtime.memory_text import continuations

LONGEST_MATCH = 3  # tokens of the answer that are looked up
FIRST_DRAFT = 8  # tokens; doubled when all of a draft was right, halved when it was not
LONGEST_DRAFT = 15

Choose = Callable[[Floats, Sequence[int]], int]  # logits [V] after an answer so far -> next token


def draft(answer: Sequence[int], sentences: Sequence[Sequence[int]]) -> Sequence[int]:
    """What follows the longest run of the answer's last tokens that stands in a sentence.

    Of several places the first counts; () where there is none.
    """
    _, found = continuations(answer, sentences, LONGEST_MATCH)
    return found[0] if found else ()


def continue_answer(
    lm: LanguageModel,
    state: LmState,
    embeddings: NDArray[np.float16],
    token: int,
    choose: Choose,
    stop: frozenset[int],
    limit: int,
    sentences: Sequence[Sequence[int]] | None = None,
    likely: NDArray[np.uint32] | None = None,
) -> Iterator[list[int]]:
    """The tokens after an answer's first one, as many at once as a run of the model gave.

    Args:
        state: has read the prompt and has room for ``limit`` + 1 tokens more.
        embeddings: [V, D].
        token: the answer's first one.
        choose: picks a token.
        stop: ends the answer and is given too, as the last one.
        limit: tokens of the answer at most, the first one counted.
        sentences: what the answer may repeat beside itself, likeliest first; None for no drafts.
        likely: what most often follows each token, [V].
    """
    answer = [token]
    longest = FIRST_DRAFT
    while answer[-1] not in stop and len(answer) < limit:
        room = max(1, min(longest, limit - len(answer) - 1))
        guess: Sequence[int] = ()
        if sentences is not None:
            guess = draft(answer, [*sentences, answer])[:room]
        if not guess:
            guess = answer[-1:] if likely is None else [int(likely[answer[-1]])]
        rows = embeddings[[answer[-1], *guess]].astype(np.float32)  # [1 + G, D]
        logits = lm.forward(state, rows, tuple(range(len(rows))))  # [1 + G, V]
        new: list[int] = []
        for place, row in enumerate(logits):
            new.append(choose(row, answer))
            answer.append(new[-1])
            if new[-1] in stop or len(answer) == limit:
                break
            if place == len(guess) or new[-1] != guess[place]:
                break
        right = len(new) - 1  # tokens of the draft that the model chose too
        state.length -= len(guess) - right  # the others were never said
        if len(guess) > 1:
            whole = right == len(guess)
            longest = min(LONGEST_DRAFT, 2 * longest) if whole else max(right + 1, longest // 2)
        yield new
