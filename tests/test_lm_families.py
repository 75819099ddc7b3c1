"""Every family of language models computes in the runtime what it computes in torch, and is read
from a directory as it was meant, or refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import Gemma3TextConfig, PretrainedConfig, PreTrainedModel

from tinyalign.export.gptq import calibrate
from tinyalign.export.graph import Precision
from tinyalign.export.lm import (
    EMBEDDINGS_NAME,
    export_lm,
    lm_spec,
    write_embeddings,
)
from tinyalign.export.lm_families import LAYERS
from tinyalign.runtime.errors import InputError
from tinyalign.runtime.lm import LanguageModel
from tinyalign.runtime.loading import open_session
from tinyalign.training.lm import embedding_rows
from tinyalign.training.models import language_models
from tinyalign.training.models.language_models import check_memory, load_language_model
from tinyalign.training.models.supported import check_exportable

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import families
from families import CONTEXT, FAMILIES, PROMPT, Family, prompt, torch_logits

ROWS = tuple(range(PROMPT))
NAMED = {family.name: family for family in FAMILIES}
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def test_every_family_has_a_tiny_model() -> None:
    assert {families.tiny_model(family).config.model_type for family in FAMILIES} == set(LAYERS)


@each_family
def test_same_as_torch(family: Family, tmp_path: Path) -> None:
    model, ids = families.tiny_model(family), prompt()
    lm = families.exported(model, tmp_path, "fp32")
    table = families.table_of(tmp_path, model)
    whole = lm.forward(lm.new_state(CONTEXT), table[ids], ROWS)
    assert np.abs(whole - torch_logits(model, ids)).max() <= 1e-4
    assert families.runtime_greedy(lm, table, ids) == families.torch_greedy(model, ids)
    assert families.is_fused(tmp_path / "lm.onnx", model.config.num_hidden_layers)

    # in pieces, and again after some of it was taken back
    state = lm.new_state(CONTEXT)
    pieces = [lm.forward(state, table[ids[a:b]], tuple(range(b - a))).copy()
              for a, b in ((0, 21), (21, 35), (35, 40))]  # fmt: skip
    assert np.abs(np.concatenate(pieces) - whole).max() <= 1e-5
    lm.forward(state, table[prompt(9, seed=1)])
    state.length = 30
    again = lm.forward(state, table[ids[30:]], tuple(range(10)))
    assert np.abs(again - whole[30:]).max() <= 1e-5


@each_family
@pytest.mark.parametrize(("precision", "most"), [("int8", 0.1), ("int4", 0.75)])
def test_rounded_weights_are_close(
    family: Family, precision: Precision, most: float, tmp_path: Path
) -> None:
    model, ids = families.tiny_model(family), prompt()
    lm = families.exported(model, tmp_path, precision)
    found = lm.forward(lm.new_state(CONTEXT), families.table_of(tmp_path, model)[ids], ROWS)
    expected = torch_logits(model, ids)
    assert np.sqrt(np.square(found - expected).mean()) <= most * expected.std()


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_calibrated_weights_of_layers_with_biases_and_norms(name: str, tmp_path: Path) -> None:
    model, ids = families.tiny_model(NAMED[name]), prompt()
    changed = families.tiny_model(NAMED[name])
    changed.set_attn_implementation("sdpa")
    prompts = [
        *torch.from_numpy(embedding_rows(model)[[prompt(seed=i) for i in range(4)]])[:, None]
    ]
    blocks = calibrate(changed, prompts, lambda _: None)
    write_embeddings(model, tmp_path / EMBEDDINGS_NAME)
    export_lm(model, tmp_path / "lm.onnx", "int4", CONTEXT, blocks)
    lm = LanguageModel(open_session(tmp_path / "lm.onnx", 1), lm_spec(model.config, CONTEXT))
    found = lm.forward(lm.new_state(CONTEXT), families.table_of(tmp_path, model)[ids], ROWS)
    expected = torch_logits(changed, ids)
    assert np.sqrt(np.square(found - expected).mean()) <= 0.1 * expected.std()


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "llama"])
def test_rows_mean_what_inputs_embeds_means_to_transformers(name: str) -> None:
    model, ids = families.tiny_model(NAMED[name]), prompt()
    rows = torch.from_numpy(embedding_rows(model)[ids][None])
    with torch.inference_mode():
        found = model(inputs_embeds=rows).logits[0].numpy()
    assert np.abs(found - torch_logits(model, ids)).max() <= 1e-5


def test_embeddings_that_float16_cannot_hold(tmp_path: Path) -> None:
    model = families.tiny_model(NAMED["llama"])
    model.get_input_embeddings().weight.data[3, 5] = 1e5
    with pytest.raises(InputError, match="65504"):
        write_embeddings(model, tmp_path / "embeddings.bin")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("opt", {"do_layer_norm_before": False}, "normalizes after"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim"),
        ("opt", {"max_position_embeddings": 50}, "only for 50"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("llama", {"hidden_act": "tanh"}, "'tanh' is not supported, only gelu"),
        ("opt", {"num_attention_heads": 16}, "multiple of 8"),
        ("llama", {"head_dim": 24}, "multiple of 16"),
        ("phi", {"partial_rotary_factor": 0.25}, "turned part"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "looks ahead"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "other attention"),
        ("phi3, rope `longrope`, sliding window",
         {"original_max_position_embeddings": 64}, "longrope"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = families.tiny_model(NAMED[name])
    for key, value in changes.items():
        setattr(model.config, key, value)
    with pytest.raises(InputError, match=said) as error:
        export_lm(model, tmp_path / "lm.onnx", context=CONTEXT)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_family_names_the_known_ones() -> None:
    class Other(PretrainedConfig):
        model_type = "mamba"

    with pytest.raises(InputError, match=r"'mamba'.*gemma2.*llama.*qwen3"):
        check_exportable(Other(), CONTEXT)


# ---- reading directories


def save_model(family: str, folder: Path) -> PreTrainedModel:
    """A tiny model saved as transformers does, with a tokenizer of one word a token."""
    model = families.tiny_model(NAMED[family])
    model.save_pretrained(folder, max_shard_size="100KB")
    words = {f"w{i}": i for i in range(families.VOCAB)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return model


def change_config(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**config, **changes}))


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        load_language_model(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    save_model("llama", tmp_path)
    return tmp_path


@each_family
def test_a_saved_model_reads_back(family: Family, tmp_path: Path) -> None:
    model = save_model(family.name, tmp_path)
    loaded, tokenizer = load_language_model(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.dtype == torch.float32
    assert np.abs(torch_logits(loaded, prompt()) - torch_logits(model, prompt())).max() <= 1e-4
    assert tokenizer.encode("w7").ids == [7]


def test_half_precision_weights_become_float32(llama_folder: Path) -> None:
    families.tiny_model(NAMED["llama"]).to(torch.bfloat16).save_pretrained(llama_folder)
    for shard in llama_folder.glob("model-*"):
        shard.unlink()
    (llama_folder / "model.safetensors.index.json").unlink(missing_ok=True)
    loaded, _ = load_language_model(llama_folder)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


def test_rope_theta_where_transformers_5_writes_it(llama_folder: Path) -> None:
    new = {"rope_type": "default", "rope_theta": 5e4}
    expected = torch_logits(load_language_model(llama_folder)[0], prompt())
    change_config(llama_folder, ("rope_theta", "rope_scaling"), rope_parameters=new)
    loaded, _ = load_language_model(llama_folder)
    assert loaded.config.rope_theta == 5e4
    assert np.array_equal(torch_logits(loaded, prompt()), expected)
    change_config(llama_folder, rope_theta=1e4)
    assert "contradicts itself" in refused(llama_folder)
    change_config(llama_folder, ("rope_theta", "rope_parameters"))
    assert "names no rope_theta" in refused(llama_folder)


@pytest.mark.parametrize(
    ("name", "theta"),
    [("llama, rope `llama3`, biases", 1e4), ("phi3, rope `longrope`, sliding window", 1e4)],
)
def test_stretched_rope_where_transformers_5_writes_it(
    name: str, theta: float, tmp_path: Path
) -> None:
    model = save_model(name, tmp_path)
    scaling = dict(model.config.rope_scaling)
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type"))
    new = {**scaling, "rope_theta": theta, "partial_rotary_factor": 1.0}
    change_config(tmp_path, ("rope_theta", "rope_scaling"), rope_parameters=new)
    loaded, _ = load_language_model(tmp_path)
    assert np.abs(torch_logits(loaded, prompt()) - torch_logits(model, prompt())).max() <= 1e-4
    change_config(tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert "differently" in refused(tmp_path)


def test_both_ropes_of_gemma3_where_transformers_5_writes_them(tmp_path: Path) -> None:
    model = save_model("gemma3_text", tmp_path)
    new = {
        "full_attention": {**families.LINEAR_ROPE, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }
    old = ("rope_theta", "rope_scaling", "rope_local_base_freq")
    change_config(tmp_path, old, rope_parameters=new)
    config = load_language_model(tmp_path)[0].config
    assert isinstance(config, Gemma3TextConfig)
    assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 3e4)
    assert config.rope_scaling == families.LINEAR_ROPE == model.config.rope_scaling


@pytest.mark.parametrize(
    ("drop", "changes", "said"),
    [
        ((), {"model_type": "mamba"}, "'mamba' are not supported, only gemma2"),
        (("num_attention_heads",), {}, "no num_attention_heads"),
        ((), {"hidden_size": "64"}, "hidden_size must be a positive whole number, not '64'"),
        ((), {"num_key_value_heads": 0}, "num_key_value_heads must be a positive whole number"),
        ((), {"rms_norm_eps": None}, "rms_norm_eps must be a positive number"),
        ((), {"rope_parameters": [1]}, "cannot be used"),
        ((), {"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ((), {"num_hidden_layers": 4}, "a tensor is missing"),
        ((), {"num_hidden_layers": 2}, "no part of such a model"),
        ((), {"intermediate_size": 80}, "another shape"),
        ((), {"hidden_act": "tanh"}, "'tanh' is not supported"),
        ((), {"layer_types": ["other"]}, "other attention"),
        ((), {"rope_scaling": {"rope_type": "longrope", "factor": "x"}}, "cannot be used"),
        ((), {"vocab_size": 100}, "has token 199"),
    ],
)
def test_configs_that_are_refused(
    drop: tuple[str, ...], changes: dict[str, Any], said: str, llama_folder: Path
) -> None:
    change_config(llama_folder, drop, **changes)
    assert said in refused(llama_folder)


def test_a_missing_tensor_is_named(llama_folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    index = llama_folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = llama_folder / listed["weight_map"].pop(name)
    index.write_text(json.dumps(listed))
    save_file({k: v for k, v in load_file(shard).items() if k != name}, shard, {"format": "pt"})
    said = refused(llama_folder)
    assert "a tensor is missing" in said and name in said


def test_tokenizers_that_are_refused(llama_folder: Path) -> None:
    (llama_folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in refused(llama_folder)
    (llama_folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(llama_folder)


def test_too_little_memory(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_models, "free_memory", lambda: 100_000)
    assert "not enough memory: about" in refused(llama_folder)
    monkeypatch.setattr(language_models, "free_memory", lambda: None)
    check_memory(1 << 60)  # not known: nothing is said
