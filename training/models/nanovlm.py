"""A nanoVLM checkpoint (config.json, model.safetensors of its own kind) in transformers' modules.

Its vision encoder is SigLIP's, its decoder a Llama, under other names; between them the patches of
a square are joined (pixel shuffle) and go through one matrix. The tokenizer is not part of such a
checkpoint: config.json names the one to put beside it (`lm_tokenizer`, with `vlm_extra_tokens`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tinyalign.runtime.errors import InputError
from tinyalign.runtime.manifest import ImageSpec
from tinyalign.training.models.checkpoint import read_json, weight_files
from tinyalign.training.models.language_models import check_memory, memory_needed
from tinyalign.training.models.vlm_prompt import Marks

NUMBERS = (
    "vit_hidden_dim", "vit_inter_dim", "vit_patch_size", "vit_img_size", "vit_n_heads",
    "vit_n_blocks", "vit_ln_eps", "lm_hidden_dim", "lm_inter_dim", "lm_rms_eps", "lm_re_base",
    "lm_max_position_embeddings", "lm_vocab_size", "lm_n_heads", "lm_n_kv_heads", "lm_n_blocks",
    "mp_pixel_shuffle_factor", "mp_image_token_length",
)  # fmt: skip
BLOCK = {  # what a block's modules are called there and in transformers
    "vision": {
        "ln1": "layer_norm1", "ln2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    },
    "decoder": {
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
        **{f"attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkv"},
        "attn.out_proj": "self_attn.o_proj",
        **{f"mlp.{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    },
}  # fmt: skip


class Shuffle(nn.Module):
    """Joins squares of s x s patches and maps each to one image token."""

    def __init__(self, factor: int, weight: Tensor) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(weight)  # [D, s s Dv]

    def forward(self, patches: Tensor) -> Tensor:
        """patches f32 [B, P, Dv] -> image tokens f32 [B, P / s^2, D]."""
        side, s = int(patches.shape[1] ** 0.5), self.factor
        squares = (-1, side // s, s, side // s, s, patches.shape[2])
        grid = patches.reshape(squares).transpose(2, 3)  # [B, rows, columns, s, s, Dv]
        tokens: Tensor = grid.flatten(3).flatten(1, 2) @ self.weight.T
        return tokens


def is_one(directory: Path) -> bool:
    """Whether a directory's config.json is nanoVLM's."""
    return (directory / "config.json").is_file() and "vit_hidden_dim" in read_json(
        directory / "config.json"
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The config; raises InputError for one that lacks something or is of another kind."""
    path = directory / "config.json"
    config = read_json(path)
    for name in NUMBERS:
        if not isinstance(config.get(name), (int, float)):
            raise InputError(f"{path} has no {name}, or it is no number")
    for name in ("lm_chat_template", "vlm_extra_tokens"):
        if not config.get(name):
            raise InputError(f"{path} has no {name}: too old a nanoVLM to be read")
    if config.get("vit_cls_flag"):
        raise InputError(f"{path}: an encoder that gives its class token only (vit_cls_flag)")
    if config.get("lm_attn_scaling", 1.0) != 1:
        raise InputError(f"{path}: lm_attn_scaling other than 1 is not supported")
    side = config["vit_img_size"] // config["vit_patch_size"] / config["mp_pixel_shuffle_factor"]
    if side**2 != config["mp_image_token_length"]:
        raise InputError(f"{path} contradicts itself: {side}^2 image tokens are not "
                         f"mp_image_token_length {config['mp_image_token_length']}")  # fmt: skip
    if not (directory / "tokenizer.json").is_file():
        raise InputError(
            f"{directory} has no tokenizer.json: put that of {config.get('lm_tokenizer')} there, "
            "with the tokens of vlm_extra_tokens added (AutoTokenizer.save_pretrained)"
        )
    return config


def read_modules(
    directory: Path, config: dict[str, Any]
) -> tuple[PreTrainedModel, nn.Module, PreTrainedModel]:
    """Vision tower, connector from patches to image tokens, language model; raises InputError."""
    (path,) = weight_files(directory)
    saved = {name: value.float() for name, value in load_file(path).items()}
    check_memory(memory_needed([value.numel() for value in saved.values()]))
    vision: dict[str, Tensor] = {}
    decoder: dict[str, Tensor] = {}
    for name, value in saved.items():
        if name.startswith("vision_encoder."):
            vision |= vision_tensors(name.removeprefix("vision_encoder."), value)
        elif name.startswith("decoder."):
            decoder |= decoder_tensors(name.removeprefix("decoder."), value)
        elif name != "MP.proj.weight":
            raise InputError(f"{path} holds {name}, which is no part of a nanoVLM")
    if "MP.proj.weight" not in saved:
        raise InputError(f"{path} is incomplete: MP.proj.weight is missing")
    make: Any = LlamaForCausalLM
    tower, lm = SiglipVisionModel(vision_config(config)), make(decoder_config(config))
    if config.get("lm_tie_weights", True):
        names = "lm_head.weight", "model.embed_tokens.weight"  # saved once
        for name, other in (names, names[::-1]):
            if name not in decoder and other in decoder:
                decoder[name] = decoder[other]
    fill(tower, {f"vision_model.{name}": value for name, value in vision.items()}, path)
    fill(lm, decoder, path)
    shuffle = Shuffle(config["mp_pixel_shuffle_factor"], saved["MP.proj.weight"])
    return tower, shuffle, lm


def fill(model: Any, tensors: dict[str, Tensor], path: Path) -> None:
    """Give a module its weights, all of them."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[8:])
        raise InputError(f"{path} does not fit its config.json: {reason:.200}") from None
    model.eval().requires_grad_(False)


def vision_tensors(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of the encoder under transformers' names; queries, keys and values come joined."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
        number, module, kind = match.groups()
        place = f"encoder.layers.{number}"
        if module == "attn.qkv_proj":
            parts = zip("qkv", value.chunk(3), strict=True)
            return {f"{place}.self_attn.{x}_proj.{kind}": part for x, part in parts}
        return {f"{place}.{BLOCK['vision'].get(module, module)}.{kind}": value}
    if name == "patch_embedding.position_embedding":  # [1, P, Dv]
        return {"embeddings.position_embedding.weight": value[0]}
    name = name.replace("patch_embedding.conv", "embeddings.patch_embedding")
    return {name.replace("layer_norm.", "post_layernorm."): value}


def decoder_tensors(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of the decoder under transformers' names."""
    if name.endswith("inv_freq"):
        return {}  # computed anew from lm_re_base
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name):
        number, module = match.groups()
        return {f"model.layers.{number}.{BLOCK['decoder'].get(module, module)}.weight": value}
    names = {
        "token_embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    return {names.get(name, name): value}


def vision_config(config: dict[str, Any]) -> SiglipVisionConfig:
    """The encoder's config, for transformers."""
    make: Any = SiglipVisionConfig
    made: SiglipVisionConfig = make(
        hidden_size=config["vit_hidden_dim"],
        intermediate_size=config["vit_inter_dim"],
        num_hidden_layers=config["vit_n_blocks"],
        num_attention_heads=config["vit_n_heads"],
        image_size=config["vit_img_size"],
        patch_size=config["vit_patch_size"],
        layer_norm_eps=config["vit_ln_eps"],
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )
    return made


def decoder_config(config: dict[str, Any]) -> LlamaConfig:
    """The decoder's config, for transformers."""
    make: Any = LlamaConfig
    made: LlamaConfig = make(
        vocab_size=config["lm_vocab_size"],
        hidden_size=config["lm_hidden_dim"],
        intermediate_size=config["lm_inter_dim"],
        num_hidden_layers=config["lm_n_blocks"],
        num_attention_heads=config["lm_n_heads"],
        num_key_value_heads=config["lm_n_kv_heads"],
        rms_norm_eps=config["lm_rms_eps"],
        rope_theta=float(config["lm_re_base"]),
        max_position_embeddings=config["lm_max_position_embeddings"],
        tie_word_embeddings=bool(config.get("lm_tie_weights", True)),
    )
    return made


def picture_spec(config: dict[str, Any]) -> ImageSpec:
    """Pictures are squashed and scaled to 0..1."""
    return ImageSpec(
        size=config["vit_img_size"],
        mean=(0.0, 0.0, 0.0),
        scale=(255.0, 255.0, 255.0),
        resample="bicubic",
    )


def marks_of(config: dict[str, Any]) -> Marks:
    """A picture's token, behind the one that calls it the whole picture (if there is one)."""
    extra = config["vlm_extra_tokens"]
    if "image_token" not in extra:
        raise InputError("config.json names no image_token among vlm_extra_tokens")
    return Marks(extra["image_token"], left=extra.get("global_image_token", ""), listed=False)
