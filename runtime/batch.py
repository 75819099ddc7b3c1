"""Many questions from a file: ``tinyalign-infer --jsonl in.jsonl --output out.jsonl``.

Every line of the input is ``{"image": path, "question": text}``; paths are looked for beside the
file. Every line of the output says the same with the answer, in the order of the input, or with an
``error`` where a picture cannot be read or a question not be asked. A run that was interrupted goes
on behind the last whole line of its output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyalign.runtime.errors import InputError
from tinyalign.runtime.images import load_for
from tinyalign.runtime.items import json_lines
from tinyalign.runtime.model import TinyAlign

AT_ONCE = 16  # pictures that are encoded together
NAMES = {"image", "question"}


@dataclass(frozen=True)
class Asked:
    """One line of the input."""

    image: str  # as the file has it
    path: Path
    question: str


def read_questions(path: Path) -> list[Asked]:
    """The lines of a file of questions; InputError names the line that is something else."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"cannot read {path}: {reason}") from None
    asked = []
    for place, data in json_lines(text, str(path)):
        if not isinstance(data, dict) or set(data) != NAMES:
            raise InputError(f'{place}: this is not {{"image": path, "question": text}}')
        if not all(isinstance(value, str) and value.strip() for value in data.values()):
            raise InputError(f"{place}: image and question must be texts that are not empty")
        asked.append(Asked(data["image"], path.parent / data["image"], data["question"]))
    if not asked:
        raise InputError(f"{path} holds no questions")
    return asked


def answered(path: Path, asked: Sequence[Asked]) -> int:
    """How many of the first questions an output file has answers to; a half-written line is cut.

    Raises InputError when it holds answers to others.
    """
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.decode("utf-8", "replace").split("\n")[:-1]
    for number, line in enumerate(lines):
        try:
            told = json.loads(line)
            same = (told["image"], told["question"]) == (
                asked[number].image,
                asked[number].question,
            )
        except (ValueError, TypeError, KeyError, IndexError):
            same = False
        if not same:
            raise InputError(
                f"{path}, line {number + 1}: this answers another question; "
                "continue with the same --jsonl, or choose another --output"
            )
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return len(lines)


def answer_all(
    model: TinyAlign,
    asked: Sequence[Asked],
    options: dict[str, Any],
    summary: Callable[[Any], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """An output object for every question, in order; pictures are encoded in batches."""
    for start in range(0, len(asked), AT_ONCE):
        part = asked[start : start + AT_ONCE]
        pictures: dict[Path, Any] = {}  # what could be read
        errors: dict[Path, str] = {}
        for path in dict.fromkeys(item.path for item in part):
            try:
                pictures[path] = load_for(path, model.parts.manifest.image)
            except InputError as error:
                errors[path] = str(error)
        encoded = dict(zip(pictures, model.encode_many(list(pictures.values())), strict=True))
        for item in part:
            line = {"image": item.image, "question": item.question}
            try:
                if item.path in errors:
                    raise InputError(errors[item.path])
                answer = model.ask(encoded[item.path], item.question, **options)
                yield line | summary(answer)
            except InputError as error:
                yield line | {"error": str(error)}


def answer_file(
    model: TinyAlign,
    asked: Sequence[Asked],
    output: Path | None,
    options: dict[str, Any],
    summary: Callable[[Any], dict[str, Any]],
) -> int:
    """Answer what is not answered yet, onto stdout or the end of a file; progress on stderr.

    Returns the number of questions that could not be answered.
    """
    done = answered(output, asked) if output else 0
    if done:
        _note(f"{done} of {len(asked)} were answered before")
    failed, started, shown = 0, time.monotonic(), 0.0
    stream = output.open("a", encoding="utf-8") if output else sys.stdout
    try:
        for number, line in enumerate(answer_all(model, asked[done:], options, summary), 1):
            failed += "error" in line
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            now = time.monotonic()
            last = done + number == len(asked)
            if now - shown > 2 or last:
                shown = now
                speed = number / (now - started)
                left = (len(asked) - done - number) / speed
                _note(f"{done + number} of {len(asked)}, {speed:.1f} a second, {left:.0f} s left")
    finally:
        if output:
            stream.close()
    return failed


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
