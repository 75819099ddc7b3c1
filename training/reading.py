"""How well a trained model reads what was taught: on pictures that it was not trained on.

Other views of the pictures are taught with invented names and facts, so that only a memory tells
the answers. How likely the right answers are shows what each way of reading memories is worth, and
is the same measure for a frozen language model and a fine-tuned one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

import torch

from tinyalign.runtime.manifest import MemoryMode
from tinyalign.training import stages
from tinyalign.training.batch import Episode, answer_logits
from tinyalign.training.episodes import SHARES, rows_by_source, taught_episode
from tinyalign.training.world import SHOWN, World

MODES: tuple[MemoryMode, ...] = ("text", "latent", "both")
EPISODES = 60


def rows_of(world: World, split: str) -> dict[str, list[int]]:
    """Rows of pictures of single things on one side of the split."""
    return rows_by_source(world.records, tuple(SHARES), split)


@torch.inference_mode()
def read_modes(run: stages.Run, rows: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """How well taught names and facts are read without a memory ("none"), and with memories as
    text, latents or both: see `reading`."""
    if not any(rows.get(source) for source in SHOWN):
        return {}
    run.parts.connector.eval()
    mix = replace(run.recipe.mix, invented=1.0, crowded=0.0, missing=0.0)
    taught = replace(run.recipe, mix=mix)
    rng = Random(f"{run.recipe.seed}/modes")
    episodes = [taught_episode(run.world, rows, taught, rng) for _ in range(EPISODES)]
    found = {"none": reading(run, [replace(e, memories=()) for e in episodes])}
    for mode in MODES:
        found[mode] = reading(run, [replace(e, mode=mode) for e in episodes])
    return found


def reading(run: stages.Run, episodes: Sequence[Episode]) -> dict[str, float]:
    """Of the right answers' tokens: mean "bits", and which share is the model's first choice."""
    total = count = first = 0.0
    for start in range(0, len(episodes), run.recipe.align.batch):
        batch, inputs = stages.embed_episodes(run, episodes[start : start + run.recipe.align.batch])
        bonus = run.parts.rag_connector.copy_bonus
        with stages.lm_arithmetic(run.device.type):
            logits, labels = answer_logits(stages.base_of(run.lm), inputs, batch, bonus)
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
        first += (logits.argmax(-1) == labels).sum().item()
    return {"bits": round(total / count * stages.BITS, 4), "first_choice": round(first / count, 4)}


def print_reading(found: Mapping[str, Mapping[str, float]]) -> None:
    """A line for each mode."""
    for mode, values in found.items():
        print(
            f"held-out pictures, taught names and facts, {mode}: {values['bits']:.2f} bits an "
            f"answer token, {values['first_choice']:.2f} of them the first choice"
        )
