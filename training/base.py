"""A memory on top of somebody else's vision-language model, of which nothing is changed.

    prepare  pictures through the model's own encoder and connector, once
    stage 0  compressor and RAG connector, without the language model
    stage 1  RAG connector through the frozen language model, on episodes that ask for what only a
             memory tells

The paper leaves open whether its method carries to other models; here the connector is not trained
along, as it is in the paper: the model answers as before where it remembers nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinyalign.bank.errors import InputError
from tinyalign.runtime.keys import load_key_arrays, save_key_arrays
from tinyalign.runtime.manifest import PromptSpec, from_dict
from tinyalign.runtime.threads import default_threads
from tinyalign.training import llava, stages
from tinyalign.training.backbone import identity
from tinyalign.training.default_bank import build_bank
from tinyalign.training.encoded import THUMBNAILS_NAME, encode_pictures, scaled_counts
from tinyalign.training.episodes import draw_episode
from tinyalign.training.features import Record, read_thumbnails
from tinyalign.training.lm import token_table
from tinyalign.training.models.vlm import Vlm
from tinyalign.training.modules import Compressor, MemoryShape, RagConnector, SoftVocabulary
from tinyalign.training.parts import Parts, packed, unpacked
from tinyalign.training.pipeline import check_same_data
from tinyalign.training.plots import plot_losses
from tinyalign.training.reading import MODES, print_reading, read_modes, rows_of
from tinyalign.training.recipe import PROMPT, Mix, Recipe, Stage, recipe_for, scaled
from tinyalign.training.vocabulary import soft_vocabulary
from tinyalign.training.world import World, make_world, with_floors, words_of

PICTURES = {"emoji": 400, "clipart": 240, "furniture": 100}  # of each source
ENCODED = 4  # pictures a batch
CHECKED = 60  # training pictures that only choose how memories are read


def base_recipe(vlm: Vlm, seed: int, scale: float) -> Recipe:
    """Shapes that fit a model, and stages for what is trained of it."""
    # The language model stays as it is, so it cannot learn to say that it does not know.
    mix = Mix(taught=0.75, neighbours=0.15, missing=0, unknown=0, text=0.1, both=0.2)
    align = Stage(200, 8, {"rag_connector": 2e-4, "copy": 2e-2})
    recipe = recipe_for(*widths(vlm), prompt_with_memory(vlm.prompt), seed)
    return scaled(replace(recipe, mix=mix, align=align), scale)


def widths(vlm: Vlm) -> tuple[int, int]:
    """Dv and D."""
    return vlm.encoder.vision.width, int(vlm.lm.config.hidden_size)


def prompt_with_memory(prompt: PromptSpec) -> PromptSpec:
    """A model's own prompt with memories behind the picture. Without one, its tokens are the same:
    what stood between the picture and the question now stands before the memories."""
    between, end = prompt.question.split("{question}")
    return replace(
        prompt,
        image=(*prompt.image, between) if between else prompt.image,
        memory=PROMPT.memory,
        memory_end="\n",
        question="{question}" + end,
        similarity=PROMPT.similarity,
        top_k=PROMPT.top_k,
        margin=PROMPT.margin,
    )


def base_parts(vlm: Vlm, shape: MemoryShape, prompt: PromptSpec, vocabulary_ids: Tensor) -> Parts:
    """A model with an untrained memory: `vocabulary_ids` [Vs] are the words of a memory's picture
    token."""
    table = token_table(vlm.lm)
    vocabulary = SoftVocabulary(table[vocabulary_ids], vocabulary_ids)
    radius = table.float().norm(dim=-1).mean().item()
    return Parts(
        vlm.encoder.module, vlm.lm, vlm.tokenizer, vlm.connector, Compressor(shape),
        RagConnector(shape, vocabulary, radius), prompt, vocabulary_ids, torch.empty(0, 0),
        image=vlm.encoder.image, seen=vlm.encoder.vision, name=vlm.name, chat=vlm.chat,
    )  # fmt: skip


def without_memory(vlm: Vlm) -> Parts:
    """A model as it came: what would make a memory is there, untrained, and not used."""
    recipe = recipe_for(*widths(vlm), vlm.prompt, Recipe.seed)
    return base_parts(vlm, recipe.memory, vlm.prompt, torch.zeros(1, dtype=torch.long))


# ---- pictures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """What the model makes of some pictures."""

    pooled: NDArray[np.float16]  # [n, 1, Dv]
    image_tokens: NDArray[np.float16]  # [n, T, D]
    records: list[Record]


def encode_base(
    vlm: Vlm, directory: Path, scale: float, data: Sequence[llava.Data] = ()
) -> Encoded:
    """Put the pictures that are not there yet through encoder and connector."""
    width, lm_width = widths(vlm)
    shape = (vlm.tokens, lm_width)

    @torch.inference_mode()
    def encode(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = []
        for some in torch.from_numpy(pixels).split(ENCODED):
            cells = vlm.encoder.module(some)  # [B, 1 + P, Dv]
            rows.append(torch.cat([cells[:, 0], vlm.connector(cells).flatten(1)], dim=1))
        return torch.cat(rows).numpy()

    counts, image = scaled_counts(PICTURES, scale), vlm.encoder.image
    row = width + shape[0] * shape[1]
    stored, records = encode_pictures(directory, counts, data, encode, row, image)
    pooled, tokens = stored[:, None, :width], stored[:, width:]
    return Encoded(np.array(pooled), tokens.reshape(len(records), *shape), records)


def base_world(vlm: Vlm, recipe: Recipe, directory: Path, encoded: Encoded) -> World:
    """Untrained parts, key recipe and the bank of training pictures."""
    torch.manual_seed(recipe.seed)
    ids = torch.tensor(soft_vocabulary(vlm.tokenizer, *words_of(encoded.records)))
    parts = base_parts(vlm, recipe.memory, recipe.prompt, ids)
    world = make_world(parts, encoded.pooled, encoded.records, recipe)
    return with_floors(replace(world, image_tokens=encoded.image_tokens), recipe)


# ---- training ------------------------------------------------------------------------------------


def train_base(
    vlm: Vlm,
    directory: Path,
    seed: int,
    scale: float,
    until: str = "1",
    data: Sequence[llava.Data] = (),
) -> None:
    """Train a memory for a model.

    `until`: "prepare", "0" or "1". A run that was stopped goes on where it was. Writes
    `weights/` into the run directory, for `tinyalign-export --from MODEL --weights`. Raises
    InputError when the directory holds a run on another model, recipe or data.
    """
    torch.set_num_threads(default_threads())
    llava.check_together(data)
    recipe = base_recipe(vlm, seed, scale)
    model = identity_of(vlm)  # before the language model's products are in bfloat16
    check_same_data(directory, [model, str(scale), *(one.source for one in data)])
    encoded = encode_base(vlm, directory, scale, data)
    if until == "prepare":
        return
    world = base_world(vlm, recipe, directory, encoded)
    parts = world.parts
    run = stages.Run(parts, world, recipe, directory, stages.for_training(parts.lm))
    parts.to(run.device)
    stages.load_checkpoint(run)
    stages.train_bags(run)
    kept_apart = apart(world)
    quality: dict[str, Any] = {}
    if until == "1":
        train_memory(run, kept_apart)
        choose_mode(run, kept_apart)
        quality["held_out"] = read_modes(run, rows_of(world, "held"))
    parts.to(torch.device("cpu"))
    parts.finish()
    base = {"name": vlm.name, "identity": model}
    write_weights(run, base, directory / "weights", quality)


def identity_of(vlm: Vlm) -> str:
    """A short hash of the model that a memory belongs to."""
    return identity([vlm.encoder.module, vlm.connector, vlm.lm])


def apart(world: World) -> frozenset[str]:
    """Ids of training pictures that are not trained on."""
    ids = {record.id for record in world.records if record.split == "train"}
    ordered = sorted(ids, key=lambda id: hashlib.sha256(f"apart/{id}".encode()).digest())
    return frozenset(ordered[: min(CHECKED, len(ordered) // 5)])


def train_memory(run: stages.Run, kept_apart: frozenset[str]) -> None:
    """RAG connector and copy bonus, through the frozen language model."""
    groups = {
        "rag_connector": stages.rag_parameters(run.parts),
        "copy": [run.parts.rag_connector.copy_bonus],
    }
    rows = without(run.world, rows_of(run.world, "train"), kept_apart)
    loss_of = stages.episode_loss(run, "align", run.recipe.align, draw_episode, rows)
    stages.train_stage(run, "align", run.recipe.align, groups, loss_of)


def without(
    world: World, rows: dict[str, list[int]], ids: frozenset[str], only: bool = False
) -> dict[str, list[int]]:
    """Rows whose picture is not among some (`only`: whose picture is)."""
    kept: dict[str, list[int]] = {}
    for source, found in rows.items():
        if chosen := [row for row in found if (world.records[row].id in ids) == only]:
            kept[source] = chosen
    return kept


def choose_mode(run: stages.Run, kept_apart: frozenset[str]) -> None:
    """How the prompt shows memories: as what makes the right answers likeliest on pictures that
    were not trained on."""
    rows = without(run.world, rows_of(run.world, "train"), kept_apart, only=True)
    if found := read_modes(run, rows):
        best = min(MODES, key=lambda mode: found[mode]["bits"])
        run.parts.prompt = replace(run.parts.prompt, memory_mode=best)


# ---- weights -------------------------------------------------------------------------------------


def write_weights(
    run: stages.Run, base: dict[str, str], weights: Path, quality: dict[str, Any]
) -> None:
    """The weights directory, its bank and the loss curve; `base` says what model it is for."""
    parts, world = run.parts, run.world
    shutil.rmtree(weights, ignore_errors=True)  # of an earlier, shorter run
    weights.mkdir(parents=True)
    save_file(packed(parts.compressor), weights / "compressor.safetensors")
    names = {"vocabulary_ids": parts.vocabulary_ids.int()}
    save_file(packed(parts.rag_connector) | names, weights / "rag_connector.safetensors")
    assert parts.keys is not None
    save_key_arrays(weights / "key.npz", parts.keys)
    description = {
        "base": base,
        "memory": asdict(parts.compressor.shape),
        "prompt": asdict(parts.prompt),
        "quality": quality,
    }
    (weights / "recipe.json").write_text(json.dumps(description, indent=1) + "\n")
    thumbnails = read_thumbnails(run.directory / THUMBNAILS_NAME)
    build_bank(world, weights / "bank.sqlite", thumbnails)
    plot_losses(run.log, run.directory / "loss.png")
    print(f"weights: {weights}\nloss curve: {run.directory / 'loss.png'}")
    print_reading(quality.get("held_out", {}))


def load_base(vlm: Vlm, directory: Path) -> Parts:
    """A model with the memory that was trained for it.

    Raises InputError when the directory holds none, or one for another model.
    """
    try:
        description = json.loads((directory / "recipe.json").read_text())
        compressor = load_file(directory / "compressor.safetensors")
        rag_connector = load_file(directory / "rag_connector.safetensors")
    except (OSError, ValueError) as error:
        raise InputError(f"{directory} holds no trained memory ({error})") from None
    base = description.get("base")
    if not isinstance(base, dict) or base.get("identity") != identity_of(vlm):
        name = base.get("name") if isinstance(base, dict) else "the default model"
        raise InputError(f"{directory} holds a memory for another model: {name}")
    shape = from_dict(MemoryShape, description["memory"], "memory")
    prompt = from_dict(PromptSpec, description["prompt"], "prompt")
    parts = base_parts(vlm, shape, prompt, rag_connector.pop("vocabulary_ids").long())
    parts.compressor.load_state_dict(unpacked(compressor))
    parts.rag_connector.load_state_dict(unpacked(rag_connector))
    parts.keys = load_key_arrays(directory / "key.npz")
    for module in parts.trained.values():
        module.eval().requires_grad_(False)
    return parts
