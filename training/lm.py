"""The language model and its tokenizer, read from a GGUF file.

A GGUF file holds the hyperparameters, the (quantized) weights, the vocabulary and the merges of one
language model. Here the weights become plain float32 in a transformers `LlamaForCausalLM`, so that
training and export see exactly the numbers the file ships; nothing else of the file is kept.

Only the Llama family is read. Another family needs its own `*_config` and `*_name` functions and a
branch in `load_lm`; the rest (dequantizing, tokenizer, tied embeddings) is common to all.

Two things differ from how transformers stores a Llama:
- llama.cpp reorders the rows of the query and key weights, because it rotates neighbouring pairs
  while transformers rotates the two halves of a head; `undo_rope_order` puts them back;
- token embeddings are rounded through float16 once, because the model directory ships them as
  float16 and the tied head must agree with them to the last bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGUFReader, TokenType, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tinyalign.bank.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# GGUF tensor name -> transformers name; "{i}" is the layer.
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


def load_lm(gguf_path: Path | str) -> LlamaForCausalLM:
    """The language model of a GGUF file as float32 transformers module in eval mode.

    Raises InputError when there is no such file, or it is not a Llama in a GGUF file.
    """
    reader = open_gguf(gguf_path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = llama_config(reader, tied="output.weight" not in tensors)
    heads = {
        "attn_q.weight": config.num_attention_heads,
        "attn_k.weight": config.num_key_value_heads,
    }
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        target = llama_name(name)
        if target is None:
            raise InputError(f"{gguf_path}: tensor {name!r} is not part of a Llama")
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        suffix = name.split(".", 2)[-1]
        if suffix in heads:
            weight = undo_rope_order(weight, heads[suffix])
        if name == "token_embd.weight":
            weight = weight.astype(np.float16).astype(np.float32)
        state[target] = torch.from_numpy(weight)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state
    )
    model.tie_weights()
    model.requires_grad_(False).eval()
    return model


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


def load_tokenizer(gguf_path: Path | str) -> Tokenizer:
    """The tokenizer of a GGUF file: byte-level BPE, single digits, control tokens as specials.

    No token is added at the start or the end of a text. Raises as `load_lm`.
    """
    reader = open_gguf(gguf_path)
    if field(reader, "tokenizer.ggml.model") != "gpt2":
        raise InputError(f"{gguf_path}: only byte-level BPE tokenizers can be read")
    tokens: list[str] = field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    return tokenizer


def open_gguf(gguf_path: Path | str) -> GGUFReader:
    """Map a GGUF file; InputError with its path when it is missing, foreign or cut short."""
    if not Path(gguf_path).is_file():
        raise InputError(f"{gguf_path}: no such file")
    try:
        return GGUFReader(gguf_path)
    except (ValueError, IndexError) as error:
        raise InputError(f"{gguf_path}: not a readable GGUF file ({error})") from error


def field(reader: GGUFReader, key: str) -> Any:
    """One metadata value of a GGUF file; InputError when it is not there."""
    value = reader.get_field(key)
    if value is None:
        raise InputError(f"GGUF metadata {key!r} is missing")
    return value.contents()


def llama_config(reader: GGUFReader, tied: bool) -> LlamaConfig:
    """Hyperparameters of a Llama GGUF file. `tied`: the head is the embedding table."""
    family = field(reader, "general.architecture")
    if family != "llama":
        raise InputError(f"language model family {family!r} is not supported, only 'llama'")
    theta = float(field(reader, "llama.rope.freq_base"))
    return LlamaConfig(
        vocab_size=len(field(reader, "tokenizer.ggml.tokens")),
        hidden_size=field(reader, "llama.embedding_length"),
        intermediate_size=field(reader, "llama.feed_forward_length"),
        num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=field(reader, "llama.attention.head_count"),
        num_key_value_heads=field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=field(reader, "llama.context_length"),
        # the shortest decimal of the file's float32: 1e-05, not 9.999999747378752e-06
        rms_norm_eps=float(
            str(np.float32(field(reader, "llama.attention.layer_norm_rms_epsilon")))
        ),
        # transformers 4 reads the first key, transformers 5 the second; a saved config needs both
        rope_theta=theta,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=field(reader, "tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=tied,
    )


def llama_name(name: str) -> str | None:
    """The transformers name of a GGUF tensor such as "blk.3.attn_q.weight", None when unknown."""
    if name in LLAMA_TOP:
        return LLAMA_TOP[name]
    block, _, rest = name.partition(".")
    layer, _, suffix = rest.partition(".")
    if block != "blk" or suffix not in LLAMA_LAYER:
        return None
    return f"model.layers.{int(layer)}.{LLAMA_LAYER[suffix]}"


def undo_rope_order(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key weight [heads * hd, D] from interleaved pairs back to two halves."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, width))
