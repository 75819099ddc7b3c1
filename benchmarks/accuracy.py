"""How often the default model is right, on what it never saw: photographs, shapes, taught things.

    python benchmarks/accuracy.py [--model DIR] [--json [--answers]]

photos   20 labelled ImageNet photographs (from PyPI's foolbox): the encoder's own top-1 is the
bound looks    held-out scenes and easy-vqa's test pictures: colour, count, position, yes/no, shape
teach    unseen cut-outs, one example each under an invented name with an invented fact beside the
         default bank; another view of the picture is asked about. "kNN copy" answers with the text
         of the nearest memory, and the bound is how often the taught memory is among those
         retrieved.

Nothing asked here was trained on or is in the default bank. Needs the feature cache of
`tinyalign-train --until prepare`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tinyalign.runtime import EncodedPicture, TinyAlign
from tinyalign.runtime.teach import create_bank
from tinyalign.training.episodes import NAME_QUESTIONS, UNKNOWN
from tinyalign.training.facts import ATTRIBUTES, UNSEEN_ATTRIBUTES, draw_fact, invented_name
from tinyalign.training.features import Record, load_features
from tinyalign.training.pictures import imagenet_classes
from tinyalign.training.questions import Item, questions_of, sentence
from tinyalign.training.sources import cache_dir
from tinyalign.training.vision import load_vision

TAUGHT = 100  # objects taught
LOOKS = 80  # questions of each type and source
SEED = 5


def interval(right: Iterable[bool]) -> dict[str, float]:
    """Share, number, and half-width of the 95 % interval (normal approximation)."""
    values = [bool(value) for value in right]
    share = sum(values) / max(1, len(values))
    half = 1.96 * math.sqrt(max(share * (1 - share), 1e-9) / max(1, len(values)))
    return {"share": round(share, 3), "n": len(values), "half": round(half, 3)}


def seen(model: TinyAlign, like: EncodedPicture, cells: np.ndarray) -> EncodedPicture:
    """An encoded picture from cached features [C, Dv]."""
    cells = cells.astype(np.float32)
    tokens, ids = model.parts.connector.run(["image_tokens", "token_ids"], {"cells": cells[None]})
    return dataclasses.replace(like, cells=cells, image_tokens=tokens[0], token_ids=ids[0])


def says(answer: str, name: str) -> bool:
    """Whether the answer holds the name as words."""
    return f" {words_of(name)} " in f" {words_of(answer)} "


def words_of(text: str) -> str:
    """Lower case, words parted by one space, no punctuation but hyphens."""
    return " ".join(re.sub(r"[^a-z0-9 -]+", " ", text.lower()).split())


def photos(model: TinyAlign, like: EncodedPicture) -> dict[str, Any]:
    """Naming of the labelled photographs; strict is the class's name, lenient its last word."""
    cells, records = load_features(sources=("photos",))
    encoder = load_vision()
    weight, bias = encoder.classifier.weight.numpy(), encoder.classifier.bias.numpy()
    classes = [picture.name for picture in imagenet_classes(cache_dir())]
    right: dict[str, list[bool]] = defaultdict(list)
    shown = []
    for row, record in enumerate(records):
        if record.view:
            continue
        picture = seen(model, like, cells[row])
        top = classes[int((picture.pooled @ weight.T + bias).argmax())]
        hits = model.retrieve(picture, "What is this?", top_k=1)
        answers = {
            "encoder top-1": top,
            "without memory": model.ask(picture, "What is this?", memory=False).text,
            "with memory": model.ask(picture, "What is this?").text,
            "kNN copy": hits[0].text if hits else "",
        }
        for how, answer in answers.items():
            right[f"{how}, strict"].append(says(answer, record.name))
            right[f"{how}, lenient"].append(says(answer, record.name.split()[-1]))
        shown.append({"name": record.name, **answers})
    return {**{how: interval(values) for how, values in right.items()}, "answers": shown}


def looks(model: TinyAlign, like: EncodedPicture) -> dict[str, Any]:
    """Questions on looks, by type, with and without memory."""
    cells, records = load_features(sources=("easy_vqa", "composites", "emoji"))
    rng = Random(SEED)
    asked: dict[str, list[tuple[int, Item]]] = defaultdict(list)
    held = [i for i, record in enumerate(records) if record.split == "held"]
    rng.shuffle(held)
    for row in held:
        record = records[row]
        source = "easy-vqa" if record.source == "easy_vqa" else "scenes"
        items = questions_of(record, rng)
        rng.shuffle(items)
        types: set[str] = set()
        for item in items:
            group = f"{source} {item.type}"
            wanted = item.type in ("colour", "count", "position", "yesno", "shape")
            if wanted and item.type not in types and len(asked[group]) < LOOKS:
                types.add(item.type)
                asked[group].append((row, item))
    result: dict[str, Any] = {}
    for group, items in sorted(asked.items()):
        for how, memory in (("with memory", True), ("without", False)):
            right = []
            for row, item in items:
                picture = seen(model, like, cells[row])
                answer = model.ask(picture, item.question, memory=memory, max_tokens=32).text
                right.append(is_right(item, answer))
            result[f"{group}, {how}"] = interval(right)
    return result


def is_right(item: Item, answer: str) -> bool:
    """Whether an answer agrees with the item in what was asked for."""
    if item.type == "yesno":
        return answer.lower().startswith(item.label)
    if item.type == "count":
        number = ("no", "one", "two", "three", "four", "five", "six")[int(item.label)]
        return says(answer, number)
    return says(answer, item.label)


def teach(model: TinyAlign, like: EncodedPicture) -> dict[str, Any]:
    """One example of each unseen object with an invented name and fact; another view is asked
    about."""
    cells, records = load_features(sources=("emoji", "furniture", "clipart"))
    views: dict[str, list[int]] = defaultdict(list)
    for row, record in enumerate(records):
        if record.split == "held":
            views[record.id].append(row)
    rng = Random(SEED)
    objects = sorted(id for id, rows in views.items() if len(rows) > 1)
    objects = rng.sample(objects, min(TAUGHT, len(objects)))
    right: dict[str, list[bool]] = defaultdict(list)
    shown: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        bank = create_bank(model, Path(folder) / "taught.sqlite")
        lessons = []
        for id in objects:
            name, fact = invented_name(rng), draw_fact(rng)
            unseen = draw_fact(rng, rng.choice(UNSEEN_ATTRIBUTES))
            text = f"{sentence(name)} {fact.tell} {unseen.tell}"
            memory = model.memory(seen(model, like, cells[views[id][0]]), text)
            memory = dataclasses.replace(memory, content_hash="")  # `seen` has no pixels to hash
            lessons.append((id, name, fact, unseen, text))
            bank.add([memory])
        before = TinyAlign(model.parts, model.banks)
        after = TinyAlign(model.parts, (*model.banks, bank))
        for id, name, fact, unseen, text in lessons:
            picture = seen(model, like, cells[views[id][1]])
            question = rng.choice(NAME_QUESTIONS)
            hits = after.retrieve(picture, question)
            right["retrieved @1"].append(bool(hits) and hits[0].text == text)
            right["retrieved @3"].append(any(hit.text == text for hit in hits))
            right["kNN copy, name"].append(bool(hits) and name in hits[0].text)
            told = after.ask(picture, question, max_tokens=32).text
            right["name, taught"].append(says(told, name))
            right["name, before"].append(
                says(before.ask(picture, question, max_tokens=32).text, name)
            )
            value = after.ask(picture, fact.ask, max_tokens=32).text
            right["fact, taught"].append(fact.value in value)
            right["fact, before"].append(
                fact.value in before.ask(picture, fact.ask, max_tokens=32).text
            )
            other = after.ask(picture, unseen.ask, max_tokens=32).text
            right["fact of an unseen kind, taught"].append(unseen.value in other)
            missing = rng.choice([a for a in ATTRIBUTES if a.name != fact.attribute])
            unknown = after.ask(picture, rng.choice(missing.asks), max_tokens=32).text
            right["I do not know, where no memory tells"].append(unknown == UNKNOWN)
            shown.append(
                {
                    "text": text,
                    "asked": question,
                    "name": told,
                    "fact": value,
                    "unseen": other,
                    "missing": unknown,
                }
            )
        bank.close()
    memories = sum(len(bank) for bank in model.banks)
    table = {how: interval(values) for how, values in right.items()}
    return {**table, "memories": memories + len(objects), "answers": shown}


def held_names(model: TinyAlign, like: EncodedPicture) -> dict[str, Any]:
    """Naming of held-out cut-outs, which no training picture shares a concept with."""
    cells, records = load_features(sources=("emoji", "furniture", "clipart"))
    rng = Random(SEED)
    rows = [i for i, r in enumerate(records) if r.split == "held" and r.view == 0]
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rng.sample(rows, min(150, len(rows))):
        record: Record = records[row]
        picture = seen(model, like, cells[row])
        hits = model.retrieve(picture, "What is this?", top_k=1)
        for how, answer in (
            (
                "without memory",
                model.ask(picture, "What is this?", memory=False, max_tokens=32).text,
            ),
            ("with memory", model.ask(picture, "What is this?", max_tokens=32).text),
            ("kNN copy", hits[0].text if hits else ""),
        ):
            right[f"{how}, strict"].append(says(answer, record.name))
            right[f"{how}, lenient"].append(says(answer, record.name.split()[-1]))
    return {how: interval(values) for how, values in right.items()}


def main() -> None:
    """Measure, print a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="model directory (default: the default model)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--answers", action="store_true", help="with --json: every answer too")
    arguments = parser.parse_args()
    model = TinyAlign.load(arguments.model)
    like = model.encode(np.zeros((64, 64, 3), np.uint8))
    result: dict[str, dict[str, Any]] = {}
    for name, measure in (
        ("photos", photos),
        ("held-out cut-outs", held_names),
        ("looks", looks),
        ("teach", teach),
    ):
        print(f"{name} ...", file=sys.stderr, flush=True)
        result[name] = measure(model, like)
    if not arguments.answers:
        for table in result.values():
            table.pop("answers", None)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for part, table in result.items():
        print(f"\n{part}")
        for how, value in table.items():
            if isinstance(value, dict):
                print(f"  {how:44} {value['share']:.3f} ± {value['half']:.3f}  (n = {value['n']})")


if __name__ == "__main__":
    main()
