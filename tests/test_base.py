"""A memory trained for somebody else's vision-language model, of which nothing is changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image, ImageDraw
from test_vlm import LLAVA_TEMPLATE, VISION, WRITE, save, write_tokenizer
from tiny_model import picture
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration

from tinyalign.export.cli import main as export
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.manifest import read_manifest
from tinyalign.runtime.teach import create_bank
from tinyalign.training import base, encoded, features
from tinyalign.training.answer import answer
from tinyalign.training.batch import Batch, Copies, answer_logits
from tinyalign.training.cli import main as train
from tinyalign.training.models.vlm import Vlm, load_vlm
from tinyalign.training.pictures import Picture

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from families import FAMILIES, Family, tiny_model

PARTS = ("lm", "vision", "connector", "compressor", "rag-connector")
FP32 = [f"--{part}-precision=fp32" for part in PARTS]
COUNT = 12  # pictures of a source, as many as the smallest scale takes


def drawn(source: str, number: int) -> Picture:
    name = f"thing{number}"
    split = "held" if number % 5 == 0 else "train"
    return Picture(
        f"{source}/{number}", source, name, name, "animal", "a thing that was drawn", split,
        "CC0-1.0", "", str(number),
    )  # fmt: skip


def draw(thing: Picture, cache: object = None) -> Image.Image:
    rng = Random(thing.id)
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = rng.randrange(40), rng.randrange(40)
        colour = tuple(rng.randrange(256) for _ in range(3))
        pen.ellipse((x, y, x + 24, y + 24), fill=(*colour, 255))
    return image


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few drawings in place of the packages' pictures."""
    monkeypatch.setattr(encoded, "pictures_of", lambda s: [drawn(s, i) for i in range(COUNT)])
    monkeypatch.setattr(features, "read_image", draw)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    WRITE["smolvlm"][0](tmp_path / "smol")
    return tmp_path / "smol"


def run(source: Path, out: Path, *more: str) -> int:
    return train(["--base", str(source), "--out", str(out), "--scale", "0.02", *more])


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
@pytest.mark.usefixtures("drawings")
def test_trained_exported_and_the_same_answers_as_in_torch(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, model_dir = tmp_path / family, tmp_path / "run", tmp_path / "model"
    WRITE[family][0](source)
    assert run(source, out) == 0
    told = capsys.readouterr().out
    for mode in ("none", "text", "latent", "both"):
        assert f"taught names and facts, {mode}: " in told
    assert (out / "loss.png").stat().st_size > 1000
    weights = out / "weights"
    arguments = ["--from", str(source), "--weights", str(weights), "--out", str(model_dir)]
    assert export([*arguments, *FP32, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert answers["equal"] == answers["prompts"] >= 20

    vlm = load_vlm(source)
    parts = base.load_base(vlm, weights)
    with TinyAlign.load(model_dir, threads=1) as model:
        assert len(model.banks[0]) == sum(1 for i in range(COUNT) if i % 5) * 3
        seen = set()
        for mode in ("text", "latent", "both"):
            for seed in range(3):
                asked = (picture(seed), "What is this?")
                got = model.ask(*asked, max_tokens=12, memory_mode=mode)
                torchs = answer(parts, model.banks, *asked, 12, mode)
                assert got.token_ids == torchs.ids
                assert [m.id for m in got.memories] == [hit.id for hit in torchs.hits]
                seen.add(got.token_ids)
        assert len(seen) > 2
        # without a memory it is the model that it was
        original = base.without_memory(vlm)
        for seed in range(3):
            asked = (picture(seed), "What is this?")
            alone = model.ask(*asked, max_tokens=12, memory=False)
            assert alone.token_ids == answer(original, [], *asked, 12).ids


@pytest.mark.usefixtures("drawings")
def test_a_model_with_a_trained_memory_can_be_taught(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "run") == 0
    weights = tmp_path / "run" / "weights"
    out = tmp_path / "model"
    assert export(["--from", str(source), "--weights", str(weights), "--out", str(out), *FP32]) == 0
    manifest = read_manifest(out)
    assert manifest.chat is not None and manifest.chat.stop
    own = tmp_path / "own.sqlite"
    with TinyAlign.load(out, threads=1) as model, create_bank(model, own) as bank:
        bank.add([model.memory(picture(7), "This is the pump of Mira.")])
    with TinyAlign.load(out, banks=[own], threads=1) as model:
        told = model.ask(picture(7), "What is this?", max_tokens=4)
        assert [memory.text for memory in told.memories] == ["This is the pump of Mira."]


@pytest.mark.usefixtures("drawings")
def test_a_run_that_was_stopped_goes_on(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for until in ("prepare", "0", "1"):
        assert run(source, tmp_path / "steps", "--until", until) == 0
    assert run(source, tmp_path / "once") == 0
    found = [tmp_path / name / "weights" for name in ("steps", "once")]
    for name in ("compressor.safetensors", "rag_connector.safetensors", "recipe.json"):
        assert (found[0] / name).read_bytes() == (found[1] / name).read_bytes()
    capsys.readouterr()
    assert run(source, tmp_path / "once", "--seed", "3") == 2
    assert "another recipe" in capsys.readouterr().err
    assert train(["--base", str(source), "--out", str(tmp_path / "once"), "--scale", "1"]) == 2
    assert "another model, scale or data" in capsys.readouterr().err


@pytest.mark.usefixtures("drawings")
def test_a_memory_of_another_model_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, tmp_path / "run") == 0
    WRITE["llava"][0](tmp_path / "llava")
    weights = str(tmp_path / "run" / "weights")
    capsys.readouterr()
    for other, said in ((weights, "for another model: smol"), ("training/weights", "default")):
        found = ["--from", str(tmp_path / "llava"), "--weights", other]
        assert export([*found, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert export(["--weights", weights, "--out", str(tmp_path / "out")]) == 2
    assert "a memory for smol: it needs --from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def write_llava_of(family: Family, place: Path) -> None:
    """LLaVA with a tiny language model of a family."""
    whole = write_tokenizer(place, LLAVA_TEMPLATE, bos=True)
    config = tiny_model(family).config.to_dict()
    own = ("architectures", "dtype", "torch_dtype", "_name_or_path", "transformers_version")
    text = {key: value for key, value in config.items() if key not in own}
    text |= {"vocab_size": len(whole), "max_position_embeddings": 600, "pad_token_id": 0}
    image = whole.convert_tokens_to_ids("<image>")
    vision = {"model_type": "clip_vision_model", **VISION}
    torch.manual_seed(6)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image)
    )
    model.generation_config.eos_token_id = whole.eos_token_id
    save(model, place)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(place)


@pytest.mark.parametrize("name", ["qwen2, sliding window", "gemma2", "opt"])
@pytest.mark.usefixtures("drawings")
def test_over_other_language_models(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    write_llava_of(family, tmp_path / "llava")
    assert run(tmp_path / "llava", tmp_path / "run") == 0
    weights = ["--weights", str(tmp_path / "run" / "weights"), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert export(["--from", str(tmp_path / "llava"), *weights, *FP32, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert answers["equal"] == answers["prompts"] > 0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_reads_a_batch_as_it_reads_alone(family: Family) -> None:
    lm = tiny_model(family)
    lengths, width = (20, 13), 20
    torch.manual_seed(4)
    inputs = 0.3 * torch.randn(2, width, lm.config.hidden_size)
    block = torch.tensor([[0] * n + [-1] * (width - n) for n in lengths])
    seen = torch.ones(width, width).tril().bool() & (block[:, None, :] == 0)
    mask = torch.zeros(2, 1, width, width).masked_fill(~seen[:, None], torch.finfo().min)
    labels = torch.full((2, width), -100)
    for row, length in enumerate(lengths):
        labels[row, length - 1] = 0
    none = torch.zeros(0, dtype=torch.long)
    batch = Batch(
        labels, torch.arange(width).expand(2, -1), mask, labels, none, none, none, none, none,
        none, none, Copies(none, none, none),
    )  # fmt: skip
    with torch.inference_mode():
        together, _ = answer_logits(lm, inputs, batch)
        for row, length in enumerate(lengths):
            alone = lm(inputs_embeds=inputs[row : row + 1, :length]).logits[0, -1]
            assert (together[row] - alone).abs().max() < 1e-3


def test_nothing_of_the_model_is_changed(source: Path, tmp_path: Path, drawings: None) -> None:
    vlm = load_vlm(source)
    before = [value.clone() for value in parameters(vlm)]
    base.train_base(vlm, tmp_path / "run", 1, 0.02)
    after = [value.float() for value in parameters(vlm)]  # the LM's products are in bfloat16 now
    assert all(
        torch.allclose(a, b, atol=1e-2, rtol=1e-2) for a, b in zip(before, after, strict=True)
    )


def parameters(vlm: Vlm) -> list[torch.Tensor]:
    modules = (vlm.encoder.module, vlm.connector, vlm.lm)
    return [value for module in modules for value in module.parameters()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--install"], "weights of its own"),
        (["--until", "2"], "ends with stage 1"),
        (["--base", "nowhere/at/all"], "no model directory"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(["--base", str(source), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
