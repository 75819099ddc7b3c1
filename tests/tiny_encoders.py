"""A tiny model with random weights of every family of encoders, as transformers has it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BaseImageProcessor,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

SIZE, PATCH, WIDTH, LAYERS = 48, 16, 64, 3
PATCHES = (SIZE // PATCH) ** 2
SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TIMM_VIT = {"img_size": SIZE, "depth": LAYERS, "embed_dim": WIDTH, "num_heads": 4}
WORDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
SQUARE = {"height": SIZE, "width": SIZE}
CROP = {"size": {"shortest_edge": SIZE + 8}, "crop_size": SQUARE}


def pixels(count: int = 3) -> Tensor:
    """Inputs [count, 3, S, S], always the same."""
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Family:
    """A tiny model as it is saved, and which part of it sees."""

    model: PreTrainedModel
    before: int  # tokens before the patches
    processor: BaseImageProcessor

    @property
    def tower(self) -> nn.Module:
        """The part with patches in its last hidden state."""
        if isinstance(self.model, CLIPModel | SiglipModel):
            kind = CLIPVisionModel if isinstance(self.model, CLIPModel) else SiglipVisionModel
            tower = kind(self.model.config.vision_config).eval()
            tower.vision_model = self.model.vision_model
            return tower
        return getattr(self.model, "vit", self.model)

    def save(self, directory: Path) -> Path:
        """Write it as Hugging Face directories hold models."""
        self.model.save_pretrained(directory)
        self.processor.save_pretrained(directory)
        return directory

    def patches(self, pixels: Tensor, layer: int = -1) -> Tensor:
        """What transformers gives for pixels [B, 3, S, S]: patches [B, P, Dv]."""
        with torch.inference_mode():
            output = self.tower(pixels, output_hidden_states=True)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return states[:, self.before :]


def families() -> dict[str, Family]:
    """All of them by their model_type."""
    torch.manual_seed(0)
    dinov2 = SHAPE | {"image_size": 80, "mlp_ratio": 2}  # positions are stretched to SIZE
    models = {
        "clip": CLIPModel(CLIPConfig(vision_config=SHAPE, text_config=WORDS, projection_dim=8)),
        "clip_vision_model": CLIPVisionModel(CLIPVisionConfig(**SHAPE)),
        "siglip": SiglipModel(SiglipConfig(vision_config=SHAPE, text_config=WORDS)),
        "siglip_vision_model": SiglipVisionModel(SiglipVisionConfig(**SHAPE)),
        "dinov2": Dinov2Model(Dinov2Config(**dinov2)),
        "dinov2_with_registers": Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**dinov2, num_register_tokens=2)
        ),
        "vit": ViTForImageClassification(ViTConfig(**SHAPE, num_labels=5)),
    }
    before = {"clip": 1, "siglip": 0, "dinov2": 1, "vit": 1}
    processors = {
        "clip": CLIPImageProcessor(**CROP),
        "siglip": SiglipImageProcessor(size=SQUARE),
        "dinov2": BitImageProcessor(**CROP),
        "vit": ViTImageProcessor(size=SQUARE),
    }
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():  # so that nothing is without effect
                parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1) * 0.5)
        kind = name.split("_")[0]
        tokens = before[kind] + 2 * name.endswith("registers")
        found[name] = Family(model.eval(), tokens, processors[kind])
    return found


# ---- timm --------------------------------------------


class AnyName(type):
    """A class whose attributes are all there, as classes."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


def import_timm() -> ModuleType | None:
    """timm, if it is installed. It imports torchvision for what is not used here: where that is
    missing, names stand in for it while timm is imported."""
    if find_spec("timm") is None:
        return None
    names = []
    if find_spec("torchvision") is None:
        folders = ("transforms", "datasets", "ops", "models")
        files = ("transforms.functional", "ops.misc", "models.feature_extraction")
        names = ["torchvision", *(f"torchvision.{name}" for name in folders + files)]
    for name in names:
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = []
        module.__getattr__ = lambda attribute: AnyName(attribute, (), {})
    try:
        return import_module("timm")
    finally:  # torch's exporter must not find them
        for name in names:
            del sys.modules[name]


def timm_folder(timm: ModuleType, directory: Path, name: str, **changes: object) -> Path:
    """A model with random weights as timm saves it for the hub."""
    torch.manual_seed(0)
    arguments = TIMM_VIT if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=7, **arguments)
    directory.mkdir()
    save_file(model.state_dict(), directory / "model.safetensors")
    config = {
        "architecture": name,
        "num_classes": 7,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, SIZE, SIZE],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
    }
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory
