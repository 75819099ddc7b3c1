"""Training on a JSON file of one's own: reading, the split, the feature cache, episodes, bank."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from test_training import DV, MEMORY, RECIPE, tiny_parts

from tinyalign.runtime.errors import InputError
from tinyalign.runtime.images import load_picture, preprocess
from tinyalign.runtime.prompt import encode_text
from tinyalign.training import cli as train_cli
from tinyalign.training import episodes, llava, pipeline, stages
from tinyalign.training.features import IMAGE, Record, load_features, load_thumbnails
from tinyalign.training.llava import (
    check_together,
    cut_text,
    encode_data,
    read_data,
)
from tinyalign.training.pictures import split_of
from tinyalign.training.views import rng_of, unmirrored_view
from tinyalign.training.world import World, make_world

HELD, TRAIN = ([f"c{i}" for i in range(99) if split_of(f"c{i}") == s] for s in ("held", "train"))
TALK = ({"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cup."})


def talk(*texts: str) -> list[dict[str, str]]:
    """Texts as the turns of a conversation."""
    return [
        {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)
    ]  # fmt: skip


def write_png(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((40, 30)).save(path)


def fake_encoder(cache: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Cells [B, 10, 1280] that depend on the pixels [B, 3, S, S]."""

    def encode(pixels: np.ndarray) -> np.ndarray:
        cells = np.zeros((len(pixels), 10, 1280), np.float32)
        cells[:, :, :300] = pixels[:, :, ::26, ::26].reshape(len(pixels), 1, 300).clip(0)
        return cells

    return encode


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the data; its feature cache lies beside it, the encoder is a stand-in."""
    monkeypatch.setenv("TINYALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llava, "encoder", fake_encoder)
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(entries: Any, name: str = "qa.json") -> Path:
    """A JSON file of the current folder."""
    Path(name).write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return Path(name)


def many(count: int, **extra: object) -> list[dict[str, object]]:
    """Entries with a picture each, concepts c0, c1, ..."""
    for i in range(count):
        write_png(Path(f"c{i}.png"), i)
    return [{"image": f"c{i}.png", "conversations": TALK, **extra} for i in range(count)]


# ------------------------------------------------------------------ reading


def test_conversations_are_read_as_they_are(place: Path) -> None:
    entries = [
        {"id": "1", "image": "a/x.png",
         "conversations": talk("<image>\nWhat is it?", "A cup.", "Whose?\n<image>", " Mira's. ")},
        {"id": "2", "image": "y.png", "caption": "A dog."},
        {"id": "3", "image": "./a/x.png", "conversations": talk("Describe.", "A red cup.")},
        {"id": "4", "conversations": talk("Hello?", "Hello.")},
        {"id": "5", "image": [], "conversations": talk("Hello?", "Hello.")},
        {"id": "6", "image": ["z.png"], "conversations": TALK},
        {"id": "7", "image": ["z.png", "w.png"], "conversations": talk("Which?", "Both.")},
    ]  # fmt: skip
    data = read_data(write(entries))
    assert (data.entries, data.pictureless, data.several) == (7, 2, 1)
    assert [(shown.file.as_posix(), shown.record.questions) for shown in data.pictures] == [
        ("a/x.png",
         (("What is it?", "A cup."), ("Whose?", "Mira's."), ("Describe.", "A red cup."))),
        ("y.png", (("Describe the picture.", "A dog."),)),
        ("z.png", (("What is this?", "A cup."), ("Which?", "Both."))),
    ]  # fmt: skip
    assert all(shown.record.source == "llava" for shown in data.pictures)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (7, "no conversation"),
        ({"image": "a.png"}, "no conversation"),
        ({"image": "a.png", "conversations": talk("What?", "This.", "And?")}, "no conversation"),
        ({"image": "a.png", "conversations": talk("What?", "This.")[::-1]}, "no conversation"),
        ({"image": "a.png", "conversations": talk("<image>", "This.")}, "the question is empty"),
        ({"image": "a.png", "conversations": talk("What?", " ")}, "the answer is empty"),
        ({"image": "a.png", "caption": 5}, "the answer is int, not text"),
        ({"image": "a.png", "conversations": talk("\ud800?", "This.")}, "not valid Unicode"),
        ({"image": 3, "conversations": TALK}, "the image is int, not text"),
        ({"image": ["a.png", ""], "conversations": TALK}, "the image is no path"),
        ({"image": "a\0.png", "conversations": TALK}, "the image is no path"),
        ({"image": "a.png", "conversations": TALK, "concept": " "}, "the concept is empty"),
        ({"image": "a.png", "conversations": TALK, "metadata": {"concept": 4}}, "the concept is"),
        ({"image": "ok.png", "conversations": TALK, "concept": "cat"}, "was 'ok' before"),
    ],
)
def test_a_wrong_entry_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], second: object, says: str
) -> None:
    write([{"image": "ok.png", "conversations": TALK}, second])
    assert train_cli.main(["--data", "qa.json", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tinyalign-train: qa.json, entry 2: ") and says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [("[\n1,", "qa.json, line 2: this is not JSON"), ("{}", "qa.json: this is not a JSON list")],
)
def test_what_is_no_list_is_refused(place: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_data(write(text))


def test_files_that_cannot_be_read(place: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read none\.json: No such file"):
        read_data(Path("none.json"))
    Path("latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(InputError, match=r"latin\.json is not UTF-8"):
        read_data(Path("latin.json"))
    with pytest.raises(InputError, match="nowhere is not a folder"):
        read_data(write([]), Path("nowhere"))


def test_every_data_has_its_images(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(pipeline, "train", lambda *args: given.append(args))
    entries = [{"image": "a.png", "conversations": TALK}]
    write(entries, "one.json")
    write(entries, "two.json")
    Path("there").mkdir()
    command = ["--data", "one.json", "--images", "there", "--data", "two.json"]
    assert train_cli.main(command) == 0
    assert [one.pictures[0].file for one in given[0][3]] == [Path("there/a.png"), Path("a.png")]
    assert train_cli.main([]) == 0 and given[1][3] == []
    for wrong in (["--images", "there"], [*command[:4], "--images", "there"]):
        with pytest.raises(SystemExit) as stopped:
            train_cli.main(wrong)
        assert stopped.value.code == 2


# ------------------------------------------------------------------ the split


def test_a_concept_is_on_one_side(place: Path) -> None:
    """Variants of a thing stay together although their paths alone would part them."""
    held, train = HELD[0], TRAIN[0]
    names = [f"c{i}" for i in range(40)]
    assert {split_of(name) for name in names} == {"held", "train"}
    for key in ("concept", "metadata"):
        for concept, side in ((held, "held"), (train, "train")):
            told = concept if key == "concept" else {"concept": concept}
            entries = [{"image": f"{n}.png", "conversations": TALK, key: told} for n in names]
            assert {s.record.split for s in read_data(write(entries)).pictures} == {side}
    suffixes = [f".{i}" for i in range(40)]
    for name, side in ((held, "held"), (train, "train")):  # else by path, without its extension
        entries = [{"image": f"./{name}{suffix}", "conversations": TALK} for suffix in suffixes]
        data = read_data(write(entries))
        assert {(s.record.concept, s.record.split) for s in data.pictures} == {(name, side)}


def test_files_together_keep_a_picture_on_one_side(place: Path) -> None:
    Path("a").mkdir()
    Path("a/link").symlink_to("..")
    held = next(name for name in HELD if split_of(f"link/{name}") == "train")
    one = read_data(write([{"image": f"{held}.png", "conversations": TALK}], "one.json"))
    entry = {"image": f"link/{held}.png", "conversations": TALK}  # the same file by another path
    two = read_data(write([entry], "two.json"), Path("a"))
    assert one.pictures[0].record.id == two.pictures[0].record.id
    with pytest.raises(InputError, match="held out in one file and trained on in another"):
        check_together([one, two])
    with pytest.raises(InputError, match=r"one\.json is given twice"):
        check_together([one, one])
    same = read_data(write([entry | {"concept": held}], "two.json"), Path("a"))
    check_together([one, same])


# ------------------------------------------------------------------ the feature cache


def test_a_picture_is_seen_as_it_is_and_once_more(place: Path) -> None:
    data = read_data(write(many(3)))
    encode_data(data)
    cells, records = load_features(sources=(data.source,))
    assert [(r.concept, r.view) for r in records] == [
        (f"c{i}", v) for i in range(3) for v in (0, 1)
    ]
    assert [records[0]] == [data.pictures[0].record]
    pixels = preprocess(load_picture("c0.png"), IMAGE)  # as the runtime makes them
    assert np.array_equal(cells[0], fake_encoder(place)(pixels[None])[0].astype(np.float16))
    assert not np.array_equal(cells[0], cells[1])
    thumbnails = load_thumbnails(sources=(data.source,))
    assert set(thumbnails) == {r.id for r in records if r.split == "train"}


def test_left_stays_left() -> None:
    picture = Image.new("RGB", (80, 40), "red")
    picture.paste("blue", (40, 0, 80, 40))
    for key in range(20):
        seen = np.asarray(unmirrored_view(picture, rng_of(str(key)))).astype(int)
        assert seen[130, 5, 0] > 150 > seen[130, 5, 2] and seen[130, 254, 2] > 150


def test_encoding_continues_where_it_stopped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_data(write(many(20)))  # 40 rows, three batches
    calls = Counter[str]()

    def stopping(cache: Path) -> Callable[[np.ndarray], np.ndarray]:
        encode = fake_encoder(cache)

        def stop(pixels: np.ndarray) -> np.ndarray:
            calls["batches"] += 1
            if calls["batches"] == 2:
                raise KeyboardInterrupt
            return encode(pixels)

        return stop

    encode_data(data, place / "whole")
    monkeypatch.setattr(llava, "encoder", stopping)
    with pytest.raises(KeyboardInterrupt):
        encode_data(data)
    _, records = load_features(sources=(data.source,))
    assert len(records) == 16
    encode_data(data)
    assert calls["batches"] == 4  # one stopped, then only what was missing
    cells, records = load_features(sources=(data.source,))
    expected = load_features(place / "whole", sources=(data.source,))
    assert np.array_equal(cells, expected[0]) and records == expected[1]
    monkeypatch.setattr(llava, "encoder", lambda cache: pytest.fail("encoded again"))
    encode_data(read_data(Path("qa.json")))


def test_a_changed_file_is_encoded_anew(place: Path) -> None:
    entries = many(2)
    first = read_data(write(entries))
    assert read_data(Path("../data/qa.json")).source == first.source
    changed = read_data(write(entries[:1]))
    elsewhere = read_data(write(entries, "other.json"))
    folder = read_data(Path("qa.json"), place.parent)
    assert len({first.source, changed.source, elsewhere.source, folder.source}) == 4


def test_pictures_that_cannot_be_read_are_listed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = many(4)
    lost = [{"image": f"lost{i}.png", "conversations": TALK} for i in range(24)]
    Path("broken.png").write_bytes(b"no picture")
    several = {"image": ["c0.png", "c1.png"], "conversations": TALK}
    others = [{"image": "broken.png", "conversations": TALK}, several, {"conversations": TALK}]
    data = read_data(write([*others[:1], *lost, *entries, *others[1:]]))
    for _ in range(2):  # the second time nothing is left to encode
        encode_data(data)
        lines = capsys.readouterr().err.splitlines()
        lines = lines[lines.index(next(line for line in lines if line.startswith("qa.json"))) :]
        assert lines[0].startswith("qa.json: 31 entries, 4 pictures, ")
        assert lines[1] == "  1 entries without a picture are left out"
        assert lines[2] == "  1 entries with several pictures: the first is used"
        assert lines[3] == "  25 pictures cannot be read and are left out:"
        assert "broken.png" in lines[4] and lines[5] == "    no picture at lost0.png"
        assert len(lines) == 4 + llava.LISTED + 1 and lines[-1] == "    and 5 more"
    _, records = load_features(sources=(data.source,))
    assert {record.concept for record in records} == {f"c{i}" for i in range(4)}


@pytest.mark.parametrize("entries", [[], [{"image": "none.png", "conversations": TALK}]])
def test_nothing_is_trained_when_nothing_is_left(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, entries: Any
) -> None:
    monkeypatch.setattr(pipeline, "build_features", lambda: pytest.fail("went on"))
    write(entries)
    assert train_cli.main(["--data", "qa.json", "--out", "run"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "tinyalign-train: qa.json: no picture is left to train on"


def test_all_held_out_is_nothing_left(place: Path) -> None:
    with pytest.raises(InputError, match="no picture is left to train on"):
        encode_data(read_data(write(many(3, concept=HELD[0]))))


# ------------------------------------------------------------------ training


@pytest.fixture
def world(place: Path) -> World:
    """The tiny model's world: six usual pictures and forty of a JSON file."""
    entries = many(40)
    entries[1]["conversations"] = talk("Describe it.", "It is blue. " * 9, "Whose?", "Ann's.")
    data = read_data(write(entries))
    encode_data(data)
    cells, records = load_features(sources=(data.source,))
    usual = [
        Record(f"emoji/{i}", view, "emoji", "train", f"thing{i}", f"thing{i}", "toy", "", "", "")
        for i in range(6)
        for view in range(2)
    ]
    drawn = np.random.default_rng(0).normal(size=(len(usual), 10, DV)).clip(0)
    joined = np.concatenate((drawn.astype(np.float16), cells[:, :, :DV]))
    return make_world(tiny_parts(), joined, [*usual, *records], RECIPE)


def test_held_entries_are_neither_asked_nor_remembered(world: World) -> None:
    sides = Counter(r.split for r in world.records if r.source == "llava")
    assert sides["held"] >= 4 and sides["train"] >= 40
    remembered = [world.records[row] for row in world.bank if row >= 12]
    assert {r.split for r in remembered} == {"train"} and {r.view for r in remembered} == {0}
    assert len(remembered) == sides["train"] // 2
    rows = episodes.rows_by_source(world.records)
    assert len(rows["llava"]) == sides["train"]
    for seed in range(200):
        drawn = episodes.draw_episode(world, rows, RECIPE, Random(seed))
        shown = [drawn.row, *(memory.row for memory in drawn.memories)]
        assert {world.records[row].split for row in shown} == {"train"}


def test_memories_tell_the_first_answer_and_fit(
    place: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {world.records[row].concept: t for row, t in zip(world.bank, world.bank_texts)}  # noqa: B905
    assert texts[TRAIN[0]] == "What is this? A cup."
    longest = MEMORY.max_text_tokens
    assert texts["c1"] == "It is blue. It is blue. It is blue. It is blue."  # 48 bytes are too many
    assert all(len(encode_text(world.parts.tokenizer, text)) <= longest for text in texts.values())
    make_world(world.parts, world.cells, world.records, RECIPE)
    assert capsys.readouterr().err == "1 memories are cut: they hold at most 48 tokens\n"
    tokenizer = world.parts.tokenizer
    assert cut_text(tokenizer, "ab cd", 5) == "ab cd" and cut_text(tokenizer, "ab cd", 4) == "ab"
    assert cut_text(tokenizer, "ab cd", 2) == "ab" and cut_text(tokenizer, "abcd", 3) == "abc"


def test_questions_are_asked_as_they_are(world: World) -> None:
    rows = episodes.rows_by_source(world.records)
    asked = set()
    for seed in range(300):
        drawn = episodes.aligned_episode(world, rows, RECIPE, Random(seed))
        record = world.records[drawn.row]
        if record.source == "llava":
            turns = {(turn.question, turn.answer) for turn in drawn.turns}
            assert turns <= set(record.questions) and len(turns) == len(drawn.turns)
            assert len(turns) == min(len(record.questions), RECIPE.turns)
            asked.add(record.concept)
        assert all(world.records[m.row].id != record.id for m in drawn.memories)
    assert len(asked) > 25


def test_taught_memories_always_have_a_name(world: World) -> None:
    for row in world.bank:
        for seed in range(20):
            assert episodes.draw_taught(world, world.records[row], Random(seed)).name


def test_stages_run_on_it(world: World, tmp_path: Path) -> None:
    run = stages.Run(world.parts, world, RECIPE, tmp_path / "run", world.parts.lm)
    stages.train_bags(run)
    stages.train_slots(run)
    stages.train_align(run)
    assert all(np.isfinite(entry["bits"]) for entry in run.log)


def test_draws_without_data_are_as_they_were() -> None:
    usual = {source: share for source, share in episodes.SHARES.items() if source != "llava"}
    rows = {source: list(range(100 * i, 100 * i + 50)) for i, source in enumerate(usual)}
    for seed in range(300):
        rng, before = Random(seed), Random(seed)
        source = before.choices(list(usual), weights=list(usual.values()))[0]
        assert episodes.draw_row(rows, rng) == before.choice(rows[source])
        assert rng.getstate() == before.getstate()


def test_a_run_is_not_continued_on_other_data(tmp_path: Path) -> None:
    check = pipeline.check_same_data
    check(tmp_path / "default", [])
    assert not (tmp_path / "default").exists()  # nothing is left behind without --data
    check(tmp_path, ["llava-1"])
    check(tmp_path, ["llava-2"])  # not begun yet
    (tmp_path / "key.npz").touch()
    check(tmp_path, ["llava-2"])
    for other in ([], ["llava-1"], ["llava-2", "llava-1"]):
        with pytest.raises(InputError, match="a run on other data"):
            check(tmp_path, other)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "checkpoint.pt").touch()
    check(tmp_path / "begun", [])
    with pytest.raises(InputError, match="a run on other data"):
        check(tmp_path / "begun", ["llava-1"])
