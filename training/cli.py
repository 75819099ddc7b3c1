"""`tinyalign-train`: from packages of pictures to the weights that `tinyalign-export` reads."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tinyalign.bank.errors import InputError, TinyAlignError
from tinyalign.runtime.cli import Parser
from tinyalign.runtime.threads import default_threads
from tinyalign.training import stages
from tinyalign.training.default_bank import build_bank
from tinyalign.training.features import ORDER, build_features, load_features
from tinyalign.training.parts import copy_weights, new_parts, save_parts
from tinyalign.training.pictures import imagenet_classes
from tinyalign.training.plots import plot_losses
from tinyalign.training.recipe import Recipe, Stage
from tinyalign.training.sources import cache_dir
from tinyalign.training.world import World, calibrated_similarity, make_world

STAGES = ("prepare", "0", "1", "2")
DESCRIPTION = """\
Train the default model: prepare the pictures (downloaded once, hash-checked), then
  stage 0  compressor and connectors, mostly without the language model (minutes)
  stage 1  connectors with retrieved memories, through the frozen language model
  stage 2  fine-tuning with LoRA on episodes that teach when to trust a memory
The run can be stopped at any time (Ctrl-C); the same command continues it. It ends with a weights
directory for `tinyalign-export --weights`."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="tinyalign-train",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path("runs/default"),
        help="run directory (default: %(default)s)",
    )
    made.add_argument(
        "--until", choices=STAGES, default="2", help="stop after this stage (default: %(default)s)"
    )
    made.add_argument(
        "--seed", type=int, default=Recipe.seed, help="random seed (default: %(default)s)"
    )
    made.add_argument(
        "--scale", type=float, default=1.0, metavar="X",
        help="multiply the steps of every stage, for instance 0.1 for a quick look (default: 1)",
    )  # fmt: skip
    made.add_argument(
        "--install", action="store_true", help="when done, make the result the default weights"
    )
    return made


def scaled(recipe: Recipe, scale: float) -> Recipe:
    """The recipe with every stage's steps multiplied."""
    changes: dict[str, Stage] = {}
    for item in dataclasses.fields(recipe):
        stage = getattr(recipe, item.name)
        if isinstance(stage, Stage):
            changes[item.name] = dataclasses.replace(
                stage, steps=max(1, round(stage.steps * scale))
            )
    return dataclasses.replace(recipe, **changes)  # type: ignore[arg-type]


def prepare_world(recipe: Recipe) -> World:
    """Features, untrained parts and the training bank."""
    cells, records = load_features(sources=ORDER)
    train = [record for record in records if record.split == "train"]
    classes = [picture.name for picture in imagenet_classes(cache_dir())]
    kinds = sorted({record.kind for record in train if record.kind})
    parts = new_parts(recipe, classes, sorted({r.name for r in train if r.name}), kinds)
    world = make_world(parts, cells, records, recipe)
    floors = calibrated_similarity(world, recipe.seed)
    parts.prompt = dataclasses.replace(parts.prompt, similarity=floors)
    return world


def train(recipe: Recipe, directory: Path, until: str) -> None:
    """Run the stages that are left, up to `until`, and write the weights directory."""
    build_features()
    if until == "prepare":
        return
    world = prepare_world(recipe)
    parts = world.parts
    run = stages.Run(parts, world, recipe, directory, stages.for_training(parts.lm))
    stages.load_checkpoint(run)
    stages.train_codes(run)
    stages.train_slots(run)
    stages.train_reconstruct(run)
    if until >= "1":
        stages.train_align(run)
    if until >= "2":
        stages.with_lora(run)
        stages.train_finetune(run)
    parts.round_to_half()
    weights = directory / "weights"
    shutil.rmtree(weights, ignore_errors=True)  # of an earlier, shorter run
    save_parts(parts, weights)
    stages.save_lora(run, weights / "lora")
    build_bank(world, weights / "bank.sqlite")
    plot_losses(run.log, directory / "loss.png")
    print(f"weights: {weights}\nloss curve: {directory / 'loss.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    torch.set_num_threads(default_threads())
    try:
        if arguments.scale <= 0:
            raise InputError("--scale must be greater than 0")
        recipe = scaled(dataclasses.replace(Recipe(), seed=arguments.seed), arguments.scale)
        train(recipe, arguments.out, arguments.until)
        if arguments.install:
            from tinyalign.training.parts import DEFAULT_WEIGHTS

            copy_weights(arguments.out / "weights", DEFAULT_WEIGHTS)
    except InputError as error:
        print(f"tinyalign-train: {error}", file=sys.stderr)
        return 2
    except TinyAlignError as error:
        print(f"tinyalign-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
