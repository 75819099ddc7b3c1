"""A whole training run: data, stages in order, and the weights directory at its end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from tinyalign.runtime.errors import InputError
from tinyalign.runtime.keys import KeyArrays, load_key_arrays, save_key_arrays
from tinyalign.runtime.threads import default_threads
from tinyalign.training import key_head, stages
from tinyalign.training.backbone import Backbone, backbone_features
from tinyalign.training.default_bank import build_bank
from tinyalign.training.encoded import PICTURES_NAME, THUMBNAILS_NAME
from tinyalign.training.features import (
    ORDER,
    STYLES,
    Record,
    build_features,
    load_features,
    load_thumbnails,
    read_thumbnails,
)
from tinyalign.training.llava import Data, check_together, encode_data
from tinyalign.training.next_tokens import write_next_tokens
from tinyalign.training.parts import Parts, load_parts, new_parts, save_parts
from tinyalign.training.pictures import imagenet_classes
from tinyalign.training.plots import plot_losses
from tinyalign.training.reading import print_reading, read_modes, rows_of
from tinyalign.training.recipe import Recipe
from tinyalign.training.sources import cache_dir
from tinyalign.training.unknown import calibrated_margin
from tinyalign.training.world import World, fit_keys, make_world, with_floors, words_of


def prepare_world(
    recipe: Recipe,
    directory: Path,
    data: Sequence[str] = (),
    unseen: Callable[[Record], bool] = lambda record: False,
) -> World:
    """Features, the key head (trained once, kept in `directory`), untrained parts and the training
    bank. `data` names sources beside the usual ones (see `llava.py`); what is `unseen` is left out
    of what the keys are learned from."""
    cells, records = load_features(sources=(*ORDER, *STYLES, *data))
    classes = [picture.name for picture in imagenet_classes(cache_dir())]
    parts = new_parts(recipe, classes, *words_of(records))
    seen = [dataclasses.replace(r, split="held") if unseen(r) else r for r in records]
    parts.keys = key_recipe(parts, cells, seen, recipe, directory / "key.npz")
    return with_floors(make_world(parts, cells, records, recipe), recipe)


def key_recipe(
    parts: Parts,
    cells: NDArray[np.float16],
    records: Sequence[Record],
    recipe: Recipe,
    file: Path,
) -> KeyArrays:
    """The key recipe that lies in a file, or a new one, which is written there."""
    if not file.exists():
        fitted = fit_keys(parts, cells, records, recipe)
        learned = key_head.learn_key_head(
            fitted, cells[:, 0].astype(np.float32), records, recipe.seed
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        save_key_arrays(file.with_suffix(".tmp"), learned)
        file.with_suffix(".tmp").replace(file)
    return load_key_arrays(file)


def check_same_data(directory: Path, sources: Sequence[str]) -> None:
    """Note in a run directory what data it trains on beside the usual.

    Raises InputError when the run has begun with other data.
    """
    path = directory / "data.json"
    known = json.loads(path.read_text()) if path.exists() else []
    if known == list(sources):
        return
    if any((directory / name).exists() for name in ("key.npz", "checkpoint.pt", PICTURES_NAME)):
        raise InputError(
            f"{directory} holds a run on other data (--data differs, a file has changed, or it is "
            "for another model, scale or data): "
            "continue it as it was started, or choose another --out"
        )
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(sources)))


def train(
    recipe: Recipe,
    directory: Path,
    until: str,
    data: Sequence[Data] = (),
    backbone: Backbone | None = None,
    scale: float = 1.0,
) -> None:
    """Run the stages that are left and write the weights.

    `until` is the last stage: "prepare", "0", "1" or "2". `backbone`: other encoder and LM; then
    `scale` is the share of the pictures that are encoded. The run directory gets `checkpoint.pt`,
    `log.jsonl`, `loss.png` and `weights/`. Raises InputError when it holds a run of another recipe
    or on other data.
    """
    torch.set_num_threads(default_threads())
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    sources = [one.source for one in data]
    check_together(data)
    with accelerator.main_process_first():  # the others find the files it made
        if backbone is None:
            check_same_data(directory, sources)
            for one in data:
                encode_data(one)
            build_features()
        else:
            check_same_data(directory, [backbone.places.identity, str(scale), *sources])
            cells, records = backbone_features(backbone, directory, scale, data)
        if until == "prepare":
            return
        if backbone is None:
            world = prepare_world(recipe, directory, sources)
        else:
            own = new_parts(recipe, [], *words_of(records), backbone)
            world = with_floors(make_world(own, cells, records, recipe), recipe)
    parts = world.parts
    run = stages.Run(
        parts, world, recipe, directory, stages.for_training(parts.lm), accelerator=accelerator
    )
    parts.to(accelerator.device)
    stages.load_checkpoint(run)
    stages.train_bags(run)
    stages.train_slots(run)
    if until >= "1":
        stages.train_align(run)
    if until >= "2":
        stages.with_lora(run)
        stages.train_finetune(run)
    if accelerator.is_main_process:
        write_weights(run, until, sources)
    accelerator.wait_for_everyone()  # a process that ends early takes the others with it
    accelerator.end_training()


def write_weights(run: stages.Run, until: str, sources: Sequence[str]) -> None:
    """The weights directory and the loss curve of a run that is done."""
    parts, directory = run.parts, run.directory
    if until >= "2":
        margin = calibrated_margin(run)
        parts.prompt = dataclasses.replace(parts.prompt, unknown_margin=margin)
    parts.to(torch.device("cpu"))
    parts.finish()
    weights = directory / "weights"
    shutil.rmtree(weights, ignore_errors=True)  # of an earlier, shorter run
    save_parts(parts, weights)
    stages.save_lora(run, weights / "lora")
    if parts.places is None:
        thumbnails = load_thumbnails(sources=(*ORDER, *sources))
        write_next_tokens(load_parts(weights), weights)
    else:
        thumbnails = read_thumbnails(directory / THUMBNAILS_NAME)
    build_bank(run.world, weights / "bank.sqlite", thumbnails)
    plot_losses(run.log, directory / "loss.png")
    if parts.places is not None and until >= "1":
        parts.to(run.device)
        found = read_modes(run, rows_of(run.world, "held"))
        (weights / "quality.json").write_text(json.dumps({"held_out": found}, indent=1) + "\n")
        print_reading(found)
    print(f"weights: {weights}\nloss curve: {directory / 'loss.png'}")
