"""The default model's parts trained around one's own encoder and language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_base
import tiny_encoders
import torch
from test_base import FP32, drawings  # noqa: F401
from test_vlm import write_tokenizer
from tiny_model import picture

from tinyalign.export.cli import main as export
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.manifest import read_manifest
from tinyalign.training.answer import answer
from tinyalign.training.backbone import Cells
from tinyalign.training.cli import main as train
from tinyalign.training.parts import load_parts

TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, drawings: None) -> None:  # noqa: F811
    """Drawings only, no scenes made of the packages' pictures."""
    monkeypatch.setattr(
        "tinyalign.training.backbone.PICTURES", dict.fromkeys(("emoji", "clipart"), 12)
    )


def write_encoder(place: Path, family: str) -> Path:
    place.mkdir()
    return tiny_encoders.families()[family].save(place)


def write_lm(place: Path, name: str, template: str) -> Path:
    place.mkdir()
    whole = write_tokenizer(place, template, bos=False)
    family = next(family for family in test_base.FAMILIES if family.name == name)
    lm = test_base.tiny_model(family)
    lm.resize_token_embeddings(len(whole), mean_resizing=False)
    lm.config.eos_token_id = whole.eos_token_id
    lm.config.max_position_embeddings = 600
    lm.save_pretrained(place)
    return place


def run(encoder: Path, lm: Path, out: Path, *more: str) -> int:
    own = ["--encoder", str(encoder), "--lm", str(lm), "--out", str(out)]
    return train([*own, "--scale", "0.005", *more])


@pytest.mark.parametrize(
    ("encoder", "lm", "template"),
    [("siglip_vision_model", "qwen2", TEMPLATE), ("dinov2", "phi", "")],
)
def test_trained_exported_and_the_same_answers_as_in_torch(
    encoder: str, lm: str, template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = write_encoder(tmp_path / encoder, encoder), write_lm(tmp_path / lm, lm, template)
    assert run(*places, tmp_path / "run") == 0
    weights = tmp_path / "run" / "weights"
    capsys.readouterr()
    command = ["--weights", str(weights), "--out", str(tmp_path / "out"), *FP32, "--json"]
    assert export(command) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert answers["equal"] == answers["prompts"] > 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.name == f"{encoder}-{lm}" and (manifest.chat is not None) == bool(template)
    assert manifest.prompt.system == ("<s>user: " if template else "")
    parts = load_parts(weights)
    with TinyAlign.load(tmp_path / "out", threads=1) as model:
        for seed in range(3):
            asked = (picture(seed), "What is this?")
            told = model.ask(*asked, max_tokens=12)
            assert told.token_ids == answer(parts, model.banks, *asked, 12).ids


def test_a_run_goes_on_and_belongs_to_its_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = write_encoder(tmp_path / "clip", "clip")
    lm = write_lm(tmp_path / "llama", "llama", TEMPLATE)
    for until in ("prepare", "0", "2"):
        assert run(encoder, lm, tmp_path / "steps", "--until", until) == 0
    assert run(encoder, lm, tmp_path / "once") == 0
    found = [tmp_path / name / "weights" for name in ("steps", "once")]
    for name in ("connector.safetensors", "rag_connector.safetensors", "recipe.json"):
        assert (found[0] / name).read_bytes() == (found[1] / name).read_bytes()
    other = write_encoder(tmp_path / "vit", "vit")
    assert run(encoder, lm, tmp_path / "begun", "--until", "prepare") == 0
    for begun in ("once", "begun"):  # also where nothing but pictures is there yet
        capsys.readouterr()
        assert run(other, lm, tmp_path / begun) == 2
        assert "other data" in capsys.readouterr().err
    write_lm(tmp_path / "changed", "llama, tied", TEMPLATE)
    for path in (tmp_path / "changed").iterdir():
        (lm / path.name).write_bytes(path.read_bytes())
    assert export(["--weights", str(found[1]), "--out", str(tmp_path / "out")]) == 2
    assert "not what these weights were trained with" in capsys.readouterr().err


def test_regions_are_means_of_patches() -> None:
    patches = torch.arange(49.0).reshape(1, 49, 1)
    cells = Cells(torch.nn.Identity())(torch.cat([patches.mean(1, keepdim=True), patches], 1))
    assert cells.shape == (1, 10, 1)
    grid = patches.reshape(7, 7)
    assert cells[0, 1, 0] == grid[:3, :3].mean() and cells[0, 9, 0] == grid[4:, 4:].mean()
    assert cells[0, 5, 0] == grid[2:5, 2:5].mean() and cells[0, 0, 0] == patches.mean()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--encoder", "x"], "go together"),
        (["--lm", "x", "--encoder", "nowhere/at/all"], "no model directory"),
        (["--lm", "x", "--encoder", "y", "--install"], "weights of its own"),
        (["--base", "x", "--encoder", "y"], "has its own encoder"),
    ],
)
def test_bad_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
