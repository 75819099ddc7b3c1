"""Hugging Face directories that can be read, and what is said about those that cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tinyalign.runtime.errors import InputError
from tinyalign.training.models.checkpoint import INDEX, WEIGHTS, open_checkpoint, rope_theta


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / WEIGHTS)
    return tmp_path


def split(place: Path) -> None:
    (place / WEIGHTS).unlink()
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in names.items():
        save_file({name: torch.ones(3)}, place / file)
    (place / INDEX).write_text(json.dumps({"weight_map": names}))


def test_one_file(place: Path) -> None:
    found = open_checkpoint(place)
    assert (found.model_type, found.names) == ("llama", {"a", "b"})
    assert found.files == (place / WEIGHTS,)


def test_shards(place: Path) -> None:
    split(place)
    found = open_checkpoint(place)
    assert (len(found.files), found.names) == (2, {"a", "b"})


def refused(place: Path) -> str:
    with pytest.raises(InputError) as error:
        open_checkpoint(place)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_shard_is_named(place: Path) -> None:
    split(place)
    (place / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refused(place)


def test_a_tensor_that_no_shard_holds(place: Path) -> None:
    split(place)
    save_file({"other": torch.ones(1)}, place / "model-00002-of-00002.safetensors")
    assert "tensor b" in refused(place)


def test_a_shard_elsewhere(place: Path) -> None:
    (place / INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "elsewhere" in refused(place)


def test_pickles_are_refused_with_how_to_convert(place: Path) -> None:
    (place / WEIGHTS).rename(place / "pytorch_model.bin")
    said = refused(place)
    assert "pickle" in said and "safe_serialization=True" in said


def test_no_weights(place: Path) -> None:
    (place / WEIGHTS).unlink()
    assert f"{WEIGHTS} is missing" in refused(place)


@pytest.mark.parametrize("cut", [4, 20, -1])
def test_a_cut_file(place: Path, cut: int) -> None:
    (place / WEIGHTS).write_bytes((place / WEIGHTS).read_bytes()[:cut])
    assert WEIGHTS in refused(place)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "cannot be read"), ("[]", "JSON object"), ("{}", "model_type")]
)
def test_a_config_that_is_none(place: Path, text: str, said: str) -> None:
    (place / "config.json").write_text(text)
    assert said in refused(place)


def test_no_directory(tmp_path: Path) -> None:
    assert "no model directory" in refused(tmp_path / "none")
    assert "no config.json" in refused(tmp_path)


def test_rope_theta_of_both_versions_of_transformers() -> None:
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert rope_theta(new) == rope_theta({"rope_theta": 500000}) == 5e5
    assert rope_theta({**new, "rope_theta": 5e5}) == 5e5
    assert rope_theta({}, default=1e4) == 1e4
    with pytest.raises(InputError, match="contradicts"):
        rope_theta({**new, "rope_theta": 1e4})
    with pytest.raises(InputError, match="names no rope_theta"):
        rope_theta({"rope_parameters": None})
