"""A memory for a frozen vision-language model: what `tinyalign-train --base` makes at full size.

    python benchmarks/base_memory.py [--out runs/base-benchmark] [--scale 1]

The model is the default one with its language model as it was published (no LoRA), taken as if it
were somebody else's: nothing of it is trained, only compressor and RAG connector. Right answers to
questions on held-out pictures with invented names and facts, which only a memory tells. Results:
benchmarks/results/base_memory.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from torch import Tensor

from tinyalign.runtime.manifest import ImageSpec, VisionSpec
from tinyalign.training import base
from tinyalign.training.models.encoders import Encoder
from tinyalign.training.models.vlm import Vlm
from tinyalign.training.modules import Projector
from tinyalign.training.parts import load_parts

RESULTS = Path(__file__).parent / "results" / "base_memory.json"


class Words(Projector):
    """The default model's connector, which reads the mean as well."""

    def forward(self, cells: Tensor) -> Tensor:
        tokens: Tensor = self.project(cells)[0]
        return tokens


def default_as_other() -> Vlm:
    """The default model's encoder and connector, and the published language model."""
    parts = load_parts(merge_lora=False)
    encoder = Encoder(parts.vision, ImageSpec(), VisionSpec(), "efficientnet")
    connector = Words(parts.own_connector).eval().requires_grad_(False)
    tokens = parts.own_connector.shape.tokens
    lm, tokenizer, prompt = parts.lm, parts.tokenizer, parts.prompt
    return Vlm("default", "default", encoder, connector, tokens, lm, tokenizer, prompt, None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/base-benchmark"))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=17)
    options = parser.parse_args()
    began = time.monotonic()
    base.train_base(default_as_other(), options.out, options.seed, options.scale)
    description = json.loads((options.out / "weights" / "recipe.json").read_text())
    found = {
        "scale": options.scale,
        "seed": options.seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "memory_mode": description["prompt"]["memory_mode"],
        "copy_bonus": description["prompt"]["copy_bonus"],
        "held_out": description["quality"]["held_out"],
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
