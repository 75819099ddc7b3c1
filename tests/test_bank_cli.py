"""``tinyalign-bank`` as a person runs it, on the tiny model."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from PIL import Image
from test_cli import BLOCK, environment, tree

from tinyalign.bank import Bank
from tinyalign.runtime import TinyAlign, bank_cli, teach
from tinyalign.runtime.terminal import picture_lines

COMMAND = Path(sys.executable).with_name("tinyalign-bank")
VERBS = (
    "add list show search remove update stats merge export import compact verify reindex "
    "calibrate".split()
)


@pytest.fixture
def place(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: pictures p0.png to p4.png and the tiny model to use."""
    for number in range(5):
        tiny_model.picture(number).save(tmp_path / f"p{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYALIGN_MODEL", str(tiny))
    return tmp_path


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a verb in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = bank_cli.main(arguments)
        except SystemExit as end:
            code = end.code
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


@pytest.fixture
def ok(run: Callable[..., Any]) -> Callable[..., str]:
    """Run a verb that must succeed quietly; its output."""

    def call(*arguments: str) -> str:
        code, out, err = run(*arguments)
        assert (code, err) == (0, ""), (arguments, err)
        return out

    return call


@pytest.fixture
def bank(ok: Callable[..., str]) -> str:
    """A bank of three memories."""
    for number, owner in enumerate(("Ann", "Bo", "Ann")):
        picture = f"p{number}.png"
        ok("add", picture, "--text", f"cup {number}", "--set", f"owner={owner}", "--bank", "b.db")
    return "b.db"


def listed(ok: Callable[..., str], *arguments: str) -> list[dict[str, Any]]:
    memories: list[dict[str, Any]] = json.loads(ok("list", "--json", *arguments))["memories"]
    return memories


def lines(path: Path, *items: Any) -> str:
    text = "".join((i if isinstance(i, str) else json.dumps(i)) + "\n" for i in items)
    path.write_text(text)
    return str(path)


def files(folder: Path) -> set[str]:
    """All files but those that SQLite keeps beside a bank while it is read."""
    return {name for name, _ in tree(folder) if not name.endswith(("-wal", "-shm"))}


# --- adding --------------------------------------------------------------------------------


def test_add_a_picture(ok: Callable[..., str], place: Path, tiny: Path) -> None:
    out = ok("add", "p0.png", "--text", " my cup ", "--set", "room=den", "--bank", "b.db")
    assert out == "added 1\n"
    assert ok("add", "p0.png", "--text", "my cup", "--bank", "b.db") == "known already 1\n"
    with TinyAlign.load(tiny, banks=[]) as model, Bank.open("b.db") as stored:
        expected = model.memory("p0.png", "my cup")
        memory = stored.get(1)
        assert stored.fingerprint == tiny_model.FINGERPRINT
    assert (memory.text, memory.source, memory.metadata) == ("my cup", "p0.png", {"room": "den"})
    assert memory.content_hash == expected.content_hash
    np.testing.assert_allclose(memory.key, expected.key, atol=1e-3)
    small = Image.open(io.BytesIO(memory.thumbnail or b""))
    assert (small.format, small.size) == ("WEBP", (40, 30))


def test_thumbnails_are_small(ok: Callable[..., str], place: Path) -> None:
    tiny_model.picture(9, (600, 300)).save("large.png")
    ok("add", "large.png", "--text", "large", "--bank", "b.db")
    ok("show", "1", "--bank", "b.db", "--thumbnail", "t.webp")
    assert Image.open("t.webp").size == (48, 24)


def test_add_lists(ok: Callable[..., str], place: Path, tmp_path: Path) -> None:
    (place / "sub").mkdir()
    shutil.move("p1.png", "sub/p1.png")
    lines(
        place / "sub" / "items.jsonl",
        {"image": "p1.png", "text": "one", "metadata": {"n": 1, "blue": True}},
        "",
        {"image": "../p2.png", "text": "two"},
    )
    assert ok("add", "sub/items.jsonl", "--bank", "b.db") == "added 1, 2\n"
    (place / "items.csv").write_text(
        'image,text,metadata,room\np3.png,"three, 3","{""n"": 3}",den\np4.png,four,,\n'
    )
    assert ok("add", "items.csv", "--bank", "b.db", "--set", "by=me") == "added 3, 4\n"
    assert "1  one  (sub/p1.png, blue=true, n=1)\n" in ok("list", "--bank", "b.db")
    assert "metadata  blue=true\n" in ok("show", "1", "--bank", "b.db")
    memories = listed(ok, "--bank", "b.db", "--where", "by=me")
    assert [m["id"] for m in memories] == [3, 4]
    memories = listed(ok, "--bank", "b.db")
    assert [(m["id"], m["text"], m["metadata"]) for m in memories] == [
        (1, "one", {"n": 1, "blue": True}),
        (2, "two", {}),
        (3, "three, 3", {"n": 3, "room": "den", "by": "me"}),
        (4, "four", {"by": "me"}),
    ]
    assert set(memories[0]) == {"id", "text", "source", "metadata"}


def test_add_conversations(ok: Callable[..., str], place: Path) -> None:
    turns = (("human", "Eh?\n<image>"), ("gpt", "cup"), ("human", "Describe."), ("gpt", "Blue."))
    talk = [{"from": speaker, "value": value} for speaker, value in turns]
    entries = [{"id": "1", "image": "p0.png", "conversations": talk}]
    lines(place / "llava.json", [*entries, {"image": "p1.png", "caption": "red"}])
    assert ok("add", "llava.json", "--bank", "b.db") == "added 1, 2, 3\n"
    assert [m["text"] for m in listed(ok, "--bank", "b.db")] == ["Eh? cup", "Blue.", "red"]


def test_add_conversations_of_several_pictures_and_of_none(
    run: Callable[..., Any], place: Path
) -> None:
    talk = [{"from": "human", "value": "Eh?"}, {"from": "gpt", "value": "No"}]
    several = {"image": ["p0.png", "p1.png", "none.png"], "conversations": talk}
    lines(place / "llava.json", [several, {"conversations": talk}, {"caption": "no picture"}])
    code, out, err = run("add", "llava.json", "--bank", "b.db")
    assert (code, out) == (
        1,
        "added 1, 2; could not read 1; left out 2 without a picture\n",
    )
    assert err == "tinyalign-bank: llava.json, entry 1: no picture at none.png\n"
    lines(place / "talk.json", [{"conversations": talk}])
    code, out, err = run("add", "talk.json", "--bank", "b.db")
    assert (code, err) == (2, "tinyalign-bank: talk.json lists nothing to add with a picture\n")


def test_add_standard_input(
    ok: Callable[..., str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.dumps({"image": "p0.png", "text": "œ\u2028猫"}, ensure_ascii=False)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert json.loads(ok("add", "-", "--bank", "b.db", "--json")) == {
        "added": [1],
        "known": [],
        "failed": [],
        "without_picture": [],
    }
    assert listed(ok, "--bank", "b.db")[0]["text"] == "œ\u2028猫"


def test_add_a_folder(ok: Callable[..., str], place: Path) -> None:
    (place / "in" / "deep").mkdir(parents=True)
    (place / "in" / ".hidden").mkdir()
    for name in ("a_cup-2.png", "deep/b.png", ".hidden/c.png", ".d.png"):
        shutil.copy("p0.png", place / "in" / name)
    (place / "in" / "notes.txt").write_text("no picture")
    assert ok("add", "in", "--text-from-name", "--bank", "b.db") == "added 1, 2\n"
    assert [m["text"] for m in listed(ok, "--bank", "b.db")] == ["a cup 2", "b"]
    out = ok("add", "in", "--text", "cup", "--bank", "b.db")  # the same picture and text twice
    assert out == "added 3; known already 3\n"


def test_a_folder_with_what_cannot_be_read(run: Callable[..., Any], place: Path) -> None:
    (place / "in").mkdir()
    shutil.copy("p0.png", "in/a.png")
    (place / "in" / "b.png").symlink_to("gone.png")
    (place / "in" / "c.heic").write_bytes(b"ftypheic")
    code, out, err = run("add", "in", "--text", "cup", "--bank", "b.db")
    assert (code, out) == (1, "added 1; could not read 2\n")
    assert err.splitlines() == [
        "tinyalign-bank: no picture at in/b.png",
        "tinyalign-bank: in/c.heic is not a picture this program reads (JPEG, PNG, WebP, ...)",
    ]


def test_add_to_an_empty_bank(ok: Callable[..., str], bank: str) -> None:
    ok("remove", "1", "2", "3", "--bank", bank)
    assert ok("add", "p0.png", "--text", "cup", "--bank", bank) == "added 4\n"


def test_of_the_same_picture_and_text_the_first_counts(ok: Callable[..., str], place: Path) -> None:
    twin = {"image": "p1.png", "text": "cup"}
    more = [{"image": f"p{n}.png", "text": "cup"} for n in (2, 0)]
    lines(place / "items.jsonl", twin | {"metadata": {"n": 1}}, *more, twin)
    assert ok("add", "items.jsonl", "--bank", "b.db") == "added 1, 2, 3; known already 1\n"
    found = [(m["source"], m["metadata"]) for m in listed(ok, "--bank", "b.db")]
    assert found == [("p1.png", {"n": 1}), ("p2.png", {}), ("p0.png", {})]


def test_a_file_name_that_is_not_utf8(ok: Callable[..., str], place: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy("p0.png", name)
    assert ok("add", name, "--text", "cup", "--bank", "b.db") == "added 1\n"
    assert ok("list", "--bank", "b.db") == "1  cup  (caf\ufffd.png)\n"


def test_pictures_that_cannot_be_read_are_listed_and_the_rest_is_added(
    run: Callable[..., Any], place: Path
) -> None:
    (place / "bad.png").write_bytes(b"no picture")
    items = [{"image": n, "text": "x"} for n in ("none.png", "p0.png", "bad.png", "p1.png")]
    lines(place / "items.jsonl", *items)
    code, out, err = run("add", "items.jsonl", "--bank", "b.db")
    assert (code, out) == (1, "added 1, 2; could not read 2\n")
    assert err.splitlines() == [
        "tinyalign-bank: items.jsonl, line 1: no picture at none.png",
        "tinyalign-bank: items.jsonl, line 3: bad.png is not a picture this program reads "
        "(JPEG, PNG, WebP, ...)",
    ]
    lines(place / "all.jsonl", items[0])
    assert run("add", "all.jsonl", "--bank", "new.db")[0] == 1
    assert not (place / "new.db").exists()


def test_an_interrupted_add_goes_on_where_it_stopped(
    run: Callable[..., Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines(place / "items.jsonl", *({"image": f"p{n}.png", "text": f"{n}"} for n in range(5)))
    monkeypatch.setattr(teach, "BATCH", 2)
    look, seen = TinyAlign.memory, []

    def memory(self: TinyAlign, *arguments: Any) -> Any:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(arguments[1])
        return look(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TinyAlign, "memory", memory)
        code, out, err = run("add", "items.jsonl", "--bank", "b.db")
    assert (code, out, err) == (130, "", "tinyalign-bank: 2 of 5\n")
    code, out, _ = run("add", "items.jsonl", "--bank", "b.db")
    assert (code, out) == (0, "added 3, 4, 5; known already 1, 2\n")


def test_adding_opens_no_language_model(
    ok: Callable[..., str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyalign.runtime.loading.LanguageModel", None)
    assert ok("add", "p0.png", "--text", "cup", "--bank", "b.db") == "added 1\n"


# --- looking -------------------------------------------------------------------------------


def test_list(ok: Callable[..., str], bank: str) -> None:
    assert ok("list", "--bank", bank).splitlines()[1] == "2  cup 1  (p1.png, owner=Bo)"
    assert [m["id"] for m in listed(ok, "--bank", bank, "--where", "owner=Ann")] == [1, 3]
    own = listed(ok)
    assert [m["text"] for m in own] == list(tiny_model.TEXTS)
    both = listed(ok, "--bank", "default", "--bank", bank)
    assert [m["bank"] for m in both] == ["default"] * 3 + ["b"] * 3


def test_show(ok: Callable[..., str], bank: str, run: Callable[..., Any]) -> None:
    out = ok("show", "2", "--bank", bank)
    assert "text      cup 1\n" in out and "metadata  owner=Bo\n" in out
    shown = json.loads(ok("show", "2", "--bank", bank, "--json"))
    assert (shown["id"], shown["source"], shown["thumbnail"]) == (2, "p1.png", True)


def test_show_draws_on_a_terminal(
    ok: Callable[..., str], bank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b" not in ok("show", "2", "--bank", bank)
    monkeypatch.setattr("tinyalign.runtime.terminal.can_draw", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "20")
    out = ok("show", "2", "--bank", bank)
    with Bank.open(bank) as opened:
        drawn = picture_lines(opened.get(2).thumbnail or b"", 20)
    assert out.splitlines()[-len(drawn) :] == drawn
    assert "\x1b" not in ok("show", "2", "--bank", bank, "--json")


def test_search_says_why(ok: Callable[..., str], bank: str, tiny: Path) -> None:
    arguments = ("search", "p1.png", "--text", "cup 1", "--bank", bank, "--bank", "default")
    found = json.loads(ok(*arguments, "--json", "--top-k", "6"))["memories"]
    first = found[0]
    assert (first["id"], first["bank"], first["similarity"]) == (2, "b", "same")
    assert first["score"] == pytest.approx(1, abs=2e-3)
    assert first["image_score"] == pytest.approx(0.8, abs=2e-3)  # 1 - alpha
    for memory in found:
        assert memory["score"] == pytest.approx(
            memory["image_score"] + memory["text_score"], abs=1e-3
        )
    assert len(found) == 6 and found == sorted(found, key=lambda m: -m["score"])
    with TinyAlign.load(tiny, banks=["b.db", "default"]) as model:
        asked = model.retrieve("p1.png", "cup 1")
    assert [(m["bank"], m["id"]) for m in found[:2]] == [(h.bank, h.id) for h in asked]
    out = ok("search", "p1.png", "--bank", bank, "--top-k", "1")
    assert out.startswith("b 2  0.894 = picture 0.894 + text 0.000  close  cup 1")
    found = json.loads(ok("search", "p1.png", "--bank", bank, "--where", "owner=Ann", "--json"))
    assert {m["id"] for m in found["memories"]} == {1, 3}


def test_stats_and_verify(ok: Callable[..., str], run: Callable[..., Any], bank: str) -> None:
    numbers = json.loads(ok("stats", "--json", "--bank", bank))
    assert (numbers["memories"], numbers["thumbnails"], numbers["index"]) == (3, 3, "exact")
    assert numbers["fingerprint"] == tiny_model.FINGERPRINT
    out = ok("stats", "--bank", bank)
    near = numbers["nearest"]
    assert f"{numbers['bytes_per_memory']:,.0f} a memory" in out
    assert f"a tenth {near['p10']:.3f}, half {near['p50']:.3f}, nine tenths" in out
    assert "score floor    -1.000\n" in out  # the tiny model's last one
    assert "is sound: 3 memories" in ok("verify", "--bank", bank)
    with Bank.open(bank) as opened:
        opened._store._connection.execute("UPDATE memories SET key = x'00' WHERE id = 2")
    code, out, err = run("verify", "--bank", bank)
    assert (code, out) == (1, "")
    assert err == "tinyalign-bank: b.db: memory 2 cannot be read\n"


def test_calibrate(ok: Callable[..., str], run: Callable[..., Any], bank: str) -> None:
    search = ("search", "p1.png", "--text", "cup 1", "--bank", bank)
    words = [m["similarity"] for m in json.loads(ok(*search, "--json"))["memories"]]
    assert None not in words
    assert ok("calibrate", "--floor", "0.99", "--bank", bank) == "score floor 0.990\n"
    found = json.loads(ok(*search, "--json"))["memories"]
    assert [(m["similarity"], m["floor"]) for m in found] == [("same", 0.99)] + [(None, 0.99)] * 2
    assert "below the floor of 0.990, not used  cup" in ok(*search)
    assert "score floor    0.990" in ok("stats", "--bank", bank)
    assert ok("calibrate", "--reset", "--bank", bank) == "score floor: the model's own\n"
    assert "score floor    the model's own" in ok("stats", "--bank", bank)
    assert [m["similarity"] for m in json.loads(ok(*search, "--json"))["memories"]] == words
    for number in range(20):
        tiny_model.picture(20 + number).save(f"more{number}.png")
        ok("add", f"more{number}.png", "--text", f"m {number}", "--bank", bank)
    with Bank.open(bank) as opened:
        expected = opened.calibrate()
    ok("calibrate", "--reset", "--bank", bank)
    out = ok("calibrate", "--bank", bank)
    assert out == f"score floor {expected:.3f}, measured on 23 memories\n"
    assert json.loads(ok("stats", "--json", "--bank", bank))["score_floor"] == expected


# --- correcting ----------------------------------------------------------------------------


def test_remove(ok: Callable[..., str], bank: str) -> None:
    assert ok("remove", "2", "2", "--bank", bank) == "removed 1\n"
    assert ok("remove", "--where", "owner=Ann", "--bank", bank) == "removed 2\n"
    assert listed(ok, "--bank", bank) == []


def test_update_metadata(ok: Callable[..., str], bank: str) -> None:
    out = ok("update", "1", "--bank", bank, "--set", "room=den", "--unset", "owner")
    assert out == "updated 1\n"
    ok("update", "1", "--bank", bank, "--source", "attic")
    first = listed(ok, "--bank", bank)[0]
    assert (first["source"], first["metadata"]) == ("attic", {"room": "den"})


def test_update_text_without_the_picture(ok: Callable[..., str], bank: str, tiny: Path) -> None:
    Path("p1.png").rename("gone.png")
    assert ok("update", "2", "--text", "mug", "--bank", bank) == "updated 2, now 4\n"
    with TinyAlign.load(tiny, banks=[]) as model, Bank.open(bank) as opened:
        expected, memory = model.memory("gone.png", "mug"), opened.get(4)
    assert (memory.text, memory.source, memory.metadata) == ("mug", "p1.png", {"owner": "Bo"})
    assert memory.thumbnail == expected.thumbnail
    np.testing.assert_allclose(memory.key, expected.key, atol=2e-3)
    np.testing.assert_allclose(memory.latents, expected.latents, atol=0.05)


def test_update_picture(ok: Callable[..., str], bank: str) -> None:
    assert ok("update", "2", "--image", "p4.png", "--bank", bank) == "updated 2, now 4\n"
    last = listed(ok, "--bank", bank)[-1]
    assert (last["text"], last["source"], last["metadata"]) == ("cup 1", "p4.png", {"owner": "Bo"})
    assert ok("search", "p4.png", "--bank", bank, "--top-k", "1").startswith("b 4 ")


# --- whole banks ---------------------------------------------------------------------------


def test_merge(ok: Callable[..., str], bank: str) -> None:
    out = ok("merge", "all.db", bank, "default")
    assert out.splitlines()[0] == "b.db: added 3, known already 0"
    assert ok("merge", "all.db", bank) == "b.db: added 0, known already 3\n"
    assert len(listed(ok, "--bank", "all.db")) == 6


def test_export_and_import(ok: Callable[..., str], bank: str) -> None:
    assert ok("export", "out", "--bank", bank) == "wrote 3\n"
    assert ok("import", "out", "--bank", "back.db") == "added 3\n"
    assert ok("import", "out", "--bank", "back.db") == "added 0\n"
    assert listed(ok, "--bank", "back.db") == listed(ok, "--bank", bank)
    ok("export", "again", "--bank", "back.db")
    assert Path("again/memories.jsonl").read_bytes() == Path("out/memories.jsonl").read_bytes()


def test_compact_and_reindex(ok: Callable[..., str], bank: str) -> None:
    assert "bytes before" in ok("compact", "--bank", bank)
    ok("compact", "--seal", "--bank", bank)
    assert ok("reindex", "--bank", bank) == "index exact\n"
    assert len(listed(ok, "--bank", bank)) == 3


# --- bad input: one line, exit code 2, nothing changed --------------------------------------

MINE = ("--bank", "b.db")
GOOD = json.dumps({"image": "p0.png", "text": "a"})
BAD_INPUT = [
    ((), "required: VERB"),
    (("teach",), "invalid choice: 'teach'"),
    (("add", "p3.png", "--text", "x"), "required: --bank"),
    (("add", "p3.png", *MINE), "p3.png needs a text"),
    (("add", "p3.png", "--text", " ", *MINE), "the text is empty"),
    (("add", "p3.png", "--text", "x" * 9, *MINE), "9 tokens long, a memory holds 8: too much is"),
    (("add", "p3.png", "--text", "x", "--text-from-name", *MINE), "not both"),
    (("add", "p3.png", "--text", "x", "--bank", "default"), "the model's own bank"),
    (("add", "p3.png", "--text", "x", "--bank", "p0.png"), "p0.png is not a memory bank"),
    (("add", "p3.png", "--text", "x", "--bank", "foreign.db"), "made for another model"),
    (("add", "p3.png", "--text", "x", "--bank", "newer.db"), "format 3, newer than 2"),
    (("add", "p3.png", "--text", "x", "--bank", "no/b.db"), "no such directory"),
    (("add", "p3.png", "--text", "x", "--set", "room", *MINE), "--set takes KEY=VALUE"),
    (("add", "p3.png", "--text", "x", "--threads", "0", *MINE), "--threads must be 1"),
    (("add", "p3.png", "--text", "x", "--model", "no", *MINE), "no model directory at no"),
    (("add", "none.png", "--text", "x", "--bank", "new.db"), "no picture at none.png"),
    (("add", "cut.png", "--text", "x", "--bank", "new.db"), "cut.png is damaged or cut short"),
    (("add", "empty", "--text", "x", *MINE), "empty holds no pictures"),
    (("add", "none.jsonl", *MINE), "cannot read none.jsonl"),
    (("add", "items.jsonl", "--text", "x", *MINE), "the texts are in items.jsonl"),
    (("add", "nothing.jsonl", *MINE), "nothing.jsonl lists nothing"),
    (("add", "broken.jsonl", *MINE), "broken.jsonl, line 3: this is not JSON"),
    (("add", "list.jsonl", *MINE), "list.jsonl, line 2: this is not a JSON object"),
    (("add", "notext.jsonl", *MINE), "notext.jsonl, line 2: text is missing"),
    (("add", "unknown.jsonl", *MINE), "line 2: unknown name 'txt'"),
    (("add", "long.jsonl", *MINE), "long.jsonl, line 2: the text is 30 tokens long"),
    (("add", "longs.jsonl", *MINE), "line 1: the text is 9 tokens long, a memory holds 8: too "),
    (("add", "longs.jsonl", *MINE), "(and 1 more like this)"),
    (("add", "odd.jsonl", *MINE), "odd.jsonl, line 2: the text is not valid Unicode"),
    (("add", "p3.png", "--text", "\udcff", *MINE), "the text is not valid Unicode"),
    (("update", "1", "--text", "\udcff", *MINE), "the text is not valid Unicode"),
    (("list", "--where", "owner=\udcff", *MINE), "the metadata is not valid"),
    (("add", "p3.png", "--text", "x", "--set", "a=\udcff", *MINE), "metadata is not valid"),
    (("add", "meta.jsonl", *MINE), "meta.jsonl, line 2: metadata 'a' is list"),
    (("add", "latin.jsonl", *MINE), "latin.jsonl is not UTF-8"),
    (("add", "torn.json", *MINE), "torn.json, line 2: this is not JSON"),
    (("add", "one.json", *MINE), "one.json: this is not a JSON list"),
    (("add", "turns.json", *MINE), "turns.json, entry 2: no caption and no conversation"),
    (("add", "bad.csv", *MINE), "bad.csv, line 3: more fields"),
    (("add", "columns.csv", *MINE), "columns.csv, line 2: image is missing"),
    (("list", "--bank", "none.db"), "none.db does not exist"),
    (("list", "--where", "owner", *MINE), "--where takes KEY=VALUE"),
    (("show", "9", *MINE), "has no memory 9"),
    (("show", "one", *MINE), "invalid int value"),
    (("show", "1", "--thumbnail", "no/t.webp", *MINE), "cannot write no/t.webp"),
    (("remove", *MINE), "give the ids to remove, or --where"),
    (("remove", "1", "9", *MINE), "has no memory 9"),
    (("remove", "1", "--where", "owner=Ann", *MINE), "and not both"),
    (("remove", "1", "--bank", "default"), "the model's own bank is never changed"),
    (("update", "1", *MINE), "nothing to update"),
    (("update", "9", "--text", "x", *MINE), "has no memory 9"),
    (("update", "1", "--text", "", *MINE), "the text is empty"),
    (("update", "1", "--text", "x" * 9, *MINE), "9 tokens long"),
    (("update", "1", "--image", "none.png", *MINE), "no picture at none.png"),
    (("update", "1", "--unset", "room", *MINE), "memory 1 has no metadata 'room'"),
    (("update", "1", "--text", "x", "--bank", "foreign.db"), "has no memory 1"),
    (("search", "none.png", *MINE), "no picture at none.png"),
    (("search", "p0.png", "--top-k", "0", *MINE), "--top-k must be 1 or more, not 0"),
    (("search", "p0.png", "--bank", "foreign.db"), "made for another model"),
    (("calibrate", *MINE), "b.db has 3 memories: a score floor is measured on 20 or more"),
    (("calibrate", "--floor", "2", *MINE), "score floor"),
    (("calibrate", "--floor", "nan", *MINE), "score floor"),
    (("calibrate", "--floor", "0", "--reset", *MINE), "not allowed with argument"),
    (("calibrate", "--bank", "default"), "the model's own bank is never changed"),
    (("merge", "b.db", "foreign.db"), "made for another model"),
    (("merge", "new.db", "b.db", "foreign.db"), "made for different models"),
    (("merge", "b.db", "b.db"), "merged into itself"),
    (("merge", "new.db", "none.db"), "none.db does not exist"),
    (("export", "empty", *MINE), "empty already exists"),
    (("import", "empty", "--bank", "new.db"), "empty is no exported bank"),
    (("import", "torn", "--bank", "new.db"), "memories.jsonl, line 1"),
]


@pytest.fixture
def bad(place: Path, bank: str, ok: Callable[..., str]) -> None:
    """Files that cannot be used."""
    (place / "empty").mkdir()
    (place / "cut.png").write_bytes((place / "p0.png").read_bytes()[:90])
    lines(place / "items.jsonl", GOOD)
    lines(place / "nothing.jsonl", "")
    lines(place / "broken.jsonl", GOOD, "", '{"image": ')
    lines(place / "list.jsonl", GOOD, "[]")
    lines(place / "notext.jsonl", GOOD, {"image": "p1.png"})
    lines(place / "unknown.jsonl", GOOD, {"image": "p1.png", "text": "a", "txt": "b"})
    lines(place / "long.jsonl", GOOD, {"image": "p1.png", "text": "x" * 30})
    lines(place / "longs.jsonl", *({"image": "p1.png", "text": "x" * n} for n in (9, 8, 10)))
    lines(place / "meta.jsonl", GOOD, {"image": "p1.png", "text": "x", "metadata": {"a": []}})
    lines(place / "odd.jsonl", GOOD, {"image": "p1.png", "text": "\ud800"})
    (place / "latin.jsonl").write_bytes(b'{"image": "\xe9"}')
    (place / "torn.json").write_text('[{"image": "p0.png",\n')
    lines(place / "one.json", GOOD)
    turns = [{"from": "gpt", "value": "x"}]
    lines(
        place / "turns.json",
        [{"image": "p0.png", "caption": "a"}, {"image": "p0.png", "conversations": turns}],
    )
    (place / "bad.csv").write_text("image,text\np0.png,a\np1.png,b,c\n")
    (place / "columns.csv").write_text("picture,text\np0.png,a\n")
    Bank.create("foreign.db", "0f" * 16, 16, tiny_model.LATENT).close()
    with Bank.create("newer.db", tiny_model.FINGERPRINT, 16, tiny_model.LATENT) as newer:
        newer.seal()
        newer._store._connection.execute("PRAGMA user_version = 3")
    ok("export", "torn", "--bank", bank)
    lines(place / "torn" / "memories.jsonl", "{}")


@pytest.mark.usefixtures("bad")
def test_bad_input(run: Callable[..., Any], place: Path) -> None:
    with Bank.open("b.db") as opened:
        wanted = [(m.id, m.text, m.source, m.metadata) for m in opened.list()]
    before = files(place)
    for arguments, message in BAD_INPUT:
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert err.startswith("tinyalign-bank") and err.count("\n") == 1, (arguments, err)
        assert message in err, (arguments, err)
        assert files(place) == before, arguments
    with Bank.open("b.db") as opened:
        assert [(m.id, m.text, m.source, m.metadata) for m in opened.list()] == wanted


# --- as a process --------------------------------------------------------------------------


def test_help_is_for_newcomers(ok: Callable[..., str]) -> None:
    code = subprocess.run([COMMAND, "--help"], capture_output=True, timeout=60)
    assert code.returncode == 0
    for word in (b"examples:", b"exit codes", b"memory bank", *(v.encode() for v in VERBS)):
        assert word in code.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(run: Callable[..., Any], verb: str) -> None:
    code, out, err = run(verb, "--help")
    assert (code, err) == (0, "")
    assert f"tinyalign-bank {verb}" in out and len(out.splitlines()) > 5


def test_taught_in_one_process_known_in_the_next(place: Path, tiny: Path) -> None:
    """With torch and the network blocked."""
    (place / "block").mkdir()
    (place / "block" / "sitecustomize.py").write_text(BLOCK)
    settings: dict[str, Any] = {
        "cwd": place,
        "env": environment(place, tiny),
        "capture_output": True,
        "timeout": 60,
    }
    add = [COMMAND, "add", "p4.png", "--text", "my cup", "--bank", "b.db"]
    done = subprocess.run(add, **settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"added 1\n", b"")
    ask = [COMMAND.with_name("tinyalign-infer"), "p4.png", "my cup", "--bank", "b.db", "--json"]
    done = subprocess.run(ask, **settings)
    assert [m["text"] for m in json.loads(done.stdout)["memories"]] == ["my cup"]


def test_a_reader_that_leaves(place: Path, tiny: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [COMMAND, "list"],
        env=environment(place, tiny),
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_closed_output(place: Path, tiny: Path) -> None:
    done = subprocess.run(
        f"exec {COMMAND} list >&-",
        shell=True,
        env=environment(place, tiny),
        stderr=subprocess.PIPE,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == b"tinyalign-bank: standard output is closed\n"
