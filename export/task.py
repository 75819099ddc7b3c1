"""A set of questions whose answers are known, to measure accuracy on a user's own task.

Every line of the file is ``{"image": path, "question": text, "answer": text}``; paths are looked
for beside the file. An answer is right if it holds the expected words in one piece, whatever the
case and the punctuation; one that is to be yes or no must begin with that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyalign.runtime import TinyAlign
from tinyalign.runtime.errors import InputError
from tinyalign.runtime.images import load_for
from tinyalign.runtime.items import json_lines
from tinyalign.runtime.manifest import ImageSpec
from tinyalign.training.questions import NUMBERS

NAMES = {"image", "question", "answer"}


@dataclass(frozen=True)
class Task:
    """A question with its expected answer."""

    picture: Path
    question: str
    answer: str


def read_tasks(path: Path) -> list[Task]:
    """The lines of a file; InputError names the line that is something else, or the picture that
    cannot be read."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"cannot read {path}: {reason}") from None
    tasks = []
    for place, data in json_lines(text, str(path)):
        if not isinstance(data, dict) or set(data) != NAMES:
            raise InputError(f'{place}: this is not {{"image": .., "question": .., "answer": ..}}')
        if not all(isinstance(value, str) and value.strip() for value in data.values()):
            raise InputError(f"{place}: image, question and answer must be texts, not empty")
        task = Task(path.parent / data["image"], data["question"], data["answer"])
        try:
            load_for(task.picture, ImageSpec())
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        tasks.append(task)
    if not tasks:
        raise InputError(f"{path} holds no questions")
    return tasks


def accuracy(model: TinyAlign, tasks: Sequence[Task]) -> float:
    """The share of right answers."""
    right = [is_right(t.answer, model.ask(t.picture, t.question).text) for t in tasks]
    return sum(right) / len(right)


def is_right(expected: str, told: str) -> bool:
    """Whether an answer holds the expected words; numbers up to six may be digits or words."""
    wanted, given = spoken(expected), spoken(told)
    if wanted in ("yes", "no"):
        return f"{given} ".startswith(f"{wanted} ")
    return f" {wanted} " in f" {given} "


def spoken(text: str) -> str:
    """Lower case, words parted by one space, no punctuation but hyphens, small numbers as words."""
    words = re.sub(r"[^\w -]+", " ", text.lower()).split()
    known = {str(number): word for number, word in enumerate(NUMBERS) if number}
    return " ".join(known.get(word, word) for word in words)
