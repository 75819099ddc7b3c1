"""Writes a model directory: all files into a directory beside the target, then one rename."""

from __future__ import annotations

from transformers import LlamaConfig

from tinyalign.runtime.manifest import LmSpec


def lm_spec(config: LlamaConfig, context: int) -> LmSpec:
    """The manifest's description of a language model exported for `context` tokens."""
    return LmSpec(
        vocab=config.vocab_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        context=context,
    )
