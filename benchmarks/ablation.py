"""What each kind of episode in fine-tuning is for: the recipe without it.

    python benchmarks/ablation.py [VARIANT ...] [--seeds 0 1 2]

All variants start from one and the same run of stages 0 and 1 and fine-tune for 600 steps; held-out
things and questions are those of `held_out.py`. A finished variant is kept in
benchmarks/results/ablation/ and not run again; without VARIANT all missing ones are run. The table
of all that are there goes to docs/ablation.md. One takes some 50 minutes on two cores, and less
than five on a GPU.
"""

# ruff: noqa: E501 - HEAD and READING are a document
from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import markdown, note
from held_out import measure

from tinyalign.runtime.threads import default_threads
from tinyalign.training import stages
from tinyalign.training.pipeline import prepare_world
from tinyalign.training.recipe import Mix, Recipe

RESULTS = Path(__file__).parent / "results" / "ablation"
START = Path(__file__).parents[1] / "build" / "ablation"
DOCUMENT = Path(__file__).parents[1] / "docs" / "ablation.md"
STEPS = 600
BATCH = 8
MIX = Mix(taught=0.45, neighbours=0.35, text=0.7)  # the default recipe teaches more: see READING


def mixed(recipe: Recipe, **shares: float) -> Recipe:
    """The recipe with other shares of episodes."""
    return dataclasses.replace(recipe, mix=dataclasses.replace(recipe.mix, **shares))


# The share of what is left out goes to the other kinds of episode.
VARIANTS: dict[str, Callable[[Recipe], Recipe]] = {
    "full": lambda recipe: recipe,
    "no taught": lambda recipe: mixed(
        recipe, taught=0.0, neighbours=MIX.neighbours + MIX.taught * 0.8,
        misleading=MIX.misleading + MIX.taught * 0.2,
    ),
    "no neighbours": lambda recipe: mixed(
        recipe, neighbours=0.0, taught=MIX.taught + MIX.neighbours
    ),
    "no misleading": lambda recipe: mixed(
        recipe, misleading=0.0, neighbours=MIX.neighbours + MIX.misleading
    ),
    "no episodes without memory": lambda recipe: mixed(
        recipe, neighbours=1 - MIX.taught - MIX.misleading
    ),
    "own names": lambda recipe: mixed(recipe, invented=0.0),
    "in order": lambda recipe: mixed(recipe, shuffled=0.0),
    "never crowded": lambda recipe: mixed(recipe, crowded=0.0),
    "nothing unknown": lambda recipe: mixed(recipe, missing=0.0, unknown=0.0),
    "no similarity": lambda recipe: recipe,  # one word for all scores, see `run_variant`
}  # fmt: skip
# heading -> (table of a result, group; "" is the mean of scenes and shapes)
COLUMNS = {
    "name": ("taught, text", "name"),
    "fact": ("taught, text", "fact"),
    "new kind": ("taught, text", "unseen"),
    "not told": ("taught, text", "untold"),
    "name, latents": ("taught, latent", "name"),
    "fact, latents": ("taught, latent", "fact"),
    "looks, no memory": ("looks, none", ""),
    "looks": ("looks, retrieved", ""),
    "looks, unrelated": ("looks, unrelated", ""),
    "other makers": ("looks, retrieved", "other makers name"),
    "other makers, unrelated": ("looks, unrelated", "other makers name"),
}
HEAD = """\
# What each kind of training episode is for

`python benchmarks/ablation.py` fine-tunes the language model for 600 steps without one kind of episode at a time, all from
the same stages 0 and 1, and asks about held-out things. *Name*, *fact*, *new kind* (a fact of a kind that training never
saw) and *not told* ("I do not know." is right): 100 things are taught by one picture and a text, among 3,462 other memories,
and another view is asked about; memories are read as text, in two columns as latents. *Looks* is the mean of questions on
held-out scenes and shapes with the retrieved memories, with none, and with unrelated ones that are called as similar.
*Other makers* are names of emoji by other makers, of concepts that the bank holds, again with retrieved and unrelated
memories. Shares of right answers; a share of .90 of 100 has a 95 % interval of about ±.06.

"""
READING = """

What it says:

- Without *taught* episodes nothing can be taught: neighbours alone never need to be read.
- *Invented names* are what makes the model read a name in a memory and not on the picture: with things' own names .80
  instead of .93, and none at all from latents.
- Without *neighbours* teaching goes as well or better (they are a third of the episodes), but retrieved memories then
  do harm to questions on looks (.80 instead of .83 without memory), and unrelated ones to names.
- Without *misleading* episodes unrelated memories do more harm to names (.37 instead of .43). Without episodes that have
  no memory at all nothing changes.
- *Shuffled* memories: without them facts of new kinds are read less well (.73 instead of .86).
- Without questions that nobody told the answer to, the model never says "I do not know." (and invents).
- So the default recipe has more taught episodes (.6) and fewer with neighbours (.2) than these variants (.45 and .35), half
  of all with the memories as text (.7 here), 16 episodes a step and 800 steps.
- One word for all similarities is as good: when the margin drops weak memories before the prompt, the words for how
  similar the rest are carry little.
"""


def start(recipe: Recipe, directory: Path) -> stages.Run:
    """A run after stages 0 and 1, which are trained once and kept."""
    torch.set_num_threads(default_threads())
    world = prepare_world(recipe, directory)
    parts = world.parts
    run = stages.Run(parts, world, recipe, directory, stages.for_training(parts.lm))
    parts.to(run.device)
    stages.load_checkpoint(run)
    stages.train_bags(run)
    stages.train_slots(run)
    stages.train_align(run)
    return run


def run_variant(name: str, seed: int) -> dict[str, Any]:
    """Fine-tune a variant and measure it."""
    run = start(Recipe(), START)
    stage = dataclasses.replace(Recipe().finetune, steps=STEPS, batch=BATCH)
    full = dataclasses.replace(Recipe(), seed=Recipe().seed + seed, mix=MIX, finetune=stage)
    run.recipe = VARIANTS[name](full)
    if name == "no similarity":
        prompt = run.parts.prompt
        run.parts.prompt = dataclasses.replace(
            prompt, similarity=(("similar", prompt.similarity[-1][1]),)
        )
    run.directory = START / f"{name}-{seed}"
    stages.load_checkpoint(run)
    stages.with_lora(run)
    stages.train_finetune(run)
    last = [entry["bits"] for entry in run.log if entry["stage"] == "finetune"][-50:]
    return {"variant": name, "seed": seed, "bits": round(float(np.mean(last)), 4)} | measure(run)


def share_of(result: dict[str, Any], column: tuple[str, str]) -> float:
    """One number of a result."""
    table, group = column
    if group:
        return float(result[table][group]["share"])
    return float(np.mean([v["share"] for k, v in result[table].items() if "makers" not in k]))


def table() -> str:
    """All results that are there: the mean over seeds and, of several, their spread."""
    rows = [("episodes", "seeds", *COLUMNS), ("---",) * (2 + len(COLUMNS))]
    for name in VARIANTS:
        files = sorted(RESULTS.glob(f"{name}-[0-9]*.json"))
        found = [json.loads(file.read_text()) for file in files]
        if found:
            cells = []
            for column in COLUMNS.values():
                values = [share_of(result, column) for result in found]
                spread = f" ± {np.std(values):.2f}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.2f}{spread}")
            rows.append((name, str(len(found)), *cells))
    return "\n".join(markdown(rows))


def main() -> None:
    """Run what is missing, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", metavar="VARIANT", nargs="*", help=f"of: {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", metavar="N", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    if unknown := set(options.variants) - set(VARIANTS):
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.variants or VARIANTS:
            file = RESULTS / f"{name}-{seed}.json"
            if file.exists():
                continue
            note(f"variant {name}, seed {seed}")
            file.write_text(json.dumps(run_variant(name, seed), indent=1) + "\n")
    DOCUMENT.write_text(HEAD + table() + READING)
    print(table())


if __name__ == "__main__":
    main()
