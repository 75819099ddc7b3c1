"""Vision encoders of other families, from local directories, as modules that give cells.

    encoder = load_encoder(Path("clip-vit-large-patch14-336"), layer=-2)
    cells = encoder.module(pixels)  # f32 [B, 3, S, S] -> f32 [B, 1 + P, Dv]

Cells are the features of the patches in reading order, without class and register tokens, behind
their mean. How a picture becomes pixels is read from the same directory.

`layer` says which features, counted back from the last block as in transformers' `hidden_states`:
-2 is what the last block but one gives, as LLaVA takes it from CLIP. -1, the default, is what the
family itself calls its last hidden state:

    SigLIP, DINOv2, ViT, timm   after the last block and the final norm
    CLIP                        after the last block; its final norm is for the class token only
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipImageProcessor,
    SiglipVisionModel,
    ViTImageProcessor,
    ViTModel,
)

from tinyalign.runtime.errors import InputError
from tinyalign.runtime.manifest import ImageSpec, Resample, VisionSpec
from tinyalign.training.models.checkpoint import (
    Checkpoint,
    open_checkpoint,
    read_json,
    weight_files,
)

TOWERS: Mapping[str, type[PreTrainedModel]] = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "vit": ViTModel,
}
SUPPORTED = f"{', '.join(TOWERS)} and models of timm"
PROCESSORS: Mapping[str, Any] = {
    "CLIP": CLIPImageProcessor,
    "Siglip": SiglipImageProcessor,
    "Bit": BitImageProcessor,
    "ViT": ViTImageProcessor,
}
RESAMPLE: Mapping[int, Resample] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Encoder:
    """A vision encoder and all that the runtime must know of it."""

    module: nn.Module  # pixels f32 [B, 3, S, S] -> cells f32 [B, 1 + P, Dv], in eval mode
    image: ImageSpec
    vision: VisionSpec
    model_type: str  # as transformers names it; "timm/" and the architecture for timm


def load_encoder(directory: Path, layer: int = -1) -> Encoder:
    """The vision encoder in a directory as Hugging Face keeps them: of a family of `SUPPORTED`, by
    itself or within a whole CLIP or SigLIP.

    Raises InputError where the family is another one, where the directory is incomplete or
    contradicts itself, and where there is no such layer.
    """
    if not directory.is_dir():
        raise InputError(f"no model directory at {directory}")
    config = read_json(directory / "config.json")
    if "architecture" in config and "model_type" not in config:
        return load_timm(directory, config, layer)
    checkpoint = open_checkpoint(directory)
    check_family(checkpoint)
    image = image_spec(directory, checkpoint.model_type)
    tower = load_tower(checkpoint)
    fit_to(tower, image.size, directory)
    module = PatchFeatures(tower, image.size, layer)
    return finished(module, image, checkpoint.model_type)


def finished(module: nn.Module, image: ImageSpec, model_type: str) -> Encoder:
    """An encoder around a module, whose output is measured on one empty picture."""
    module.eval().requires_grad_(False)
    with torch.inference_mode():
        cells = module(torch.zeros(1, 3, image.size, image.size))  # [1, 1 + P, Dv]
    return Encoder(module, image, VisionSpec(cells.shape[1], cells.shape[2]), model_type)


# ---- towers of transformers --------------------------------------------


class PatchFeatures(nn.Module):
    """A tower of `TOWERS` for pictures of one size: pixels in, cells out.

    The tower is cut: blocks after `layer` are left out. `norm` False leaves out the final norm also
    where `layer` is -1, as `hidden_states[-1]` does.
    """

    def __init__(
        self, tower: PreTrainedModel, size: int, layer: int = -1, norm: bool = True
    ) -> None:
        super().__init__()
        cut(tower, layer, norm)
        tower.set_attn_implementation("eager")  # 10 nodes a block fewer than "sdpa", equally fast
        self.tower = tower
        self.patches = (size // patch_size(tower.config)) ** 2

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels f32 [B, 3, S, S] -> cells f32 [B, 1 + P, Dv]."""
        states = self.tower(pixel_values=pixels).last_hidden_state  # class and registers first
        return with_mean(states[:, -self.patches :])


def with_mean(patches: Tensor) -> Tensor:
    """Patches [B, P, Dv] -> cells [B, 1 + P, Dv]."""
    return torch.cat((patches.mean(1, keepdim=True), patches), 1)


def cut(tower: PreTrainedModel, layer: int, norm: bool) -> None:
    """Leave out the blocks after a layer, and the final norm unless it is the last layer's."""
    body: Any = getattr(tower, "vision_model", tower)
    blocks = body.encoder.layers if hasattr(body.encoder, "layers") else body.encoder.layer
    check_layer(layer, len(blocks))
    del blocks[len(blocks) + 1 + layer :]
    if layer < -1 or not norm:
        name = "post_layernorm" if hasattr(body, "post_layernorm") else "layernorm"
        setattr(body, name, nn.Identity())


def check_layer(layer: int, blocks: int) -> None:
    """Refuse a layer that an encoder of so many blocks does not have."""
    if not -blocks - 1 <= layer <= -1:
        raise InputError(
            f"no layer {layer}: the encoder has {blocks} blocks, so layers are -1 (after the last) "
            f"to {-blocks - 1} (before the first)"
        )


def check_family(checkpoint: Checkpoint) -> None:
    """Refuse a family that cannot be read as an encoder."""
    family = checkpoint.model_type
    if family.startswith("siglip2"):
        raise InputError(
            f"{checkpoint.directory} is a NaFlex SigLIP2, which wants pictures in any number of "
            "patches: take a SigLIP2 of fixed resolution (its model_type is siglip)"
        )
    if family not in TOWERS:
        raise InputError(
            f"{checkpoint.directory} is of the family {family}, which is no vision encoder that "
            f"can be exported: supported are {SUPPORTED}"
        )


def load_tower(checkpoint: Checkpoint) -> PreTrainedModel:
    """The vision tower of a checkpoint, with every weight from its files. Raises InputError."""
    kind: Any = TOWERS[checkpoint.model_type]
    logging.disable(logging.WARNING)  # what matters of the warnings is refused here
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory)
        config = getattr(config, "vision_config", config)
        config.vision_use_head = False  # SigLIP's pooling of the patches
        tower, report = kind.from_pretrained(
            checkpoint.directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported here, in one line
            output_loading_info=True,
            **({"add_pooling_layer": False} if kind is ViTModel else {}),
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{checkpoint.directory} cannot be loaded: {reason}") from None
    finally:
        logging.disable(logging.NOTSET)
    for name in sorted(report["mismatched_keys"]):
        raise InputError(
            f"{checkpoint.directory} contradicts itself: {name} has another shape than config.json "
            "makes it"
        )
    for name in sorted(report["missing_keys"]):
        raise InputError(f"{checkpoint.directory} is incomplete: no file holds the tensor {name}")
    return cast(PreTrainedModel, tower)


def fit_to(tower: PreTrainedModel, size: int, directory: Path) -> None:
    """Check that a tower takes pictures of this size; DINOv2 is made to.

    DINOv2 is trained on other sizes than it is used on and stretches its position embeddings to the
    picture. Here that is done once, so that no graph has to.
    """
    config = tower.config
    patch = patch_size(config)
    if config.num_channels != 3:
        raise InputError(f"{directory} takes pictures of {config.num_channels} channels, not 3")
    if isinstance(tower, Dinov2Model | Dinov2WithRegistersModel):
        if size % patch:
            raise InputError(
                f"{directory} contradicts itself: {PREPROCESSOR} makes pictures of {size} x {size} "
                f"pixels, which patches of {patch} x {patch} do not fill"
            )
        embeddings: Any = tower.embeddings
        tokens = torch.zeros(1, 1 + (size // patch) ** 2, config.hidden_size)
        with torch.no_grad():
            positions = embeddings.interpolate_pos_encoding(tokens, size, size)
        embeddings.position_embeddings = nn.Parameter(positions)
    elif config.image_size != size:
        raise InputError(
            f"{directory} contradicts itself: {PREPROCESSOR} makes pictures of {size} x {size} "
            f"pixels, but config.json names an image_size of {config.image_size}"
        )


def patch_size(config: PretrainedConfig) -> int:
    """The side of a tower's square patches in pixels."""
    size = config.patch_size
    if not isinstance(size, int) or size < 1:
        raise InputError(f"config.json has a patch_size of {size}, not one positive number")
    return size


# ---- preprocessing --------------------------------------------


def image_spec(directory: Path, model_type: str) -> ImageSpec:
    """What preprocessor_config.json says, defaults filled in by transformers' own class.

    Raises InputError where the file is missing or asks for what the runtime does not do.
    """
    path, config = read_preprocessor(directory)
    kind = processor_class(config, path, model_type)
    try:
        return spec_of(kind(**config), path)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be understood: {reason}") from None


def read_preprocessor(directory: Path) -> tuple[Path, dict[str, Any]]:
    """preprocessor_config.json, or the part of processor_config.json that took its place where
    transformers 5 saved pictures' and texts' processors together."""
    path, together = directory / PREPROCESSOR, directory / "processor_config.json"
    if path.is_file():
        return path, read_json(path)
    if together.is_file() and isinstance(part := read_json(together).get("image_processor"), dict):
        return together, part
    raise InputError(
        f"{directory} has no {PREPROCESSOR}: without it nobody knows how pictures must be resized "
        "and scaled; take it from where the weights come from"
    )


def processor_class(config: Mapping[str, Any], path: Path, model_type: str) -> Any:
    """The (slow, Pillow's) image processor that a preprocessor_config.json is for."""
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    if named is None:  # old files name none: then it is the family's
        family = {"clip": "CLIP", "siglip": "Siglip", "dinov2": "Bit", "vit": "ViT"}
        return PROCESSORS[family[model_type.split("_")[0]]]
    name = str(named).removesuffix("Fast")
    name = name.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if name not in PROCESSORS:
        known = ", ".join(f"{known}ImageProcessor" for known in PROCESSORS)
        raise InputError(f"{path} is for a {named}, which the runtime cannot follow: only {known}")
    return PROCESSORS[name]


def spec_of(processor: Any, path: Path) -> ImageSpec:
    """An image processor of `PROCESSORS` as the manifest describes it."""
    if not processor.do_resize:
        raise InputError(f"{path} does not resize pictures: the encoder needs all of one size")
    if processor.resample not in RESAMPLE:
        names = ", ".join(f"{number} ({name})" for number, name in RESAMPLE.items())
        raise InputError(f"{path} has resample {processor.resample}: only {names} can be followed")
    size, cropped = dict(processor.size), getattr(processor, "do_center_crop", False)
    crop = side(processor.crop_size, path) if cropped else None
    resize = None
    if set(size) == {"shortest_edge"}:
        if crop is None:
            raise InputError(f"{path} resizes one edge only and crops nothing: no fixed size")
        resize, final = size["shortest_edge"], crop
        if resize < final:
            raise InputError(f"{path} crops {final} pixels out of {resize}")
    else:
        final = side(size, path)
        if crop not in (None, final):
            raise InputError(f"{path} squashes to {final} and then crops to {crop}: not supported")
    # (rgb * factor - mean) / std, written for rgb of 0..255
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    if processor.do_normalize and 0 in list(processor.image_std):
        raise InputError(f"{path} has an image_std of {processor.image_std}: nothing divides by 0")
    mean = processor.image_mean if processor.do_normalize else 0.0
    std = processor.image_std if processor.do_normalize else 1.0
    return ImageSpec(
        size=final,
        mean=channels(mean, factor, path),
        scale=channels(std, factor, path),
        resample=RESAMPLE[processor.resample],
        fit="squash" if resize is None else "crop",
        resize=resize,
    )


def side(size: Mapping[str, int], path: Path) -> int:
    """The side of a square size; raises InputError for others."""
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise InputError(f"{path} makes pictures of {dict(size)}: only squares are supported")
    return size["height"]


def channels(values: Any, factor: float, path: Path) -> tuple[float, float, float]:
    """One number or three, for colours of 0..1 or so, as three for 0..255."""
    values = [values] * 3 if isinstance(values, int | float) else values
    three = [float(value) / factor for value in values]
    if len(three) != 3 or not all(map(math.isfinite, three)):
        raise InputError(f"{path} does not give three numbers for three colours")
    red, green, blue = three
    return red, green, blue


# ---- timm --------------------------------------------


class TimmFeatures(nn.Module):
    """A model of timm: pixels in, cells out. Grids of convolutional ones count as patches."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        super().__init__()
        self.model: Any = model
        self.layer = layer
        if layer < -1:
            if not hasattr(model, "blocks") or not hasattr(model, "forward_intermediates"):
                raise InputError(
                    f"layer {layer}: this model of timm gives its last layer only (-1)"
                )
            blocks = len(cast(nn.ModuleList, model.blocks))
            check_layer(layer, blocks)
            if layer == -blocks - 1:
                raise InputError(f"layer {layer}: timm gives nothing before the first block")

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels f32 [B, 3, S, S] -> cells f32 [B, 1 + P, Dv]."""
        if self.layer < -1:
            place = len(self.model.blocks) + self.layer
            states = self.model.forward_intermediates(
                pixels,
                indices=[place],
                norm=False,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )[0]  # without class and register tokens
            return with_mean(states)
        states = self.model.forward_features(pixels)
        if states.ndim == 3:  # [B, class and registers + P, Dv]
            return with_mean(states[:, getattr(self.model, "num_prefix_tokens", 0) :])
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return with_mean(states.flatten(1, 2))
        return with_mean(states.flatten(2).transpose(1, 2))


def load_timm(directory: Path, config: dict[str, Any], layer: int) -> Encoder:
    """A model as timm saves it for the hub: config.json and model.safetensors."""
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise InputError(
            f"{directory} is a model of timm, which cannot be imported ({error}): pip install timm"
        ) from None
    name = str(config["architecture"])
    if not timm.is_model(name):
        raise InputError(f"{directory} is a {name}, which timm {timm.__version__} does not know")
    image = timm_image_spec(directory, config)
    (weights,) = weight_files(directory)
    arguments = config.get("model_args") or {}
    try:
        model = timm.create_model(
            name, pretrained=False, num_classes=config.get("num_classes", 1000), **arguments
        )
        model.load_state_dict(load_file(weights))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{directory} cannot be loaded as a {name}: {reason:.300}") from None
    return finished(TimmFeatures(model.eval(), layer), image, f"timm/{name}")


def timm_image_spec(directory: Path, config: dict[str, Any]) -> ImageSpec:
    """timm's `pretrained_cfg` as the manifest describes preprocessing. Raises InputError."""
    path, known = directory / "config.json", config.get("pretrained_cfg") or config
    for key in ("input_size", "mean", "std", "interpolation"):
        if key not in known:
            raise InputError(f"{path} has no {key}: nobody knows how pictures must be prepared")
    depth, height, width = known["input_size"]
    if depth != 3 or height != width:
        raise InputError(
            f"{path} wants pictures of {known['input_size']}: only [3, S, S] is supported"
        )
    if known["interpolation"] not in RESAMPLE.values():
        raise InputError(f"{path} has the interpolation {known['interpolation']}: not supported")
    share, mode = known.get("crop_pct", 0.875), known.get("crop_mode", "center")
    if mode not in ("center", "squash") or (mode == "squash" and share != 1):
        raise InputError(f"{path} has crop_mode {mode} with crop_pct {share}: not supported")
    return ImageSpec(
        size=height,
        mean=channels(known["mean"], 1 / 255, path),
        scale=channels(known["std"], 1 / 255, path),
        resample=known["interpolation"],
        fit="crop" if mode == "center" else "squash",
        resize=math.floor(height / share) if mode == "center" else None,
    )
