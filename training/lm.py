"""The language model and its tokenizer, read from a GGUF file.

A GGUF file holds the hyperparameters, the (quantized) weights, the vocabulary and the merges of one
language model. Here the weights become plain float32 in a module of transformers, so that training
and export see exactly the numbers the file ships; nothing else of the file is kept. What is read is
what was trained: a file with more or less in it than is understood is refused with one line.

A further architecture is one more entry in `ARCHITECTURES`, if llama.cpp stores it as plainly.

Two things differ from how transformers stores a model:
- llama.cpp reorders the rows of a Llama's query and key weights, because it rotates neighbouring
  pairs there while transformers rotates the two halves of a head; `undo_rope_order` puts them back;
- token embeddings are rounded through float16 once, because the model directory ships them as
  float16 and the tied head must agree with them to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tinyalign.bank.errors import InputError
from tinyalign.training.gguf_reader import DIVISORS, ELSEWHERE, GgufFile, config_settings, open_gguf
from tinyalign.training.gguf_tokenizer import tokenizer_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores the language models of one architecture."""

    config: type[PretrainedConfig]
    model: type[Any]
    layer: dict[str, str]  # tensors of a layer: GGUF name -> transformers name
    woven: bool = False  # rows of queries and keys are in neighbouring pairs
    divisors: bool = False  # there may be DIVISORS, for which the config stands


# GGUF tensor name -> transformers name, of all architectures here.
LLAMA_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",  # [V, D]
    "output_norm.weight": "model.norm.weight",  # [D]
    "output.weight": "lm_head.weight",  # [V, D], absent when tied
}
LLAMA_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",  # [D]
    "attn_q.weight": "self_attn.q_proj.weight",  # [H * hd, D]
    "attn_k.weight": "self_attn.k_proj.weight",  # [Hkv * hd, D]
    "attn_v.weight": "self_attn.v_proj.weight",  # [Hkv * hd, D]
    "attn_output.weight": "self_attn.o_proj.weight",  # [D, H * hd]
    "ffn_norm.weight": "post_attention_layernorm.weight",  # [D]
    "ffn_gate.weight": "mlp.gate_proj.weight",  # [F, D]
    "ffn_up.weight": "mlp.up_proj.weight",  # [F, D]
    "ffn_down.weight": "mlp.down_proj.weight",  # [D, F]
}
QWEN2_LAYER = LLAMA_LAYER | {
    "attn_q.bias": "self_attn.q_proj.bias",  # [H * hd]
    "attn_k.bias": "self_attn.k_proj.bias",  # [Hkv * hd]
    "attn_v.bias": "self_attn.v_proj.bias",  # [Hkv * hd]
}
QWEN3_LAYER = LLAMA_LAYER | {
    "attn_q_norm.weight": "self_attn.q_norm.weight",  # [hd]
    "attn_k_norm.weight": "self_attn.k_norm.weight",  # [hd]
}
ARCHITECTURES = {
    "llama": Architecture(LlamaConfig, LlamaForCausalLM, LLAMA_LAYER, woven=True, divisors=True),
    "qwen2": Architecture(Qwen2Config, Qwen2ForCausalLM, QWEN2_LAYER),
    "qwen3": Architecture(Qwen3Config, Qwen3ForCausalLM, QWEN3_LAYER),
}
"""By the name in `general.architecture`."""


@dataclass(frozen=True)
class LmFile:
    """A GGUF file every tensor of which has its place in a language model, and none lacks."""

    file: GgufFile
    architecture: Architecture
    config: PretrainedConfig
    places: dict[str, str]  # GGUF tensor name -> transformers name


def load_lm(gguf_path: Path | str) -> PreTrainedModel:
    """The language model of a GGUF file as float32 transformers module in eval mode.

    Raises InputError when there is no such file, or it does not hold just such a model.
    """
    return build_lm(check_lm(open_gguf(gguf_path)))


def load_tokenizer(gguf_path: Path | str) -> Tokenizer:
    """The tokenizer of a GGUF file: byte-level BPE, control tokens as specials.

    No token is added at the start or the end of a text. Raises as `load_lm`.
    """
    return tokenizer_of(open_gguf(gguf_path))


def check_lm(file: GgufFile) -> LmFile:
    """What of a file becomes what of a model; InputError unless all of it is understood."""
    family = file.field("general.architecture")
    if family not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: of GGUF files only those of the architectures "
            f"{', '.join(ARCHITECTURES)} are read, not {family!r}: {ELSEWHERE}"
        )
    architecture = ARCHITECTURES[family]
    if missing := first_missing(file, architecture, file.count(f"{family}.block_count")):
        raise InputError(f"{file.path} does not hold a whole {family}: {missing} is missing")
    places: dict[str, str] = {}
    for name in file.tensors:
        place = transformers_name(architecture, name)
        if place is not None:
            places[name] = place
        elif not (architecture.divisors and name == DIVISORS):
            raise InputError(f"{file.path}: tensor {name!r} is not part of a {family}")
    config = architecture.config(**config_settings(file, family))
    check_shapes(file, architecture, config, places)
    return LmFile(file, architecture, config, places)


def check_shapes(
    file: GgufFile, architecture: Architecture, config: PretrainedConfig, places: dict[str, str]
) -> None:
    """Raises InputError for a tensor of another shape than the config says, or of no layer."""
    with torch.device("meta"):  # nothing but shapes
        model = architecture.model(config)
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    for name, place in places.items():
        shape, wanted = file.tensors[name].shape[::-1].tolist(), shapes.get(place)
        if wanted is None:
            raise InputError(
                f"{file.path}: tensor {name!r} is beyond the {config.num_hidden_layers} layers"
            )
        if shape != wanted:
            raise InputError(f"{file.path}: tensor {name!r} has the shape {shape}, not {wanted}")


def first_missing(file: GgufFile, architecture: Architecture, layers: int) -> str | None:
    """The name of a tensor that the file lacks. A missing output.weight means a tied head."""

    def wanted() -> Iterator[str]:
        yield from (name for name in LLAMA_TOP if name != "output.weight")
        for layer in range(layers):
            yield from (f"blk.{layer}.{name}" for name in architecture.layer)

    return next((name for name in wanted() if name not in file.tensors), None)


def build_lm(source: LmFile) -> PreTrainedModel:
    """The model of a file, its weights in float32."""
    file, config = source.file, source.config
    heads: dict[str, int] = {}
    if source.architecture.woven:
        heads["attn_q.weight"] = config.num_attention_heads
        heads["attn_k.weight"] = config.num_key_value_heads
    state: dict[str, torch.Tensor] = {}
    for name, place in source.places.items():
        weight = file.weight(name)
        suffix = name.split(".", 2)[-1]
        if suffix in heads:
            weight = undo_rope_order(weight, heads[suffix])
        if name == "token_embd.weight":
            weight = weight.astype(np.float16).astype(np.float32)
        state[place] = torch.from_numpy(weight)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model: PreTrainedModel = source.architecture.model.from_pretrained(
        None, config=config, state_dict=state
    )
    model.tie_weights()
    model.requires_grad_(False).eval()
    return model


def transformers_name(architecture: Architecture, name: str) -> str | None:
    """The transformers name of a GGUF tensor such as "blk.3.attn_q.weight", None when unknown."""
    if name in LLAMA_TOP:
        return LLAMA_TOP[name]
    block, _, rest = name.partition(".")
    layer, _, suffix = rest.partition(".")
    if block != "blk" or suffix not in architecture.layer:
        return None
    return f"model.layers.{layer}.{architecture.layer[suffix]}"


def undo_rope_order(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key weight [heads * hd, D] from interleaved pairs back to two halves."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, width))


def token_table(lm: PreTrainedModel) -> torch.Tensor:
    """The rows of inputs_embeds for all tokens [V, D], as transformers makes them, without
    gradient."""
    weight = lm.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    scale = embedding_scale(lm)
    return weight.detach() if scale == 1 else weight.detach() * scale


def embedding_rows(lm: PreTrainedModel) -> NDArray[np.float32]:
    """The same as float32 array, not copied if they are that."""
    rows: NDArray[np.float32] = token_table(lm).float().numpy()
    return rows


def embedding_scale(lm: PreTrainedModel) -> float:
    """By what a family's token embeddings are multiplied on the way to inputs_embeds.

    1 for all but Gemma 3. (Gemma 2 multiplies inputs_embeds themselves.)
    """
    return float(getattr(lm.get_input_embeddings(), "embed_scale", 1.0))


def round_embeddings(lm: PreTrainedModel) -> None:
    """Change a model's token embeddings into those that embeddings.bin holds, rounded to float16,
    so that the runtime and torch agree on them to the last bit (a tied head changes along)."""
    weight = lm.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    scale = embedding_scale(lm)
    weight.data = ((weight.data.float() * scale).half().float() / scale).to(weight.dtype)
