"""What `teach.py` teaches and asks, and what makes an answer right or wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import numpy as np
from common import blank, note, says, seen, words_of
from distractors import draw_facts, told, views_by_id
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tinyalign.runtime import Answer, EncodedPicture, TinyAlign
from tinyalign.runtime.prompt import encode_question, encode_text, similarity_word
from tinyalign.training.episodes import NAME_QUESTIONS, UNKNOWN
from tinyalign.training.facts import ATTRIBUTES, UNSEEN_ATTRIBUTES, invented_name
from tinyalign.training.features import Record
from tinyalign.training.views import rng_of
from tinyalign.training.world import SHOWN

SEED = 5
LONGEST = 48  # tokens of a taught text
Kind = Literal["name", "fact", "unseen", "untold"]  # unseen: of a kind that training never saw
UNSEEN = {attribute.name for attribute in UNSEEN_ATTRIBUTES}
FILLERS = frozenset("a an are by for in is it its of on picture shows the there these this to was "
                    "what who you can see".split())  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question about a taught thing, and the words its answer must hold."""

    kind: Kind
    asked: str
    wanted: str


@dataclass(frozen=True)
class Lesson:
    """A thing that is taught: the view that is remembered, the view that is asked about, the text
    with its length in tokens, the values of its facts, and the questions."""

    id: str
    remembered: int
    shown: int
    name: str
    text: str
    tokens: int
    values: tuple[str, ...]
    questions: tuple[Question, ...]


def lessons_of(tokenizer: Tokenizer, records: Sequence[Record], n: int) -> list[Lesson]:
    """The same for every condition; fewer things are the first of more."""
    views = {
        id: rows
        for id, rows in views_by_id(records).items()
        if len(rows) > 1 and records[rows[0]].split == "held" and records[rows[0]].source in SHOWN
    }
    ids = sorted(views)
    rng_of(f"teach/{SEED}").shuffle(ids)
    return [lesson(tokenizer, id, views[id], number) for number, id in enumerate(ids[:n])]


def lesson(tokenizer: Tokenizer, id: str, rows: Sequence[int], number: int) -> Lesson:
    """An invented name, 1 + number % 3 facts, and what is asked."""
    rng = rng_of(f"teach/{SEED}/{id}")
    while True:
        name = invented_name(rng)
        facts = draw_facts(rng, 1 + number % 3, unseen=number // 3 % 2 == 1)
        text = told(name, facts)
        tokens = len(encode_text(tokenizer, text))
        if tokens <= LONGEST:
            break
    known = {fact.attribute for fact in facts}
    if known & {"room", "storage"}:  # either answers the other's questions
        known |= {"room", "storage"}
    missing = rng.choice([kind for kind in ATTRIBUTES if kind.name not in known])
    questions = [Question("name", rng.choice(NAME_QUESTIONS), name)]
    for fact in facts:
        kind: Kind = "unseen" if fact.attribute in UNSEEN else "fact"
        questions.append(Question(kind, fact.ask, fact.value))
    questions.append(Question("untold", rng.choice(missing.asks), UNKNOWN))
    values = tuple(fact.value for fact in facts)
    return Lesson(id, rows[0], rows[1], name, text, tokens, values, tuple(questions))


# ---- asking


@dataclass(frozen=True)
class Outcome:
    """One question with its answer, and what the answer rests on."""

    lesson: Lesson
    question: Question
    answer: str
    right: bool
    rank: int  # of the taught memory among those retrieved, 0 if it is not among them
    score: float
    word: str  # how similar the prompt says it is
    memories: int  # retrieved
    memory_tokens: int  # of the prompt
    prompt_tokens: int
    copied: bool  # whether the nearest memory's text holds what is wanted
    retrieve_ms: float
    first_token_ms: float
    cause: str  # of a wrong answer


def ask_lessons(
    model: TinyAlign,
    lessons: Sequence[Lesson],
    cells: NDArray[np.float16],
    options: dict[str, Any],
    short: bool = False,
) -> list[Outcome]:
    """Ask about every lesson, or (short) only for the name and one fact."""
    like = blank(model)
    plain = prompt_without_memory(model, like)
    total = sum(len(lesson.questions[: 2 if short else None]) for lesson in lessons)
    started, outcomes = time.monotonic(), []
    for lesson in lessons:
        picture = seen(model, like, cells[lesson.shown])
        for question in lesson.questions[: 2 if short else None]:
            answer = model.ask(picture, question.asked, max_tokens=32, **options)
            outcomes.append(judge(model, picture, lesson, question, answer, plain))
            left = (time.monotonic() - started) / len(outcomes) * (total - len(outcomes))
            if len(outcomes) % 50 == 0 or len(outcomes) == total:
                note(f"  {len(outcomes)} of {total} answers, {left:.0f} s left")
    return outcomes


def prompt_without_memory(model: TinyAlign, picture: EncodedPicture) -> int:
    """Tokens of a prompt without memories and question."""
    question = "What is this?"
    answer = model.ask(picture, question, memory=False, max_tokens=1)
    return answer.prompt_tokens - len(encode_question(model.parts.tokenizer, question))


def judge(
    model: TinyAlign,
    picture: EncodedPicture,
    lesson: Lesson,
    question: Question,
    answer: Answer,
    plain: int,
) -> Outcome:
    """Compare an answer with what was wanted."""
    hits = answer.memories
    own = next((hit for hit in hits if hit.text == lesson.text), None)
    right = is_right_answer(lesson, question, answer.text)
    asked = len(encode_question(model.parts.tokenizer, question.asked))
    word = similarity_word(model.parts.manifest.prompt, own.score) if own else None
    cause = ""
    if not right:
        others = [hit.text for hit in hits if hit.text != lesson.text]
        cause = why(model, picture, lesson, question, answer.text, own is not None, others)
    return Outcome(
        lesson=lesson,
        question=question,
        answer=answer.text,
        right=right,
        rank=1 + hits.index(own) if own else 0,
        score=own.score if own else -1.0,
        word=word or "",
        memories=len(hits),
        memory_tokens=answer.prompt_tokens - plain - asked,
        prompt_tokens=answer.prompt_tokens,
        copied=bool(hits) and says(hits[0].text, question.wanted),
        retrieve_ms=answer.timings.retrieve,
        first_token_ms=answer.timings.first_token,
        cause=cause,
    )


def is_right_answer(lesson: Lesson, question: Question, answer: str) -> bool:
    """Whether an answer says what was asked for and, of a fact, no other one."""
    if question.kind == "untold":
        return answer == UNKNOWN
    extra = question.kind != "name" and tells_another(lesson, question, answer)
    return says(answer, question.wanted) and not extra


def tells_another(lesson: Lesson, question: Question, answer: str) -> bool:
    """Whether an answer tells a fact of the lesson that was not asked for."""
    others = (value for value in lesson.values if not says(question.wanted, value))
    return any(says(answer, value) for value in others)


def why(
    model: TinyAlign,
    picture: EncodedPicture,
    lesson: Lesson,
    question: Question,
    answer: str,
    found: bool,
    others: Sequence[str],
) -> str:
    """Where a wrong answer comes from, as well as words can tell."""
    if not found and question.kind != "untold":
        return "not retrieved"
    if answer == UNKNOWN:
        return "“I do not know.”"
    if tells_another(lesson, question, answer):
        return "another fact of the same memory"
    if question.kind != "name" and says(answer, lesson.name):
        return "the name of the thing"
    dull = FILLERS.union(words_of(f"{question.asked} {question.wanted}").split())
    new = [word for word in words_of(answer).split() if word not in dull]
    if new and any(set(new) <= set(words_of(text).split()) for text in others):
        return "from another memory"
    unaided = model.ask(picture, question.asked, memory=False, max_tokens=32).text
    if question.kind == "name" and answer == unaided:
        return "what the picture looks like"
    if SequenceMatcher(None, " ".join(new), question.wanted.lower()).ratio() > 0.5:
        return "wrong letters"
    return "something else" if question.kind == "name" else "invented"
