"""How well keys find the same thing: another view, another style, another side, another picture.

    python benchmarks/retrieval.py [--weights DIR] [--no-layers]

Compared, all brought to the same width where they are not raw:

    raw           the encoder's pooled features, 1,280 numbers
    whitened      their principal axes, whitened (what the key head starts from)
    multi-layer   pooled features of three earlier stages beside the last, whitened
    key head      learned by contrast (`training/key_head.py`): what ships

The memories are one view of every emoji, piece of furniture and clip art, of training and held-out
concepts together, and the class prototypes; asked are held-out pictures only, so nothing asked
about was seen when the head was trained. The text part of a key is left out: a query's text is a
question and tells nothing of the picture. "@1" is the share found first, "@3" among the best three.

    view      the same picture, placed, lit and turned differently
    noto, twemoji, flat   the same emoji by another maker or in another style
    turned    a piece of furniture from another side (drawn from its 3D model)
    picture   clip art of the same name by another hand, without the picture itself
    photo     a photograph; found is its class's prototype

Results: benchmarks/results/retrieval.json. Multi-layer features are not in the feature cache: their
pictures are drawn and encoded again (some minutes; kept in build/).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interval, markdown
from numpy.typing import NDArray

from tinyalign.runtime.images import preprocess
from tinyalign.runtime.keys import load_key_arrays, make_key
from tinyalign.training.features import IMAGE, STYLES, Record, jobs, load_features
from tinyalign.training.keys import whitening
from tinyalign.training.parts import DEFAULT_WEIGHTS
from tinyalign.training.sources import cache_dir
from tinyalign.training.styles import thing_of
from tinyalign.training.vision import load_vision

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "retrieval.json"
SHOWN = ("emoji", "furniture", "clipart")
LAYERS = (10, 14, 19)  # the last blocks of the encoder's stages of 88, 120 and 208 channels
Floats = NDArray[np.float32]


def questions(records: Sequence[Record]) -> dict[str, list[tuple[int, Callable[[Record], bool]]]]:
    """For every kind of question (row asked about, which memory is right)."""
    asked: dict[str, list[tuple[int, Callable[[Record], bool]]]] = {}

    def ask(kind: str, row: int, right: Callable[[Record], bool]) -> None:
        asked.setdefault(kind, []).append((row, right))

    names: dict[str, set[str]] = {}
    for record in records:
        if record.source == "clipart":
            names.setdefault(record.name, set()).add(record.id)
    for row, record in enumerate(records):
        if record.split != "held":
            continue
        thing, name, own = thing_of(record.id), record.name, record.id
        if record.source in SHOWN and record.view > 0:
            ask("view", row, lambda r, own=own: r.id == own)
        elif record.source in STYLES and record.view == 0:
            ask(record.source, row, lambda r, t=thing: r.source in SHOWN and thing_of(r.id) == t)
        elif record.source == "photos" and record.view == 0:
            ask("photo", row, lambda r, n=name: r.source == "prototypes" and r.name == n)
        if record.source == "clipart" and record.view == 0 and len(names[name]) > 1:
            ask("picture", row, lambda r, n=name, o=own: r.source == "clipart" and r.name == n)
    return {kind: asked[kind] for kind in ("view", *STYLES, "picture", "photo")}


def found(keys: Floats, records: Sequence[Record]) -> dict[str, Any]:
    """Shares found first and among three, by kind of question; keys [n, d] of all records."""
    keys = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-9)
    usable = np.any(keys != 0, axis=1)
    memories = [
        row
        for row, r in enumerate(records)
        if r.view == 0 and r.source in (*SHOWN, "prototypes") and usable[row]
    ]
    result: dict[str, Any] = {}
    for kind, asked in questions(records).items():
        asked = [(row, right) for row, right in asked if usable[row]]
        first, three = [], []
        for row, right in asked:
            scores = keys[memories] @ keys[row]
            if kind == "picture":
                scores[[records[m].id == records[row].id for m in memories]] = -2
            best = np.argsort(-scores, kind="stable")[:3]
            hits = [right(records[memories[place]]) for place in best]
            first.append(hits[0])
            three.append(any(hits))
        result[kind] = {"@1": interval(first), "@3": interval(three)}
    return result


def layer_features(records: Sequence[Record], file: Path) -> Floats:
    """Pooled features of the LAYERS [n, 416]; 0 in rows that are neither asked for nor memories."""
    if file.exists():
        stored: Floats = np.load(file)
        if len(stored) == len(records):
            return stored
    encoder, cache = load_vision(), cache_dir()
    made = np.zeros((len(records), 416), np.float32)
    rows = {(r.id, r.view): row for row, r in enumerate(records)}
    started = time.monotonic()
    for source in ("emoji", "furniture", "clipart", *STYLES):
        needed = {
            (r.id, r.view)
            for r in records
            if r.source == source and (r.split == "held" or (source in SHOWN and r.view == 0))
        }
        others = {(r.id, r.view) for r in records if r.source == source} - needed
        for number, job in enumerate(jobs(source, others, cache)):
            key = (job.record.id, job.record.view)
            if key not in needed:
                continue
            x = torch.from_numpy(preprocess(job.image, IMAGE))[None]
            with torch.inference_mode():
                x = torch.nn.functional.relu6(encoder.stem(x))
                pooled = []
                for place, block in enumerate(encoder.blocks):
                    x = block(x)
                    if place in LAYERS:
                        pooled.append(x.mean((2, 3))[0])
            made[rows[key]] = torch.cat(pooled).numpy()
            if number % 500 == 0:
                spent = time.monotonic() - started
                print(f"layers {source} {number}, {spent:.0f} s", file=sys.stderr, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, made)
    return made


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", metavar="DIR", type=Path, default=DEFAULT_WEIGHTS)
    parser.add_argument("--no-layers", action="store_true", help="leave multi-layer features out")
    options = parser.parse_args()
    cells, records = load_features(sources=(*SHOWN, "prototypes", "photos", *STYLES))
    pooled = cells[:, 0].astype(np.float32)
    arrays = load_key_arrays(options.weights / "key.npz")
    width = arrays.image_projection.shape[1]
    learn = [i for i, r in enumerate(records) if r.split == "train" and r.source in SHOWN]
    mean, axes = whitening(pooled[learn], width)
    keys = {"raw": pooled, "whitened": (pooled - mean) @ axes}
    if not options.no_layers:
        layers = layer_features(records, ROOT / "build" / "layer-features.npy")
        both = np.concatenate([pooled, layers], axis=1)
        there = np.any(layers != 0, axis=1)
        mean, axes = whitening(both[[i for i in learn if there[i]]], width)
        keys["multi-layer"] = ((both - mean) @ axes) * there[:, None]
    keys["key head"] = (pooled - arrays.image_mean) @ arrays.image_projection
    times = []
    for row in range(200):
        started = time.perf_counter()
        make_key(pooled[row], None, arrays)
        times.append(1e3 * (time.perf_counter() - started))
    result = {
        "key_ms": round(float(np.median(times)), 3),
        "key_bytes": 2 * arrays.width,
        "found": {name: found(value, records) for name, value in keys.items()},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    kinds = list(result["found"]["raw"])  # type: ignore[index]
    rows = [["keys", *(f"{kind} @1 / @3" for kind in kinds)], ["---"] * (1 + len(kinds))]
    for name, table in result["found"].items():  # type: ignore[union-attr]
        shares = [
            f"{table[k]['@1']['share']:.2f} / {table[k]['@3']['share']:.2f}"
            if table[k]["@1"]["n"]
            else ""
            for k in kinds
        ]
        rows.append([name, *shares])
    print("\n".join(markdown(rows)))
    counts = {k: result["found"]["key head"][k]["@1"]["n"] for k in kinds}  # type: ignore[index]
    print(f"\nasked: {counts}; a key takes {result['key_ms']} ms and {result['key_bytes']} bytes")


if __name__ == "__main__":
    main()
