"""One's own vision encoder and language model in place of the default ones.

    encoder ─► patches ─► cells: their mean, and 3 x 3 regions of them ─► as the default model's
    language model, its prompt from its chat template ─► as the default model's

All else is as it is for the default model: connector, compressor and RAG connector of the same
shapes, the same stages, LoRA. A weights directory names the two in `backbone.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinyalign.bank.errors import InputError
from tinyalign.runtime.chat_template import question_pieces
from tinyalign.runtime.manifest import ChatTemplate, ImageSpec, PromptSpec, VisionSpec
from tinyalign.training import llava
from tinyalign.training.encoded import encode_pictures, scaled_counts
from tinyalign.training.features import Record
from tinyalign.training.hub import model_name, model_place
from tinyalign.training.models.chat_template import read_chat_tokenizer
from tinyalign.training.models.encoders import load_encoder
from tinyalign.training.models.language_models import load_language_model
from tinyalign.training.models.vlm import read_chat
from tinyalign.training.recipe import PROMPT

BACKBONE_NAME = "backbone.json"
SIDE = 3  # regions each way
PICTURES = {
    "emoji": 3391, "clipart": 6000, "furniture": 820, "easy_vqa": 3000, "composites": 6000,
}  # fmt: skip
"""How many pictures of each source are encoded; most have two or three views."""
ENCODED = 8  # pictures a batch


@dataclass(frozen=True)
class Places:
    """Where encoder and language model lie, or their names on a hub, and a hash of both."""

    encoder: str
    lm: str
    identity: str = ""


@dataclass(frozen=True)
class Backbone:
    """Encoder and language model, frozen, and how a question is put to the latter."""

    places: Places
    vision: nn.Module  # pixels f32 [B, 3, S, S] -> cells f32 [B, 10, Dv]
    image: ImageSpec
    width: int  # Dv
    lm: PreTrainedModel
    tokenizer: Tokenizer
    prompt: PromptSpec
    chat: ChatTemplate | None

    @property
    def name(self) -> str:
        """What a model of both is called."""
        return f"{model_name(self.places.encoder)}-{model_name(self.places.lm)}"

    @property
    def seen(self) -> VisionSpec:
        """Shape of the cells."""
        return VisionSpec(1 + SIDE * SIDE, self.width)


class Cells(nn.Module):
    """An encoder whose patches are brought down to their mean and 3 x 3 regions."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels f32 [B, 3, S, S] -> cells f32 [B, 10, Dv]: mean, then 3x3 row-major."""
        cells = self.encoder(pixels)  # [B, 1 + P, Dv]
        side = math.isqrt(cells.shape[1] - 1)
        grid = cells[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # [B, Dv, side, side]
        size = -(-side // SIDE)  # regions overlap where the side is no multiple of 3
        regions = [
            grid[:, :, y : y + size, x : x + size].mean((2, 3))
            for y in starts(side, size)
            for x in starts(side, size)
        ]
        return torch.stack([cells[:, 0], *regions], dim=1)


def starts(side: int, size: int) -> list[int]:
    """Where the regions of `size` begin on a side, evenly."""
    return [round(i * (side - size) / (SIDE - 1)) for i in range(SIDE)]


def load_backbone(places: Places) -> Backbone:
    """Read both. Raises InputError for what cannot be read, for an encoder without a square grid of
    patches, and where `places.identity` is that of others."""
    encoder = load_encoder(model_place(places.encoder))
    side = math.isqrt(encoder.vision.cells - 1)
    if side * side != encoder.vision.cells - 1 or side < SIDE:
        raise InputError(
            f"{places.encoder} gives {encoder.vision.cells - 1} patches, which are no square grid "
            f"of {SIDE} x {SIDE} or more"
        )
    place = model_place(places.lm)
    lm, tokenizer = load_language_model(place)
    prompt, chat = own_prompt(place, lm, tokenizer)
    found = replace(places, identity=identity([encoder.module, lm]))
    if places.identity not in ("", found.identity):
        raise InputError(
            f"{places.encoder} and {places.lm} are not what these weights were trained with"
        )
    vision = Cells(encoder.module).eval().requires_grad_(False)
    width = encoder.vision.width
    return Backbone(found, vision, encoder.image, width, lm, tokenizer, prompt, chat)


def own_prompt(
    place: Path, lm: PreTrainedModel, tokenizer: Tokenizer
) -> tuple[PromptSpec, ChatTemplate | None]:
    """The default prompt between the pieces of a language model's chat template, and the template.

    Without one (a GGUF file, a base model) the question stands after "Question:".
    """
    chat = None
    if place.is_dir():
        try:
            chat, _ = read_chat(read_chat_tokenizer(place))
        except InputError:  # it has none
            chat = None
    if chat is not None:
        before, after = question_pieces(chat)
        question, stop = "\n{question}" + after, chat.stop
    else:
        before, question, stop = "", "\nQuestion: {question}\nAnswer:", ends(lm, tokenizer)
    phrases = tuple(phrase.replace(PROMPT.stop[0], stop[0]) for phrase in PROMPT.phrases)
    return replace(PROMPT, system=before, question=question, stop=stop, phrases=phrases), chat


def ends(lm: PreTrainedModel, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tokens that end a text by a language model's config."""
    named = lm.config.eos_token_id
    ids = named if isinstance(named, list) else [named]
    tokens = [tokenizer.id_to_token(i) for i in ids if i is not None]
    if not tokens or None in tokens:
        raise InputError("the language model's config names no token that ends a text")
    return tuple(tokens)


def identity(modules: Sequence[nn.Module]) -> str:
    """A short hash of some numbers of every parameter."""
    digest = hashlib.sha256()
    for module in modules:
        for value in module.parameters():
            digest.update(value.detach().flatten()[:64].half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_places(places: Places, directory: Path) -> None:
    """Write `backbone.json`."""
    (directory / BACKBONE_NAME).write_text(json.dumps(asdict(places), indent=1) + "\n")


def read_places(directory: Path) -> Places | None:
    """What `backbone.json` says; None where the weights are for the default encoder and LM."""
    path = directory / BACKBONE_NAME
    if not path.exists():
        return None
    try:
        return Places(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error})") from None


def backbone_features(
    backbone: Backbone, directory: Path, scale: float, data: Sequence[llava.Data]
) -> tuple[NDArray[np.float16], list[Record]]:
    """Cells [n, 10, Dv] of the training pictures and their records."""

    @torch.inference_mode()
    def encode(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        cells = [backbone.vision(some) for some in torch.from_numpy(pixels).split(ENCODED)]
        rows: NDArray[np.float32] = torch.cat(cells).flatten(1).numpy()
        return rows

    counts = scaled_counts(PICTURES, min(1.0, scale))
    shape = (backbone.seen.cells, backbone.width)
    rows, records = encode_pictures(
        directory, counts, data, encode, shape[0] * shape[1], backbone.image
    )
    return rows.reshape(len(records), *shape), records
