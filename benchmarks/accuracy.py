"""How often the default model is right, on what it never saw: photographs, scenes, shapes.

    python benchmarks/accuracy.py [--model DIR] [--json [--answers]]

photos             20 labelled ImageNet photographs (from PyPI's foolbox): the encoder's own top-1
                   is the bound
held-out cut-outs  names of things that no training picture shares a concept with
looks              held-out scenes and easy-vqa's test pictures: colour, count, position, yes/no,
                   shape

"kNN copy" answers with the text of the nearest memory. Nothing asked here was trained on or is in
the default bank. How well it learns from one example is measured by `teach.py`. Needs the feature
cache of `tinyalign-train --until prepare`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

from common import blank, interval, is_right, look_questions, says, seen

from tinyalign.runtime import EncodedPicture, TinyAlign
from tinyalign.training.features import Record, load_features
from tinyalign.training.pictures import imagenet_classes
from tinyalign.training.sources import cache_dir
from tinyalign.training.vision import load_vision

LOOKS = 80  # questions of each type and source
SEED = 5


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
    result: dict[str, Any] = {}
    for group, items in look_questions(records, LOOKS, Random(SEED)).items():
        for how, memory in (("with memory", True), ("without", False)):
            right = []
            for row, item in items:
                picture = seen(model, like, cells[row])
                answer = model.ask(picture, item.question, memory=memory, max_tokens=32).text
                right.append(is_right(item, answer))
            result[f"{group}, {how}"] = interval(right)
    return result


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
    like = blank(model)
    result: dict[str, dict[str, Any]] = {}
    for name, measure in (
        ("photos", photos),
        ("held-out cut-outs", held_names),
        ("looks", looks),
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
                low, high = value["low"], value["high"]
                print(f"  {how:36} {value['share']:.3f} [{low:.3f}, {high:.3f}] n = {value['n']}")


if __name__ == "__main__":
    main()
