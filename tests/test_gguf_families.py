"""GGUF files of every architecture and tokenizer that is read give what was trained; others, or
files with more or less in them, are refused with one line."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import TokenType
from test_lm import gguf_metadata, gguf_tensors, write_gguf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.convert_slow_tokenizer import GPT2Converter, Qwen2Converter, TikTokenConverter

from tinyalign.runtime.errors import InputError
from tinyalign.training.gguf_tokenizer import PRE_TYPES
from tinyalign.training.lm import load_lm, load_tokenizer
from tinyalign.training.models.language_models import load_language_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import families
from families import CONTEXT, Family, prompt, runtime_greedy, torch_greedy

TEXTS = [
    "", " ", "\n", "Hello world, it's 2024!", "don't DON'T we'Ll I'VE o'clock 'tis 's",
    "1 12 123 1234 12345678 3.14159 1,000,000 ½ Ⅻ ²³ ٣٤٥ ௧௨",
    "a  b   c    d\te\t\tf \t g", "line\nline\r\nline\n\n\nline  \n  line \n", "  led", "trail  ",
    "!!!\n\n???\r\n--- ... (a)[b]{c} a_b-c+d=e #x @y", "x=1;y=22;z=333\n\tif(x){return y;}\n",
    "你好，世界。今天是2024年1月1日。こんにちは 안녕하세요", "Привет, Ελλάδα, שלום, مرحبا, नमस्ते",
    "😀😃 👨\u200d👩\u200d👧 🇩🇪 ❤️ a😀b", "e\u0301 é A\u030a Å ﬁ n\u0303o \u1100\u1161 \u2126",
    "\u00a0non\u2009breaking\u3000spaces\u200b", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>",
    "<tool_call>\n{}</tool_call> <tool_call>\u0338 [PAD7] <|im_sta rt|>", "\x00\x01\x7f\x80",
    "camelCase snake_case UPPER's Ünïcödé naïve straße ǅ ªº", "wholeword wholewords",
]  # fmt: skip
CONTROL, USER, UNUSED = ["<|im_end|>", "<|im_start|>"], ["<tool_call>", "</tool_call>"], "[PAD7]"
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges learned from the texts without cutting them, so that many tokens lie across
    the ends of words: which can be used depends on how a text is cut."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    learned.train_from_iterator([text for text in TEXTS if "<|" not in text], trainer)
    model = json.loads(learned.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    whole = "wholewords"  # no merges lead to it
    merges = [" ".join(pair) for pair in model["merges"] if "".join(pair) != whole]
    tokens += [] if whole in tokens else [whole]
    return [*CONTROL, *tokens, *USER, UNUSED], merges


TOKENS, MERGES = vocabulary()
KINDS = [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(TOKENS) - 5)
KINDS += [TokenType.USER_DEFINED] * 2 + [TokenType.UNUSED]
SIZES = {"vocab_size": len(TOKENS), "num_hidden_layers": 2, "max_position_embeddings": 131072}


def stretched(factor: float) -> dict[str, Any]:
    """Options of a Llama 3.1 or 3.2."""
    return {"rope_theta": 5e5, "rope_scaling": {**LLAMA3_ROPE, "factor": factor}}


MODELS = [
    Family("llama", "Llama", {"rope_theta": 5e4}, ""),
    Family("llama, wide heads", "Llama", {"head_dim": 32}, ""),
    Family("llama 3.1", "Llama", stretched(8.0), ""),
    Family("llama 3.2", "Llama", {**stretched(32.0), "tie_word_embeddings": True}, ""),
    Family("qwen2", "Qwen2", {"rope_theta": 1e6}, ""),
    Family("qwen2, tied", "Qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}, ""),
    Family("qwen3", "Qwen3", {"rope_theta": 1e6, "head_dim": 32}, ""),
    Family("qwen3, tied", "Qwen3", {"head_dim": 16, "tie_word_embeddings": True}, ""),
]
NAMED = {family.name: family for family in MODELS}
each_model = pytest.mark.parametrize("name", NAMED)
each_pre_type = pytest.mark.parametrize("pre", PRE_TYPES)


def tiny_model(name: str) -> PreTrainedModel:
    """A random model of two layers whose vocabulary is TOKENS."""
    family = NAMED[name]
    return families.tiny_model(Family(name, family.model, SIZES | family.options, ""))


def divisors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """What llama.cpp's converter writes of a Llama 3's rotary embedding, [hd / 2]."""
    found: list[float] = []
    for i in range(0, head_dim, 2):
        turns = 8192 * theta ** (-i / head_dim) / (2 * math.pi)  # within the first training
        kept = min(max((turns - 1) / 3, 0.0), 1.0)
        found.append(1 / (kept + (1 - kept) / factor))
    return np.array(found, np.float32)


def write_model(
    path: Path,
    name: str = "qwen2",
    pre: str = "qwen2",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    family: str | None = None,
) -> PreTrainedModel:
    """A tiny model as GGUF file, with changes to it (None: left out)."""
    model = tiny_model(name)
    config, kept = model.config, gguf_tensors(model)
    head_dim = NAMED[name].options.get("head_dim")
    said = gguf_metadata(model, TOKENS, MERGES, pre) | {
        "tokenizer.ggml.token_type": KINDS,
        f"{config.model_type}.attention.key_length": head_dim,
        f"{config.model_type}.attention.value_length": head_dim,
    }
    if scaling := getattr(config, "rope_scaling", None):
        kept["rope_freqs.weight"] = divisors(config.rope_theta, 16, scaling["factor"])
    kept |= tensors or {}
    write_gguf(path, family or config.model_type, said | (metadata or {}), kept)
    return model


def logits(model: PreTrainedModel, first: int) -> np.ndarray:
    """Logits [40, V] of a prompt at the positions from `first` on."""
    ids, positions = torch.tensor([prompt()]), torch.arange(first, first + families.PROMPT)[None]
    with torch.inference_mode():
        found: np.ndarray = model(ids, position_ids=positions).logits[0].numpy()
    return found


@each_model
def test_same_logits(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", name)
    loaded, _ = load_language_model(tmp_path / "model.gguf")
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    for first in (0, 9000):
        assert np.abs(logits(loaded, first) - logits(model, first)).max() <= 1e-5


def test_stretched_rope_is_saved_for_transformers_4_and_5(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", "llama 3.2")
    saved = load_lm(tmp_path / "model.gguf").config.to_dict()
    assert saved["rope_scaling"] == model.config.rope_scaling == LLAMA3_ROPE
    assert saved["rope_parameters"] == {**LLAMA3_ROPE, "rope_theta": 5e5}


def test_stretching_matters_to_these_logits(tmp_path: Path) -> None:
    found = [logits(tiny_model(name), 9000) for name in ("llama 3.1", "llama 3.2")]
    assert np.abs(found[0] - found[1]).max() > 0.01


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2, tied"])
def test_same_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", name)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    ours = load_lm(tmp_path / "model.gguf")
    assert np.abs(logits(ours, 0) - logits(theirs, 0)).max() <= 1e-5


def test_gguf_to_onnx_to_the_runtime(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", "qwen2, tied")
    loaded, _ = load_language_model(tmp_path / "model.gguf")
    lm = families.exported(loaded, tmp_path, "fp32")
    ids = prompt()
    rows = families.table_of(tmp_path, loaded)
    found = lm.forward(lm.new_state(CONTEXT), rows[ids], tuple(range(len(ids))))
    assert np.abs(found - logits(model, 0)).max() <= 1e-4
    assert runtime_greedy(lm, rows, ids) == torch_greedy(model, ids)


# ---- tokenizers


class Slow:
    """What transformers' converters want to know of a tokenizer."""

    add_prefix_space = add_bos_token = False


def published(pre: str) -> Tokenizer:
    """The tokenizer that transformers makes of the vocabulary, with the family's regex."""
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    vocab = {token: i for i, token in enumerate(TOKENS) if token != UNUSED}
    if pre == "qwen2":
        made = Qwen2Converter(Slow()).converted(vocab, merges)
    else:
        made = GPT2Converter(Slow()).converted(vocab, merges)
    if pre == "smollm":
        steps = [{"type": "Digits", "individual_digits": True}]
        made = with_steps(made, [*steps, byte_level(use_regex=True)])
    if pre in ("llama-bpe", "llama3"):
        regex = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
        made = with_steps(made, [{**split, "invert": False}, byte_level(use_regex=False)])
        made.model.ignore_merges = True
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in CONTROL])
    made.add_tokens([AddedToken(t, normalized=False) for t in USER])
    return made


def byte_level(use_regex: bool) -> dict[str, Any]:
    """A step of a tokenizer.json."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
            "use_regex": use_regex}  # fmt: skip


def with_steps(tokenizer: Tokenizer, steps: list[dict[str, Any]]) -> Tokenizer:
    """A tokenizer with other pre-tokenizers."""
    said = json.loads(tokenizer.to_str())
    said["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return Tokenizer.from_str(json.dumps(said))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """What is read of a file for every way of cutting a text."""
    path = tmp_path_factory.mktemp("tokenizers") / "model.gguf"
    read: dict[str, Tokenizer] = {}
    for pre in PRE_TYPES:
        write_model(path, pre=pre)
        read[pre] = load_tokenizer(path)
    return read


@each_pre_type
def test_same_tokens(pre: str, tokenizers: dict[str, Tokenizer]) -> None:
    found, expected = tokenizers[pre], published(pre)
    for text in [*TEXTS, "".join(TEXTS), "\n".join(TEXTS)]:
        assert found.encode(text).tokens == expected.encode(text, add_special_tokens=False).tokens
        ids = found.encode(text).ids
        assert ids == expected.encode(text, add_special_tokens=False).ids
        assert found.decode(ids) == expected.decode(ids)


def test_the_texts_tell_the_tokenizers_apart(tokenizers: dict[str, Tokenizer]) -> None:
    for one, other in itertools.combinations(PRE_TYPES, 2):
        same = all(tokenizers[one].encode(t).ids == tokenizers[other].encode(t).ids for t in TEXTS)
        assert same == ({one, other} == {"llama-bpe", "llama3"})


@each_pre_type
def test_special_tokens(pre: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[pre]
    ids = tokenizer.encode("<|im_start|><tool_call>a").ids
    assert ids == [1, TOKENS.index("<tool_call>"), TOKENS.index("a")]  # nothing added
    assert tokenizer.decode(ids) == "<tool_call>a"
    assert tokenizer.token_to_id(UNUSED) is None
    assert (tokenizer.encode("wholewords").tokens == ["wholewords"]) == pre.startswith("llama")


# ---- what is refused


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load_language_model(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


STRETCH = divisors(5e5, 16, 32.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"family": "mamba"}, "only those of the architectures llama, qwen2, qwen3"),
        ({"pre": "tekken"}, "only the tokenizers smollm, gpt-2, qwen2, llama-bpe, llama3"),
        ({"pre": ""}, "exactly, not None"),
        ({"metadata": {"tokenizer.ggml.model": "llama"}}, "exactly, not 'llama'"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "blk.1.ffn_up.weight is missing"),
        ({"tensors": {"blk.0.attn_k.bias": None}}, "blk.0.attn_k.bias is missing"),
        ({"name": "qwen3", "tensors": {"blk.1.attn_k_norm.weight": None}}, "attn_k_norm"),
        ({"metadata": {"qwen2.block_count": 3}}, "blk.2.attn_norm.weight is missing"),
        ({"metadata": {"qwen2.block_count": 1}}, "is beyond the 1 layers"),
        ({"tensors": {"blk.0.attn_output.bias": np.zeros(64, np.float32)}}, "is not part of a qwe"),
        ({"tensors": {"blk.0.attn_q.bias": np.zeros(32, np.float32)}}, "has the shape [32], not ["),
        ({"metadata": {"qwen2.feed_forward_length": 80}}, "has the shape [96, 64], not [80, 64]"),
        ({"metadata": {"tokenizer.ggml.tokens": TOKENS[:-1]}}, "'token_embd.weight' has the"),
        ({"metadata": {"qwen2.attention.head_count": 0}}, "must be a positive whole number, not 0"),
        ({"metadata": {"qwen2.attention.head_count_kv": [2, 2]}}, "whole number, not [2, 2]"),
        ({"metadata": {"qwen2.rope.freq_base": None}}, "'qwen2.rope.freq_base' is missing"),
        ({"metadata": {"qwen2.rope.freq_base": math.inf}}, "must be a positive number, not inf"),
        ({"metadata": {"qwen2.rope.dimension_count": 8}}, "is 8, but a head is 16 wide"),
        ({"metadata": {"qwen2.rope.scaling.type": "yarn"}}, "stretched rotary embedding"),
        ({"metadata": {"qwen2.attention.sliding_window": 16}}, "qwen2.attention.sliding_window is"),
        ({"tensors": {"rope_freqs.weight": STRETCH}}, "'rope_freqs.weight' is not part of a qwen2"),
        ({"name": "llama 3.2", "tensors": {"rope_freqs.weight": STRETCH * 1.001}}, "Llama 3.1"),
        ({"name": "llama 3.2", "tensors": {"rope_freqs.weight": STRETCH[:4]}}, "Llama 3.1"),
        ({"name": "llama 3.2", "tensors": {"rope_freqs.weight": divisors(5e5, 16, 16.0)}}, "Llama"),
        ({"name": "llama 3.2", "metadata": {"llama.rope.freq_base": 1e6}}, "Llama 3.1"),
        ({"metadata": {"tokenizer.ggml.token_type": KINDS[:-1]}}, "but the kinds of"),
        ({"metadata": {"tokenizer.ggml.token_type": [TokenType.BYTE, *KINDS[1:]]}}, "the kind 6"),
        ({"metadata": {"tokenizer.ggml.tokens": [TOKENS[1], *TOKENS[1:]]}}, "is there 2 times"),
        ({"metadata": {"tokenizer.ggml.merges": ["a nowhere"]}}, "merges cannot be used"),
        ({"metadata": {"tokenizer.ggml.merges": ["a"]}}, "merges cannot be used"),
    ],
)  # fmt: skip
def test_files_that_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", **changes)
    assert said in refused(tmp_path / "model.gguf")


def test_settings_that_change_nothing_are_passed_over(tmp_path: Path) -> None:
    harmless = {"rope.scaling.type": "none", "rope.dimension_count": 16, "vocab_size": len(TOKENS)}
    said = {f"qwen2.{key}": value for key, value in harmless.items()}
    model = write_model(tmp_path / "model.gguf", metadata={**said, "general.name": "x"})
    loaded, _ = load_language_model(tmp_path / "model.gguf")
    assert np.abs(logits(loaded, 0) - logits(model, 0)).max() <= 1e-5
