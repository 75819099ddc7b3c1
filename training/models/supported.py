"""Which language models are supported: their types, and what of a config can be expressed.

What a decoder layer of each type does is written in export/lm_families.py.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import PretrainedConfig

from tinyalign.runtime.errors import InputError

FAMILIES = ("gemma2", "gemma3_text", "llama", "opt", "phi", "phi3", "qwen2", "qwen3")
"""Types of language models (`model_type` of transformers)."""
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
KINDS = ("full_attention", "sliding_attention")  # of layers


def check_exportable(config: PretrainedConfig, context: int) -> None:
    """Raises InputError where a model of this config cannot be written for `context` tokens."""
    family = config.model_type
    if family not in FAMILIES:
        raise InputError(
            f"language models of the type {family!r} are not supported, only {', '.join(FAMILIES)}"
        )
    if activation(config) not in ACTIVATIONS:
        raise InputError(
            f"the activation {activation(config)!r} is not supported, only {', '.join(ACTIVATIONS)}"
        )
    for reason, holds in unsupported(config):
        if holds:
            raise InputError(f"this {family} cannot be exported: {reason}")
    check_context(config, context)


def unsupported(config: PretrainedConfig) -> list[tuple[str, bool]]:
    """What of a config the graph cannot express, and whether the config has it."""

    def is_set(key: str, wanted: Any) -> bool:
        return bool(getattr(config, key, wanted) != wanted)

    types = set(getattr(config, "layer_types", None) or ())
    rotary = int(head_dim(config) * getattr(config, "partial_rotary_factor", 1.0))
    no_window = "sliding_attention" in types and not config.sliding_window
    opt, gemma3 = config.model_type == "opt", config.model_type == "gemma3_text"
    return [
        ("its heads are no multiple of 8 wide", opt and head_dim(config) % 8 != 0),
        ("its heads are no multiple of 16 wide", not opt and head_dim(config) % 16 != 0),
        ("the turned part of its heads is no multiple of 16 wide", not opt and rotary % 16 != 0),
        ("it turns more than a whole head", rotary > head_dim(config)),
        ("it has layers with other attention", bool(types - set(KINDS))),
        ("its sliding layers have no sliding_window", no_window),
        ("it normalizes queries and keys (qk_layernorm)", is_set("qk_layernorm", False)),
        ("its attention looks ahead", is_set("use_bidirectional_attention", False)),
        (
            "transformers ignores its attn_logit_softcapping",
            gemma3 and is_set("attn_logit_softcapping", None),
        ),
        ("it normalizes after its blocks", opt and is_set("do_layer_norm_before", True)),
        ("it has no final norm", opt and is_set("_remove_final_layer_norm", False)),
        ("its norms have no weights", opt and is_set("layer_norm_elementwise_affine", True)),
        (
            "its embeddings are narrower than its layers (word_embed_proj_dim)",
            opt and is_set("word_embed_proj_dim", config.hidden_size),
        ),
    ]


def check_context(config: PretrainedConfig, context: int) -> None:
    """Raises InputError where positions up to `context` are not those of one fixed table."""
    most, why = longest_context(config)
    if context > most:
        raise InputError(
            f"this {config.model_type} cannot be exported for {context} tokens, only for {most}: "
            f"{why}"
        )


def longest_context(config: PretrainedConfig) -> tuple[int, str]:
    """How many positions one fixed table has, and what ends it."""
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("longrope", "dynamic"):
        most = getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
        return int(most), f"its rotary embedding ({kind}) changes there"
    if config.model_type == "opt":
        return int(config.max_position_embeddings), "its table of positions ends there"
    return sys.maxsize, ""


def activation(config: PretrainedConfig) -> str:
    """The name of an MLP's activation."""
    keys = ("hidden_activation", "activation_function", "hidden_act")  # Gemma's, OPT's, the others'
    return next(str(getattr(config, key)) for key in keys if getattr(config, key, None))


def head_dim(config: PretrainedConfig) -> int:
    """Numbers of a head (hd)."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
