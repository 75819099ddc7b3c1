"""Drafts: fewer runs of the language model, never another answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_model import picture

from tinyalign.runtime import TinyAlign
from tinyalign.runtime.decode import LONGEST_DRAFT, continue_answer, draft
from tinyalign.runtime.lm import LmState

VOCAB, STOP = 50, 0
TABLE = np.arange(VOCAB, dtype=np.float16)[:, None]  # a token's embedding is its id


class Reciting:
    """A language model that says a fixed answer, whatever it reads; it notes what it is shown."""

    def __init__(self, says: Sequence[int]) -> None:
        self.says = says
        self.runs: list[list[int]] = []

    def forward(self, state: LmState, embeddings: np.ndarray, rows: tuple[int, ...]) -> np.ndarray:
        ids = embeddings[:, 0].astype(int).tolist()
        known = self.says[: state.length]
        assert known + ids[:1] == self.says[: state.length + 1]  # nothing unsaid is kept
        self.runs.append(ids)
        logits = np.zeros((len(rows), VOCAB), np.float32)
        for place in range(len(rows)):
            at = state.length + place + 1
            logits[place, self.says[at] if at < len(self.says) else STOP] = 1
        state.length += len(ids)
        return logits


def recite(
    says: list[int],
    sentences: Sequence[Sequence[int]] | None,
    limit: int = 99,
    likely: np.ndarray | None = None,
) -> tuple[list[int], Reciting, LmState]:
    lm, state = Reciting(says), LmState(999, {}, *np.zeros((2, 999, 1), np.float32))
    batches = continue_answer(
        lm, state, TABLE, says[0], lambda row, _: int(row.argmax()), frozenset({STOP}), limit,
        sentences, likely,
    )  # type: ignore[arg-type]  # fmt: skip
    return [says[0], *(token for batch in batches for token in batch)], lm, state


def test_a_draft_is_what_follows_the_longest_match() -> None:
    sentences = [(1, 2, 3, 4), (7, 2, 3, 5), (3, 9)]
    assert tuple(draft([8, 7, 2, 3], sentences)) == (5,)
    assert tuple(draft([2, 3], sentences)) == (4,)  # the first of two
    assert tuple(draft([3], sentences)) == (4,)
    assert tuple(draft([4], sentences)) == () == tuple(draft([6], sentences))
    assert tuple(draft([6], [])) == ()


def test_a_memory_that_is_repeated_takes_one_run() -> None:
    says = [5, 6, 7, 8, 9, STOP]
    told, lm, state = recite(says, [(5, 6, 7, 8, 9, STOP)])
    assert told == says and len(lm.runs) == 1
    assert state.length == len(says) - 1  # all but the stop


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 99])
def test_any_draft_gives_the_same_answer(limit: int) -> None:
    rng = np.random.default_rng(limit)
    for _ in range(200):
        says = [*rng.integers(1, 6, size=rng.integers(1, 30)).tolist(), STOP]
        sentences = [tuple(rng.integers(0, 6, size=rng.integers(0, 9)).tolist()) for _ in range(4)]
        told, lm, state = recite(says, sentences, limit)
        assert told == recite(says, None, limit)[0] == says[:limit]
        assert len(lm.runs) <= len(told) - 1
        assert all(2 <= len(run) <= 1 + LONGEST_DRAFT for run in lm.runs)
        assert state.length <= len(told)


def test_wrong_drafts_become_short() -> None:
    wrong = [(n, *range(40, 48)) for n in range(1, 30)]  # always agrees, then never
    _, lm, _ = recite([*range(1, 30), STOP], wrong)
    assert [len(run) for run in lm.runs[:5]] == [9, 5, 3, 2, 2]


def test_an_answer_may_repeat_itself() -> None:
    says = [5, 6, 7, 8, 5, 6, 7, 8, STOP]
    told, lm, _ = recite(says, [])
    assert told == says and lm.runs[4] == [5, 6, 7, 8, 5]  # what stood after the first 5


@pytest.mark.parametrize("right", [True, False])
def test_without_a_draft_the_likeliest_next_token_is_guessed(right: bool) -> None:
    says = [*range(1, 30), STOP]
    likely = np.array([(n + right) % VOCAB for n in range(VOCAB)], np.uint32)
    told, lm, _ = recite(says, [], likely=likely)
    assert told == says and all(len(run) == 2 for run in lm.runs)
    assert len(lm.runs) == (15 if right else 29)


def test_tiny_answers_do_not_depend_on_drafts(tiny: Path) -> None:
    with TinyAlign.load(tiny, threads=2) as model:
        for seed in range(12):
            options = {"temperature": 0.0 if seed < 4 else 1.5, "seed": seed, "max_tokens": 40}
            fast = model.ask(picture(seed), "what is it?", **options)
            slow = model.ask(picture(seed), "what is it?", drafts=False, **options)
            assert fast.token_ids == slow.token_ids and fast.text == slow.text
            assert max(fast.runs, slow.runs) <= slow.tokens


def test_what_was_read_before_is_not_read_again(tiny: Path) -> None:
    """And never changes an answer, whatever was asked in between."""
    questions = ["what is it?", "what is it for?", "who?", "what is it?"]
    with TinyAlign.load(tiny, threads=2) as model:
        told = [
            model.ask(picture(seed % 2), questions[seed % 4], memory=seed % 3 > 0, max_tokens=20)
            for seed in range(12)
        ]
        again = model.ask(picture(1), questions[3], max_tokens=20)
        twice = model.ask(picture(1), questions[3], max_tokens=20)
    assert told[0].reused == 0 and sum(answer.reused > 0 for answer in told) > 8
    assert twice.reused == twice.prompt_tokens - 2 and twice.token_ids == again.token_ids
    for seed, answer in enumerate(told):
        with TinyAlign.load(tiny, threads=2) as fresh:
            alone = fresh.ask(
                picture(seed % 2), questions[seed % 4], memory=seed % 3 > 0, max_tokens=20
            )
        assert alone.token_ids == answer.token_ids and alone.reused == 0


def test_a_stream_that_was_left_does_no_harm(tiny: Path) -> None:
    with TinyAlign.load(tiny, threads=2) as model:
        whole = model.ask(picture(0), "what is it?", max_tokens=20)
        stream = model.stream(picture(1), "who?", max_tokens=20)
        next(stream)
        assert model.ask(picture(0), "what is it?", max_tokens=20).token_ids == whole.token_ids
        stream.close()
        assert model.ask(picture(0), "what is it?", max_tokens=20).token_ids == whole.token_ids
