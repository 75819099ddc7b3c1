"""A GGUF file written here, with llama.cpp's row order, reads back as the Llama it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, TokenType, get_tensor_name_map
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tinyalign.bank.errors import InputError
from tinyalign.training.lm import load_lm, load_tokenizer

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


def gguf_metadata(
    model: PreTrainedModel, tokens: list[str], merges: list[str], pre: str = "smollm"
) -> dict[str, Any]:
    """What llama.cpp's converter writes of a model; the first two tokens are control tokens."""
    config = model.config
    arch = config.model_type
    return {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": float(config.rope_theta),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [TokenType.CONTROL] * 2
        + [TokenType.NORMAL] * (len(tokens) - 2),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }


def gguf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors of a model by the names of the gguf package, in llama.cpp's order."""
    config = model.config
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"attn_q.weight": config.num_attention_heads}
    heads["attn_k.weight"] = config.num_key_value_heads
    tensors: dict[str, np.ndarray] = {}
    for target, tensor in model.state_dict().items():
        if target == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(target, (".weight", ".bias"))
        assert name is not None
        weight = tensor.numpy()
        suffix = name.split(".", 2)[-1]
        if config.model_type == "llama" and suffix in heads:
            weight = rope_order(weight, heads[suffix])
        tensors[name] = weight
    return tensors


def write_gguf(
    path: Path, family: str, metadata: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    """A GGUF file; what is None is left out."""
    writer = GGUFWriter(path, family)
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        if tensor is not None:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_path(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, "llama", gguf_metadata(llama, TOKENS, MERGES), gguf_tensors(llama))
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
