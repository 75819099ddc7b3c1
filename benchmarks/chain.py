"""Where accuracy is lost: errors followed through the chain, link by link.

    python benchmarks/chain.py [--model DIR] [--weights DIR] [--each 80]

For questions on looks (held-out scenes, easy-vqa's test pictures) the links are

    features    a linear probe on the frozen features, fitted on training pictures: what can be read
                off them (the bound of any connector that is as simple)
    connector   the image token of that slot reads as the right word
    answer      the torch model's answer, whole chain; and its share where the token was right and
                where it was wrong: how well the language model passes on what it is shown
    runtime     the answer of the exported, quantized model, and how often it is that of torch

For naming photographs the first link is the encoder's own best class (`accuracy.py`), for naming
taught things it is retrieval (`teach.py`). Results: benchmarks/results/chain.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import blank, interval, is_right, look_questions, markdown, note, seen
from numpy.typing import NDArray

from tinyalign.bank import Bank
from tinyalign.runtime import TinyAlign
from tinyalign.training.answer import answer_cells
from tinyalign.training.features import Record, load_features
from tinyalign.training.parts import DEFAULT_WEIGHTS, Parts, load_parts
from tinyalign.training.questions import Item
from tinyalign.training.stages import number_word
from tinyalign.training.vocabulary import word_id

RESULTS = Path(__file__).parent / "results" / "chain.json"
SEED = 5
MAX_TOKENS = 32
PROBE_STEPS = 300
# question type -> (slot behind the name slots, what the record says)
SLOTS: dict[str, tuple[int, Callable[[Record], str]]] = {
    "colour": (1, lambda record: record.colour),
    "count": (2, lambda record: number_word(record.count)),
    "position": (3, lambda record: record.position),
}


def probe(
    cells: NDArray[np.float16], train: Sequence[int], words: Sequence[str], held: Sequence[int]
) -> list[str]:
    """A linear classifier's words for held-out rows, fitted on training rows and their words."""
    classes = sorted(set(words))
    x = torch.from_numpy(cells[list(train)].astype(np.float32)).flatten(1)
    mean, spread = x.mean(0), x.std(0) + 1e-3
    y = torch.tensor([classes.index(word) for word in words])
    torch.manual_seed(0)
    layer = torch.nn.Linear(x.shape[1], len(classes))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=1.0)
    for _ in range(PROBE_STEPS):
        picked = torch.randint(len(x), (512,))
        loss = F.cross_entropy(layer((x[picked] - mean) / spread), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        z = torch.from_numpy(cells[list(held)].astype(np.float32)).flatten(1)
        return [classes[best] for best in layer((z - mean) / spread).argmax(1).tolist()]


def link_by_link(
    model: TinyAlign,
    parts: Parts,
    bank: Bank,
    cells: NDArray[np.float16],
    records: Sequence[Record],
    kind: str,
    items: Sequence[tuple[int, Item]],
) -> dict[str, Any]:
    """The chain of one source and type of question."""
    rows = [row for row, _ in items]
    result: dict[str, Any] = {}
    right_slot: list[bool] = []
    if kind in SLOTS:
        place, word_of = SLOTS[kind]
        slot = parts.connector.shape.name_slots + place
        source = records[rows[0]].source
        train = [
            i for i, r in enumerate(records)
            if r.split == "train" and r.source == source and word_of(r)
        ]  # fmt: skip
        told = probe(cells, train, [word_of(records[i]) for i in train], rows)
        result["features"] = interval(
            t == word_of(records[r]) for t, r in zip(told, rows, strict=True)
        )
        with torch.inference_mode():
            features = torch.from_numpy(cells[rows].astype(np.float32))
            ids = parts.connector(features)[1][:, slot].tolist()
        right_slot = [
            read == word_id(parts.tokenizer, word_of(records[r]))
            for read, r in zip(ids, rows, strict=True)
        ]
        result["connector"] = interval(right_slot)
    like = blank(model)
    ours = [
        answer_cells(
            parts, [bank], torch.from_numpy(cells[[row]].astype(np.float32)), item.question,
            MAX_TOKENS,
        ).text
        for row, item in items
    ]  # fmt: skip
    theirs = [
        model.ask(seen(model, like, cells[row]), item.question, max_tokens=MAX_TOKENS).text
        for row, item in items
    ]
    right = [is_right(item, answer) for (_, item), answer in zip(items, ours, strict=True)]
    result["answer"] = interval(right)
    if right_slot:
        both = list(zip(right_slot, right, strict=True))
        result["answer, token right"] = interval(a for slot_ok, a in both if slot_ok)
        result["answer, token wrong"] = interval(a for slot_ok, a in both if not slot_ok)
    result["runtime"] = interval(
        is_right(item, answer) for (_, item), answer in zip(items, theirs, strict=True)
    )
    result["runtime as torch"] = interval(a == b for a, b in zip(ours, theirs, strict=True))
    return result


def table(result: dict[str, Any]) -> str:
    """All links of all questions."""
    links = (
        "features", "connector", "answer", "answer, token right", "answer, token wrong",
        "runtime", "runtime as torch",
    )  # fmt: skip
    rows = [["question", "n", *links], ["---"] * (2 + len(links))]
    for group, found in result.items():
        shares = [f"{found[link]['share']:.2f}" if link in found else "" for link in links]
        rows.append([group, str(found["answer"]["n"]), *shares])
    return "\n".join(markdown(rows))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="DIR", type=Path, help="default: the default model")
    parser.add_argument("--weights", metavar="DIR", type=Path, default=DEFAULT_WEIGHTS)
    parser.add_argument("--each", metavar="N", type=int, default=80)
    options = parser.parse_args()
    model, parts = TinyAlign.load(options.model), load_parts(options.weights)
    for module in (parts.lm, parts.connector, parts.rag_connector):
        module.eval()
    cells, records = load_features(sources=("easy_vqa", "composites"))
    result: dict[str, Any] = {}
    with Bank.open(options.weights / "bank.sqlite", read_only=True) as bank:
        for group, items in look_questions(records, options.each, Random(SEED)).items():
            note(f"{group}: {len(items)} questions")
            kind = group.split()[-1]
            result[group] = link_by_link(model, parts, bank, cells, records, kind, items)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
