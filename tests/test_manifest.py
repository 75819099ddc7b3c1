"""A model directory means exactly what the manifest says, or it is refused with one line."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tinyalign.runtime import ModelError, TinyAlign, files
from tinyalign.runtime.manifest import MANIFEST_NAME, Manifest, read_manifest

PRECISION = "fp32 or fp16 or int8 or int4"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit(model: Path, keys: str, value: Any) -> None:
    """Set or (with ``...``) delete one key of the manifest, written as "a.b.0"."""
    path = model / MANIFEST_NAME
    data = place = json.loads(path.read_text())
    *way, last = [int(k) if k.isdigit() else k for k in keys.split(".")]
    for key in way:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    path.write_text(json.dumps(data))


def test_round_trip(tiny: Path) -> None:
    manifest = read_manifest(tiny)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.to_json() == (tiny / MANIFEST_NAME).read_text()
    assert manifest.prompt.image == ("Here:", 2, ", then", 1, ".")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("format", 5, "format 5, newer than 4"),
        ("format", 3, "format 3, older than 4: export it again"),
        ("format", "1", "format is not a positive"),
        ("format", True, "format is not a positive"),
        ("format", ..., "format is not a positive"),
        ("colour", "red", "unknown key colour"),
        ("image.crop", 1, "unknown key image.crop"),
        ("name", ..., "missing key name"),
        ("lm.layers", ..., "missing key lm.layers"),
        ("prompt.top_k", ..., "missing key prompt.top_k"),
        ("name", 3, "name is 3, expected str"),
        ("lm.layers", 2.0, "lm.layers is 2.0, expected int"),
        ("lm.layers", True, "lm.layers is True, expected int"),
        ("lm.layers", 0, "lm.layers is 0"),
        ("lm.vocab", 1 << 40, "lm.vocab is"),
        ("image.size", 1 << 20, "image.size is 1048576"),
        ("image.resample", "nearest", "expected bilinear or bicubic or lanczos"),
        ("image.background", [255, 255], "has 2 items, expected 3"),
        ("image.mean", 127.0, "image.mean is not a list"),
        ("image.scale", [1, 0, 1], "scale (1.0, 0.0, 1.0)"),
        ("image.mean", [1, float("nan"), 1], "mean (1.0, nan, 1.0)"),
        ("image.fit", "pad", "expected squash or crop"),
        ("image.fit", "crop", "fit crop, resize None"),
        ("image.resize", 256, "fit squash, resize 256"),
        ("image.resize", 256.0, "image.resize is 256.0"),
        ("precisions.lm", "int3", f"precisions.lm is 'int3', expected {PRECISION}"),
        ("prompt.image", ["a", 2], "2 slots, not 3"),
        ("prompt.image", ["a", -1, 4], "slots"),
        ("prompt.image", ["a", 1.5], "prompt.image"),
        ("prompt.image", "a", "prompt.image is not a list"),
        ("prompt.question", "hello", "must hold {question} once"),
        ("prompt.similarity", [["a", 0.1], ["b", 0.5]], "falling"),
        ("prompt.similarity", [], "falling"),
        ("prompt.stop", ["<|nothing|>"], "stop token '<|nothing|>'"),
        ("files.0.path", "../vision.onnx", "leaves the model directory"),
        ("files.0.path", "/etc/passwd", "leaves the model directory"),
        ("files.0.path", "a/../../b", "leaves the model directory"),
        ("files.0.path", "..\\b", "leaves the model directory"),
        ("files.0.path", "C:/b", "leaves the model directory"),
        ("files.0.path", "", "leaves the model directory"),
        ("files.0.bytes", -1, "has size -1"),
        ("files.0.sha256", "0" * 63, "no SHA-256"),
        ("files.0.sha256", "G" * 64, "no SHA-256"),
        ("files.0.sha256", "0" * 64, "not what its SHA-256 says"),
        ("files.0.path", "connector.onnx", "listed twice"),
        ("files.0", ..., "does not list vision.onnx"),
        ("lm.layers", 3, "other inputs"),
        ("lm.vocab", 300, "embeddings.bin does not hold 300"),
        ("vision.width", 17, "key.npz does not fit"),
    ],
)
def test_a_wrong_manifest_is_refused(model: Path, keys: str, value: Any, message: str) -> None:
    edit(model, keys, value)
    with pytest.raises(ModelError) as error:
        TinyAlign.load(model)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 4}', "[" * 100_000, "\xff"])
def test_no_manifest_at_all(model: Path, text: str) -> None:
    (model / MANIFEST_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(ModelError):
        read_manifest(model)


def test_missing_and_half_written_directories(model: Path, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "nothing", "no model directory at"),
        (model / MANIFEST_NAME, "is not a model directory"),
        (tmp_path, f"has no {MANIFEST_NAME}"),
    ):
        with pytest.raises(ModelError, match=message):
            TinyAlign.load(path)
    for name in ("lm.onnx.data", "compressor.onnx", "bank.sqlite"):
        (model / name).rename(model / "away")
        with pytest.raises(ModelError, match=f"incomplete: {name} is missing"):
            TinyAlign.load(model)
        (model / "away").rename(model / name)
    (model / "key.npz").unlink()
    (model / "key.npz").mkdir()
    with pytest.raises(ModelError, match=r"key.npz is not a file"):
        TinyAlign.load(model)


@pytest.mark.parametrize(
    "name", ["lm.onnx.data", "embeddings.bin", "tokenizer.json", "bank.sqlite"]
)
def test_every_changed_byte_is_noticed_even_after_a_good_check(model: Path, name: str) -> None:
    path = model / name
    TinyAlign.load(model).close()
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # hide it as well as one can
    with pytest.raises(ModelError, match="not what its SHA-256 says"):
        TinyAlign.load(model)
    path.write_bytes(data[:-1])
    with pytest.raises(ModelError, match="bytes, not"):
        TinyAlign.load(model)


def test_a_good_check_is_remembered(
    model: Path, verified_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SETTLED_NS", 0)
    time.sleep(0.05)
    manifest = read_manifest(model)
    files.verify_files(model, manifest)
    assert list((verified_cache / "verified").glob("*.json"))
    monkeypatch.setattr(files, "_check_hash", lambda *_: pytest.fail("hashed again"))
    files.verify_files(model, manifest)
    (model / "lm.onnx").touch()
    with pytest.raises(pytest.fail.Exception):
        files.verify_files(model, manifest)


def test_fresh_files_are_not_remembered(model: Path, verified_cache: Path) -> None:
    before = set((verified_cache / "verified").glob("*"))
    files.verify_files(model, read_manifest(model))
    assert set((verified_cache / "verified").glob("*")) == before


def test_links_may_not_lead_out(model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (model / "lm.onnx").rename(outside)
    (model / "lm.onnx").symlink_to(outside)
    with pytest.raises(ModelError, match="leaves the model directory"):
        TinyAlign.load(model)
    (model / "lm.onnx").unlink()
    (model / "lm.onnx").symlink_to("lm.onnx")
    with pytest.raises(ModelError):
        TinyAlign.load(model)


def test_a_linked_and_read_only_directory_works(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(model)
    TinyAlign.load(link).close()
