"""A GGUF file written here, with llama.cpp's row order, reads back as the Llama it came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import LlamaConfig, LlamaForCausalLM

from tinyalign.bank.errors import InputError
from tinyalign.training.lm import LLAMA_LAYER, LLAMA_TOP, load_lm, load_tokenizer

HEADS, KV_HEADS, LAYERS = 4, 2, 2
TOKENS = ["<|end|>", "<|im_start|>", *"abcdehlo", "Ġ", "Ċ", "1", "2", "Ã", "¼", "he", "ll", "Ġhe"]
MERGES = ["h e", "l l", "Ġ he"]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rope_theta=50000.0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    embeddings = model.model.embed_tokens.weight
    embeddings.data = embeddings.data.half().float()
    return model


def rope_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp stores them: halves of a head woven into pairs."""
    half = weight.shape[0] // heads // 2
    order = [
        h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)
    ]
    return weight[order]


@pytest.fixture(scope="module")
def gguf_path(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    state = {name: tensor.numpy() for name, tensor in llama.state_dict().items()}
    for name, target in LLAMA_TOP.items():
        if name != "output.weight":
            writer.add_tensor(name, state[target])
    for layer in range(LAYERS):
        for name, target in LLAMA_LAYER.items():
            weight = state[f"model.layers.{layer}.{target}"]
            if name in ("attn_q.weight", "attn_k.weight"):
                weight = rope_order(weight, HEADS if name == "attn_q.weight" else KV_HEADS)
            writer.add_tensor(f"blk.{layer}.{name}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_same_logits(llama: LlamaForCausalLM, gguf_path: Path) -> None:
    loaded = load_lm(gguf_path)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, llama(ids).logits)
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_saved_config_has_both_spellings_of_theta(gguf_path: Path) -> None:
    saved = load_lm(gguf_path).config.to_dict()
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] == 50000.0
    assert saved["rms_norm_eps"] == 1e-6


def test_tokenizer(gguf_path: Path) -> None:
    tokenizer = load_tokenizer(gguf_path)
    assert tokenizer.encode("hello he12").tokens == ["he", "ll", "o", "Ġhe", "1", "2"]
    text = "<|im_start|>ü hello\n"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode(text).ids[0] == 1


def test_bad_files(gguf_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_lm(tmp_path / "missing.gguf")
    bad = tmp_path / "bad.gguf"
    for content in (
        b"",
        b"GGUF",
        b"not a model at all",
        gguf_path.read_bytes()[:200],
        gguf_path.read_bytes()[:-100],
    ):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.gguf"):
            load_lm(bad)
