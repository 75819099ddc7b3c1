"""How well one example teaches a thing, with no training, on real pictures.

    python benchmarks/teach.py [--model DIR] [--n 150] [--distractors 0,default,10000,30000,100000]
                               [--memory-mode latent|text|both|all] [--plot docs/teach.png]

N things that training never saw (held-out emoji, clip art and furniture renders) get one memory
each: a picture and a text with an invented name and one, two or three facts. Every second text has
one fact of a kind that training never saw. Then another view of each thing is asked about: what it
is, every fact, and one fact that nobody told ("I do not know." is right). An answer is right if it
holds the name or the fact as words; one about a fact must not tell another. The same is asked
before teaching, and with more and more other memories in the bank:

    0        only the taught things
    default  and the memories of the model's own bank
    10000    and so many altogether: real training pictures first, 11,862 of them, then made-up
             features (see `distractors.py`); the results say how many of each

All memories are in one bank file and are searched as in the product, by the graph where the bank is
large. What a memory costs in language model tokens includes its heading in the prompt. Times to the
first token are for a picture that is encoded already. "Copy of the nearest memory" is right when
the nearest memory's text holds the wanted words. Intervals are 95 % (Wilson).

"Elsewhere" are questions that have nothing to do with what was taught: names of 20 photographs,
easy-vqa's test questions, and scenes; before teaching and after.

Every finished condition is kept in the results file; a second run goes on where the first ended.
Conditions are the same when model, N, questions and memory mode are. Needs the feature cache of
`tinyalign-train --until prepare`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from common import blank, interval, is_right, look_questions, note, says, seen
from distractors import distractors
from numpy.typing import NDArray
from teach_lessons import SEED, Lesson, ask_lessons, lessons_of
from teach_report import plot, report, summary, title

from tinyalign.bank import InputError, TinyAlignError
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.teach import create_bank
from tinyalign.training.features import Record, load_features
from tinyalign.training.views import rng_of

ROOT = Path(__file__).parents[1]
ELSEWHERE = 40  # questions of each type and source
BATCH = 256  # memories added at once

# ---- the bank


class Growing:
    """A bank with the taught things that gets more and more other memories.

    ``sorts`` counts those by sort (see ``distractors``), ``rivals`` those that were given an
    invented name and facts.
    """

    def __init__(
        self,
        model: TinyAlign,
        path: Path,
        cells: NDArray[np.float16],
        records: Sequence[Record],
        lessons: Sequence[Lesson],
    ) -> None:
        self.model = model
        self.bank = create_bank(model, path)
        self.sorts: Counter[str] = Counter()
        self.rivals = 0
        self._taught = len(lessons)
        self._like = blank(model)  # memories need only its cells, which are replaced
        self._remember(
            (cells[lesson.remembered].astype(np.float32), lesson.text) for lesson in lessons
        )
        self._more = distractors(cells, records, {lesson.name for lesson in lessons}, SEED)

    def grow(self, count: int | Literal["default"]) -> int:
        """Add other memories up to a number; returns how many there are."""
        if count and not self.others:
            self.sorts["default bank"] = self.bank.merge(self.model.banks[0])
        while count != "default" and self.others < count:
            if self.others // 5000 != (self.others - BATCH) // 5000:
                note(f"adding memories: {self.others:,} of {count:,}")
            batch = list(islice(self._more, min(BATCH, count - self.others)))
            self._remember((d.cells, d.text) for d in batch)
            self.sorts.update(d.sort for d in batch)
            self.rivals += sum(d.rival for d in batch)
        self.bank.search(np.eye(1, self.bank.key_width, dtype=np.float32)[0])  # makes the graph
        return self.others

    @property
    def others(self) -> int:
        """The number of memories that are not the taught ones."""
        return len(self.bank) - self._taught

    def _remember(self, pairs: Iterable[tuple[NDArray[np.float32], str]]) -> None:
        """Add cells and texts. There are no pixels to tell two pictures apart by: the key does."""
        memories = (
            self.model.memory(replace(self._like, cells=cells), text) for cells, text in pairs
        )
        self.bank.add(replace(memory, content_hash="") for memory in memories)


# ---- questions that have nothing to do with what was taught


def ask_elsewhere(
    before: TinyAlign,
    after: TinyAlign,
    lessons: Sequence[Lesson],
    cells: NDArray[np.float16],
    records: Sequence[Record],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Questions on photographs, shapes and scenes that show none of the taught things."""
    taught = {lesson.id for lesson in lessons}

    def unrelated(record: Record) -> bool:
        shown = {record.id, *record.pictures}
        return record.source in ("easy_vqa", "composites", "emoji") and not shown & taught

    questions = look_questions(records, ELSEWHERE, rng_of(f"elsewhere/{SEED}"), unrelated)
    groups: dict[str, list[tuple[bool, bool, bool]]] = defaultdict(list)  # equal, before, after
    like = blank(before)

    def ask(row: int, question: str) -> list[str]:
        picture = seen(before, like, cells[row])
        return [
            model.ask(picture, question, max_tokens=32, **options).text for model in (before, after)
        ]

    for row, record in enumerate(records):
        if record.source == "photos" and record.view == 0:
            one, two = ask(row, "What is this?")
            result = (one == two, says(one, record.name), says(two, record.name))
            groups["photographs, name"].append(result)
    for group, asked in questions.items():
        note(f"  elsewhere: {group}")
        for row, item in asked:
            one, two = ask(row, item.question)
            groups[group].append((one == two, is_right(item, one), is_right(item, two)))
    groups["all"] = [result for results in groups.values() for result in results]
    return {
        group: {
            how: interval(values)
            for how, values in zip(
                ("equal", "before", "after"), zip(*results, strict=True), strict=True
            )
        }
        for group, results in groups.items()
    }


# ---- all conditions


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is not in the results file yet; returns the runs, one a memory mode."""
    model = TinyAlign.load(options.model)
    cells, records = load_features()
    lessons = lessons_of(model.parts.tokenizer, records, options.n)
    own = sum(len(bank) for bank in model.banks)
    for number in options.distractors:
        if isinstance(number, int) and 0 < number <= own:
            raise InputError(f"the default bank has {own} memories: {number} others are too few")
    results = read_results(options.results)
    runs = [results.setdefault(*new_run(model, lessons, mode)) for mode in options.modes]
    conditions = sorted(options.distractors, key=lambda c: own if c == "default" else c)

    def keep(run: dict[str, Any], name: str, result: dict[str, Any]) -> None:
        run["conditions"][name] = result
        temporary = options.results.with_suffix(".part")
        temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        temporary.replace(options.results)

    for run in runs:
        if "before" not in run["conditions"]:
            note(f"{title(run)}: before")
            outcomes = ask_lessons(model, lessons, cells, ask_options(run), short=True)
            keep(run, "before", {"memories": own, **summary(outcomes)})
    todo = [c for c in conditions if any(missing(run, c) for run in runs)]
    with tempfile.TemporaryDirectory() as folder:
        growing = Growing(model, Path(folder) / "taught.sqlite", cells, records, lessons)
        with growing.bank:
            for condition in todo:
                others = growing.grow(condition)
                after = TinyAlign(model.parts, (growing.bank,))
                beside = {"memories": others, "of these": dict(growing.sorts)}
                beside["rivals"] = growing.rivals
                for run in runs:
                    if str(condition) not in run["conditions"]:
                        note(f"{title(run)}: {others:,} other memories")
                        outcomes = ask_lessons(after, lessons, cells, ask_options(run))
                        keep(run, str(condition), {**beside, **summary(outcomes)})
                    if condition == "default" and "elsewhere" not in run["conditions"]:
                        note(f"{title(run)}: elsewhere")
                        found = ask_elsewhere(
                            model, after, lessons, cells, records, ask_options(run)
                        )
                        keep(run, "elsewhere", found)
    for run in runs:
        wanted = ["before", *map(str, conditions), "elsewhere"]
        run["conditions"] = {c: run["conditions"][c] for c in wanted if c in run["conditions"]}
    model.close()
    return runs


def read_results(path: Path) -> dict[str, Any]:
    """The results file's runs; its folder is made, so that nothing is measured in vain."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        raise InputError(f"{path} is not JSON: move it away or name another (--results)") from None


def new_run(
    model: TinyAlign, lessons: Sequence[Lesson], mode: str | None
) -> tuple[str, dict[str, Any]]:
    """What a run is kept under, and a run without conditions."""
    manifest = model.parts.manifest
    made = hashlib.sha256(manifest.to_json().encode()).hexdigest()[:12]
    asked = hashlib.sha256(repr([asdict(lesson) for lesson in lessons]).encode()).hexdigest()[:12]
    run = {"model": made, "name": manifest.name, "lessons": asked, "n": len(lessons),
           "mode": mode, "conditions": {}}  # fmt: skip
    return f"{made} n={len(lessons)} {asked} {mode or 'as the model says'}", run


def missing(run: dict[str, Any], condition: str | int) -> bool:
    """Whether something of a condition is still to be asked."""
    wanted = {str(condition), *(["elsewhere"] if condition == "default" else [])}
    return not wanted <= run["conditions"].keys()


def ask_options(run: dict[str, Any]) -> dict[str, Any]:
    """What `ask` is given beside picture and question."""
    return {"memory_mode": run["mode"]} if run["mode"] else {}


# ---- the command line


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", type=Path, metavar="DIR", help="default: the default model")
    p.add_argument("--n", type=positive, default=150, help="things to teach (default 150)")
    p.add_argument("--distractors", type=conditions_of, metavar="LIST",
                   default="0,default,10000,30000,100000",
                   help="numbers of other memories (default %(default)s)")  # fmt: skip
    p.add_argument("--memory-mode", choices=("latent", "text", "both", "all"),
                   help="as what memories are read (default: as the model says)")  # fmt: skip
    p.add_argument("--results", type=Path, metavar="FILE", help="default: %(default)s",
                   default=ROOT / "benchmarks" / "results" / "teach.json")  # fmt: skip
    p.add_argument("--plot", type=Path, metavar="FILE", help="also draw a picture (PNG)")
    p.add_argument("--json", action="store_true", help="print everything as JSON, not a table")
    return p


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def conditions_of(text: str) -> list[str | int]:
    """Numbers and "default"."""
    words = text.split(",")
    if not all(word == "default" or word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}: not numbers or 'default', parted by commas")
    return [word if word == "default" else int(word) for word in dict.fromkeys(words)]


def main() -> int:
    """Measure what is missing, print tables or JSON, draw the picture."""
    options = parser().parse_args()
    every = options.memory_mode == "all"
    options.modes = ("latent", "text", "both") if every else (options.memory_mode,)
    try:
        runs = measure(options)
    except TinyAlignError as error:
        note(f"teach.py: {error}")
        return 2
    except KeyboardInterrupt:
        note("stopped; the conditions that were finished are kept")
        return 130
    if options.json:
        print(json.dumps(runs, indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(map(report, runs)))
    if options.plot:
        plot(runs, options.plot)
        note(f"drawn: {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
