"""All parts of the model in one place: made new, saved as safetensors, and loaded again.

A weights directory (the default one is `training/weights/`) holds only what was trained or fitted
here:

    connector.safetensors      + vocabulary_ids [Vs], class_names [classes, slots]
    compressor.safetensors
    rag_connector.safetensors
    lora/                      the LM's LoRA adapter (peft's format)
    backbone.json              where encoder and LM lie, if they are not the default ones
    key.npz                    the key recipe's arrays
    recipe.json                shapes and prompt
    bank.sqlite                the default memory bank

The encoder's and the LM's own weights are other people's and are fetched.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinyalign.bank.errors import InputError
from tinyalign.runtime.keys import KeyArrays, load_key_arrays, save_key_arrays
from tinyalign.runtime.manifest import (
    NEXT_TOKENS,
    ChatTemplate,
    ImageSpec,
    PromptSpec,
    VisionSpec,
    from_dict,
)
from tinyalign.training.backbone import (
    Backbone,
    Places,
    load_backbone,
    read_places,
    save_places,
)
from tinyalign.training.lm import load_lm, load_tokenizer, token_table
from tinyalign.training.modules import (
    Compressor,
    Connector,
    ConnectorShape,
    MemoryShape,
    Projector,
    RagConnector,
    SoftVocabulary,
)
from tinyalign.training.recipe import Recipe
from tinyalign.training.sources import lm_gguf
from tinyalign.training.vision import load_vision
from tinyalign.training.vocabulary import COLOURS, NUMBERS, PLACES, name_ids, soft_vocabulary

DEFAULT_WEIGHTS = Path(__file__).parent / "weights"
LARGE = 1_000_000  # numbers of a matrix that is stored in int8


@dataclass
class Parts:
    """The whole model on the torch side."""

    vision: nn.Module  # pixels [B, 3, S, S] -> cells [B, C, Dv]
    lm: PreTrainedModel
    tokenizer: Tokenizer
    connector: Connector | Projector
    compressor: Compressor
    rag_connector: RagConnector
    prompt: PromptSpec
    vocabulary_ids: Tensor  # [Vs]
    class_names: Tensor  # [classes, name slots], indices into vocabulary_ids
    keys: KeyArrays | None = None
    next_tokens: NDArray[np.uint32] | None = None  # [V], see next_tokens.py
    image: ImageSpec = field(default_factory=ImageSpec)
    seen: VisionSpec = field(default_factory=VisionSpec)
    name: str = "default"
    chat: ChatTemplate | None = None
    places: Places | None = None  # of encoder and LM, where they are not the default ones

    @property
    def embeddings(self) -> Tensor:
        """The LM's token embeddings [V, D], frozen."""
        return token_table(self.lm)

    @property
    def remembers(self) -> bool:
        """Whether there is a memory: another model may have none, and so no key recipe."""
        return self.keys is not None

    @property
    def slots(self) -> int:
        """T, the number of image tokens."""
        return sum(piece for piece in self.prompt.image if isinstance(piece, int))

    @property
    def own_connector(self) -> Connector:
        """The connector of the default model, which speaks in words."""
        assert isinstance(self.connector, Connector)
        return self.connector

    @property
    def trained(self) -> dict[str, nn.Module]:
        """What is trained here, by name: not another model's own connector."""
        own = {"connector": self.connector} if isinstance(self.connector, Connector) else {}
        return {**own, "compressor": self.compressor, "rag_connector": self.rag_connector}

    def image_tokens(self, cells: Tensor) -> Tensor:
        """cells [B, C, Dv] -> image tokens [B, T, D]."""
        made = self.connector(cells)
        tokens: Tensor = made if isinstance(self.connector, Projector) else made[0]
        return tokens

    def to(self, device: torch.device) -> None:
        """Move all modules to a device."""
        for module in (*self.trained.values(), self.lm):
            module.to(device)

    def finish(self) -> None:
        """Round what was trained as it is saved, so that every later use sees the same, and put the
        learned copy bonus into the prompt's description, where it is used."""
        for module in self.trained.values():
            module.load_state_dict(unpacked(packed(module)))
        bonus = tuple(round(value, 3) for value in self.rag_connector.copy_bonus.tolist())
        self.prompt = dataclasses.replace(self.prompt, copy_bonus=bonus)


def new_parts(
    recipe: Recipe,
    class_names: Sequence[str],
    names: Sequence[str],
    kinds: Sequence[str],
    backbone: Backbone | None = None,
) -> Parts:
    """Untrained parts around the default encoder and LM, or others.

    Args:
        recipe: shapes and prompt.
        class_names: the classifier's classes, in order.
        names: names of the training pictures.
        kinds: words that tell the kind of a thing.
        backbone: other encoder and LM; there are no classes then.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = load_tokenizer(lm_gguf()) if backbone is None else backbone.tokenizer
    words = [*COLOURS, *NUMBERS, *PLACES, *kinds]
    vocabulary_ids = torch.tensor(soft_vocabulary(tokenizer, [*class_names, *names], words))
    index = {int(token): i for i, token in enumerate(vocabulary_ids)}
    slots = recipe.connector.name_slots
    spelled = [[index[t] for t in name_ids(tokenizer, n, slots)] for n in class_names]
    classes = torch.tensor(spelled, dtype=torch.long).reshape(-1, slots)
    shapes = recipe.connector, recipe.memory
    return build_parts(*shapes, recipe.prompt, vocabulary_ids, classes, backbone)


def build_parts(
    connector_shape: ConnectorShape,
    memory_shape: MemoryShape,
    prompt: PromptSpec,
    vocabulary_ids: Tensor,
    class_names: Tensor,
    backbone: Backbone | None = None,
) -> Parts:
    """Modules of these shapes around the fetched encoder and LM, or others."""
    if backbone is None:
        encoder, gguf = load_vision(), lm_gguf()
        lm, tokenizer = load_lm(gguf), load_tokenizer(gguf)
        vision: nn.Module = encoder
        classifier: tuple[Tensor, Tensor] = (encoder.classifier.weight, encoder.classifier.bias)
    else:
        vision, lm, tokenizer = backbone.vision, backbone.lm, backbone.tokenizer
        classifier = torch.zeros(0, backbone.width), torch.zeros(0)
    embeddings = token_table(lm)
    vocabulary = SoftVocabulary(embeddings[vocabulary_ids], vocabulary_ids)
    connector = Connector(connector_shape, vocabulary, *classifier, class_names)
    compressor = Compressor(memory_shape)
    radius = embeddings.float().norm(dim=-1).mean().item()
    rag_connector = RagConnector(memory_shape, vocabulary, radius)
    parts = Parts(
        vision, lm, tokenizer, connector, compressor, rag_connector, prompt, vocabulary_ids,
        class_names,
    )  # fmt: skip
    if backbone is None:
        return parts
    return dataclasses.replace(
        parts, image=backbone.image, seen=backbone.seen, name=backbone.name, chat=backbone.chat,
        places=backbone.places,
    )  # fmt: skip


def save_parts(parts: Parts, directory: Path) -> None:
    """Write the trained parts (not the LM's LoRA, which peft writes) as small safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    names = {"vocabulary_ids": parts.vocabulary_ids.int(), "class_names": parts.class_names.int()}
    connector = parts.own_connector
    save_file(packed(connector) | names, directory / "connector.safetensors")
    save_file(packed(parts.compressor), directory / "compressor.safetensors")
    save_file(packed(parts.rag_connector), directory / "rag_connector.safetensors")
    if parts.keys is not None:
        save_key_arrays(directory / "key.npz", parts.keys)
    description = {
        "connector": dataclasses.asdict(connector.shape),
        "memory": dataclasses.asdict(parts.compressor.shape),
        "prompt": dataclasses.asdict(parts.prompt),
    }
    (directory / "recipe.json").write_text(json.dumps(description, indent=1) + "\n")
    if parts.places is not None:
        save_places(parts.places, directory)


def packed(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's parameters in fp16; a matrix of a million numbers or more in int8, with an fp16
    scale for each row under the name "... scale"."""
    tensors: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if value.ndim == 2 and value.numel() >= LARGE:
            scale = (value.abs().amax(1, keepdim=True) / 127).clamp(min=1e-6).half()
            steps = (value / scale.float()).round().clamp(-127, 127)
            tensors |= {name: steps.to(torch.int8), f"{name} scale": scale}
        else:
            tensors[name] = value.half().contiguous()
    return tensors


def unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters f32 that `packed` has stored."""
    return {
        name: value.float() * tensors.get(f"{name} scale", torch.ones(())).float()
        for name, value in tensors.items()
        if not name.endswith(" scale")
    }


def load_parts(directory: Path = DEFAULT_WEIGHTS, merge_lora: bool = True) -> Parts:
    """The trained model: fetched weights with what `directory` holds; LoRA merged into the LM.

    Raises InputError when the directory is not one that `save_parts` wrote.
    """
    try:
        description = json.loads((directory / "recipe.json").read_text())
        if base := description.get("base"):
            raise InputError(f"{directory} holds a memory for {base['name']}: it needs --from")
        saved = load_file(directory / "connector.safetensors")
    except (OSError, ValueError) as error:
        raise InputError(f"{directory} holds no trained weights ({error})") from None
    places = read_places(directory)
    parts = build_parts(
        from_dict(ConnectorShape, description["connector"], "connector"),
        from_dict(MemoryShape, description["memory"], "memory"),
        from_dict(PromptSpec, description["prompt"], "prompt"),
        saved.pop("vocabulary_ids").long(),
        saved.pop("class_names").long(),
        None if places is None else load_backbone(places),
    )
    parts.connector.load_state_dict(unpacked(saved))
    for name in ("compressor", "rag_connector"):
        stored = load_file(directory / f"{name}.safetensors")
        getattr(parts, name).load_state_dict(unpacked(stored))
    if (directory / "key.npz").exists():
        parts.keys = load_key_arrays(directory / "key.npz")
    if (directory / NEXT_TOKENS).exists():
        parts.next_tokens = np.fromfile(directory / NEXT_TOKENS, "<u4")
    if merge_lora and (directory / "lora").exists():
        from peft import PeftModel

        parts.lm = PeftModel.from_pretrained(parts.lm, directory / "lora").merge_and_unload()
    for module in (parts.connector, parts.compressor, parts.rag_connector, parts.lm):
        module.eval().requires_grad_(False)
    return parts


def copy_weights(source: Path, target: Path) -> None:
    """Replace the files of a weights directory by those of another."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, target / path.name)
