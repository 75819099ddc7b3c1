"""Whole vision-language models of other people, split into encoder, connector and language model.

    LLaVA                CLIP or SigLIP ─► patches of one layer ─► 2-layer MLP ─► P image tokens
    Idefics3, SmolVLM    SigLIP ─► patches ─► pixel shuffle, linear ─► P / s^2 image tokens
    nanoVLM              the same

The language model and its tokenizer stay as they are; the prompt's pieces come from the model's own
chat template, with one picture before the question. What is left out: Idefics3, SmolVLM
and nanoVLM can look at a large picture in tiles; here they look at all of it at once
(`do_image_splitting=False`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from tinyalign.runtime.errors import InputError
from tinyalign.runtime.manifest import ChatTemplate, ImageSpec, PromptSpec
from tinyalign.training.lm import round_embeddings
from tinyalign.training.models import nanovlm
from tinyalign.training.models.chat_template import check, derive, read_chat_tokenizer
from tinyalign.training.models.checkpoint import Checkpoint, in_one_line, open_checkpoint
from tinyalign.training.models.encoders import (
    Encoder,
    PatchFeatures,
    finished,
    image_spec,
    with_mean,
)
from tinyalign.training.models.language_models import (
    check_memory,
    memory_needed,
    read_tokenizer,
    tensor_shapes,
)
from tinyalign.training.models.supported import FAMILIES, check_exportable
from tinyalign.training.models.vlm_prompt import Marks, read_prompt
from tinyalign.training.modules import Projector


@dataclass(frozen=True)
class Vlm:
    """A vision-language model in torch, in parts. All in float32 and eval mode."""

    name: str
    model_type: str
    encoder: Encoder  # pixels f32 [B, 3, S, S] -> cells f32 [B, 1 + P, Dv], row 0 their mean
    connector: Projector  # cells -> image tokens f32 [B, T, D]
    tokens: int  # T
    lm: PreTrainedModel
    tokenizer: Tokenizer
    prompt: PromptSpec
    chat: ChatTemplate | None  # None: the template cannot be told, and why
    no_chat: str = ""


class WholePicture(nn.Module):
    """The encoder of Idefics3 and SmolVLM for pictures that fill its grid, with fixed positions."""

    def __init__(self, tower: Any, size: int) -> None:
        super().__init__()
        tower.set_attn_implementation("eager")
        self.embed, self.encoder = tower.embeddings.patch_embedding, tower.encoder
        self.norm = tower.post_layernorm
        seen: list[Tensor] = []
        table = tower.embeddings.position_embedding
        hook = table.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.inference_mode():
            tower(torch.zeros(1, 3, size, size))
        hook.remove()
        self.register_buffer("positions", table.weight.detach()[seen[0][0]].clone())  # [P, Dv]

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels f32 [B, 3, S, S] -> cells f32 [B, 1 + P, Dv]."""
        rows = self.embed(pixels).flatten(2).transpose(1, 2) + self.positions  # [B, P, Dv]
        states = self.encoder(inputs_embeds=rows, attention_mask=None).last_hidden_state
        return with_mean(self.norm(states))


def load_vlm(directory: Path, name: str | None = None) -> Vlm:
    """A vision-language model of transformers from its directory, which it is called by unless
    otherwise said.

    Raises InputError for another kind of model, an incomplete directory, a language model that
    cannot be exported, and a chat template that cannot be written as pieces.
    """
    if nanovlm.is_one(directory):
        return load_nanovlm(directory, name or directory.resolve().name)
    checkpoint = open_checkpoint(directory)
    if checkpoint.model_type not in SPLITS:
        raise InputError(
            f"{directory} is of the type {checkpoint.model_type}, which is no vision-language "
            f"model that can be split: supported are {', '.join(SPLITS)} and nanoVLM"
        )
    check_memory(memory_needed([torch.Size(s).numel() for s in tensor_shapes(checkpoint)]))
    model = read_vlm(checkpoint)
    image = picture_spec(directory, checkpoint.model_type)
    encoder, project = SPLITS[checkpoint.model_type](model, image)
    connector = Projector(project).eval().requires_grad_(False)
    with torch.inference_mode():
        cells = torch.zeros(1, encoder.vision.cells, encoder.vision.width)
        tokens = connector(cells).shape[1]
    lm = language_model(model)
    tokenizer = read_tokenizer(directory, lm.config.vocab_size)
    whole = read_chat_tokenizer(directory)
    marks = marks_of(model.config, whole)
    prompt = read_prompt(directory, whole, marks, tokenizer, tokens)
    chat = read_chat(whole)
    name = name or directory.resolve().name
    kind = checkpoint.model_type
    return Vlm(name, kind, encoder, connector, tokens, lm, tokenizer, prompt, *chat)


def load_nanovlm(directory: Path, name: str) -> Vlm:
    """The same for a directory that nanoVLM has written, completed with its tokenizer."""
    config = nanovlm.read_config(directory)
    tower, projector, lm = nanovlm.read_modules(directory, config)
    module = PatchFeatures(tower, config["vit_img_size"])
    encoder = finished(module, nanovlm.picture_spec(config), "siglip_vision_model")
    tokens = int(config["mp_image_token_length"])
    round_embeddings(lm)
    tokenizer = read_tokenizer(directory, lm.config.vocab_size)
    whole = read_chat_tokenizer(directory, config["lm_chat_template"])
    prompt = read_prompt(directory, whole, nanovlm.marks_of(config), tokenizer, tokens)
    connector = Projector(projector).eval().requires_grad_(False)
    chat = read_chat(whole)
    return Vlm(name, "nanovlm", encoder, connector, tokens, lm, tokenizer, prompt, *chat)


def read_chat(whole: Any) -> tuple[ChatTemplate | None, str]:
    """A tokenizer's chat template as texts, compared with the original; None and the reason where
    texts cannot tell it."""
    try:
        template = derive(whole)
        check(template, whole)
    except InputError as reason:
        return None, str(reason)
    return template, ""


def read_vlm(checkpoint: Checkpoint) -> Any:
    """The whole model with every weight from its files; raises InputError."""
    with in_one_line(checkpoint.directory):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint.directory,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported here, in one line
            output_loading_info=True,
        )
    model, report = loaded
    for key, said in (("missing_keys", "no file holds"), ("mismatched_keys", "of another shape:")):
        for name in sorted(map(str, report[key])):
            raise InputError(
                f"{checkpoint.directory} is no whole {checkpoint.model_type}: {said} {name}"
            )
    return model.eval().requires_grad_(False)


def language_model(model: Any) -> PreTrainedModel:
    """The language model by itself, with the same weights. Raises InputError."""
    config = model.config.text_config
    if config.model_type not in FAMILIES:
        raise InputError(
            f"its language model is a {config.model_type}: supported are {', '.join(FAMILIES)}"
        )
    check_exportable(config, 1)
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM
        lm = make.from_config(config)
    decoder = getattr(model.model, "language_model", None) or model.model.text_model
    lm.model, lm.lm_head = decoder, model.lm_head
    lm.set_attn_implementation("eager" if config.model_type == "gemma2" else "sdpa")
    round_embeddings(lm)
    lm.eval().requires_grad_(False)
    assert isinstance(lm, PreTrainedModel)
    return lm


# ---- one function for each family: encoder, and connector from patches [B, P, Dv] to tokens -----


def split_llava(model: Any, image: ImageSpec) -> tuple[Encoder, nn.Module]:
    """LLaVA: the patches of one layer of CLIP or SigLIP."""
    config = model.config
    layer, tower = config.vision_feature_layer, model.model.vision_tower
    if not isinstance(layer, int):
        raise InputError(
            f"vision_feature_layer is {layer}: several layers at once are not supported"
        )
    if layer >= 0:  # counted from the embeddings
        layer -= tower.config.num_hidden_layers + 1
    has_class = tower.config.model_type == "clip_vision_model"
    if has_class != (config.vision_feature_select_strategy == "default"):
        raise InputError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}: only "
            "the patches of CLIP ('default') and of SigLIP ('full') can be taken"
        )
    if tower.config.image_size != image.size:
        raise InputError(
            f"pictures are made {image.size} pixels wide, but the encoder takes "
            f"{tower.config.image_size}"
        )
    module = PatchFeatures(tower, image.size, layer, norm=False)
    return finished(module, image, tower.config.model_type), model.model.multi_modal_projector


def split_idefics3(model: Any, image: ImageSpec) -> tuple[Encoder, nn.Module]:
    """Idefics3 and SmolVLM."""
    module = WholePicture(model.model.vision_model, image.size)
    return finished(module, image, model.config.vision_config.model_type), model.model.connector


SPLITS: dict[str, Callable[[Any, ImageSpec], tuple[Encoder, nn.Module]]] = {
    "llava": split_llava,
    "idefics3": split_idefics3,
    "smolvlm": split_idefics3,
}


# ---- pictures and their places -----------------------------------------------------------------


def picture_spec(directory: Path, model_type: str) -> ImageSpec:
    """How pictures are made ready. Idefics3 and SmolVLM squash a picture that is not tiled."""
    if model_type == "llava":
        return image_spec(directory, "clip")
    from transformers import AutoImageProcessor

    with in_one_line(directory):
        make: Any = AutoImageProcessor
        made = make.from_pretrained(directory, use_fast=False)
    try:
        side = int(made.max_image_size["longest_edge"])
        mean, std = list(made.image_mean), list(made.image_std)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{directory}: preprocessor_config.json cannot be used: {str(error).splitlines()[0]}"
        ) from None
    factor = made.rescale_factor if made.do_rescale else 1.0
    return ImageSpec(
        size=side,
        mean=(mean[0] / factor, mean[1] / factor, mean[2] / factor),
        scale=(std[0] / factor, std[1] / factor, std[2] / factor),
        resample="lanczos",
    )


def marks_of(config: Any, whole: Any) -> Marks:
    """What stands for a picture, and what the model's processor puts before and after it."""
    picture = whole.convert_ids_to_tokens(config.image_token_id)
    if config.model_type == "llava":
        return Marks(picture)
    fake, first = "<fake_token_around_image>", "<global-img>"
    if whole.convert_tokens_to_ids(first) in (None, whole.unk_token_id):
        raise InputError(f"the tokenizer does not know {first}")
    return Marks(picture, fake + first, fake)
