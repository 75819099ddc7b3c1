"""Many questions at once: the answers of asking one by one, resumable, no line lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_model import picture

from tinyalign.runtime import TinyAlign, cli

QUESTIONS = [("a.png", "what?"), ("b.png", "where is it?"), ("a.png", "who?"), ("b.png", "what?")]


@pytest.fixture
def place(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two pictures and a file of questions; the tiny model is the default one."""
    monkeypatch.setenv("TINYALIGN_MODEL", str(tiny))
    for seed, name in enumerate(("a.png", "b.png")):
        picture(seed).save(tmp_path / name)
    write(tmp_path / "in.jsonl", QUESTIONS)
    return tmp_path


def write(path: Path, questions: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"image": image, "question": question}) for image, question in questions]
    path.write_text("\n".join(lines) + "\n")


def run(place: Path, *more: str) -> int:
    output = ["--output", str(place / "out.jsonl")]
    return cli.main(["--jsonl", str(place / "in.jsonl"), *output, "--max-tokens", "6", *more])


def told(place: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]


def test_answers_are_those_of_asking_one_by_one(place: Path, tiny: Path) -> None:
    assert run(place) == 0
    with TinyAlign.load(tiny) as model:
        items = [(place / image, question) for image, question in QUESTIONS]
        many = model.ask_many(items, max_tokens=6)
        for line, (image, question), answer in zip(told(place), QUESTIONS, many, strict=True):
            alone = model.ask(place / image, question, max_tokens=6)
            assert (line["image"], line["question"]) == (image, question)
            assert line["answer"] == alone.text == answer.text
            assert [hit["id"] for hit in line["memories"]] == [hit.id for hit in alone.memories]


def test_a_run_goes_on_behind_the_last_whole_line(place: Path) -> None:
    assert run(place) == 0
    whole = (place / "out.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    marked = lines[0].replace('"answer": "', '"answer": "kept ')
    (place / "out.jsonl").write_text(marked + lines[1] + lines[2][:20])
    assert run(place) == 0
    again = told(place)
    assert len(again) == 4 and again[0]["answer"].startswith("kept ")
    assert [line["answer"] for line in again[1:]] == [json.loads(x)["answer"] for x in lines[1:]]
    assert run(place) == 0 and told(place) == again  # nothing left to do


def test_an_unreadable_picture_costs_one_line(place: Path, capfd: pytest.CaptureFixture) -> None:
    (place / "bad.png").write_bytes(b"no picture")
    write(place / "in.jsonl", [QUESTIONS[0], ("bad.png", "what?"), ("gone.png", "?"), QUESTIONS[1]])
    assert run(place) == 2
    lines = told(place)
    assert ["error" in line for line in lines] == [False, True, True, False]
    assert "bad.png" in lines[1]["error"]
    assert "2 of 4 not answered" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no questions"),
        ("{", "line 1: this is not JSON"),
        ("[1]", 'line 1: this is not {"image"'),
        ('{"image": "a.png"}', "line 1"),
        ('{"image": "a.png", "question": " "}', "must be texts"),
    ],
)
def test_bad_input_is_one_line(
    place: Path, capfd: pytest.CaptureFixture, text: str, reason: str
) -> None:
    (place / "in.jsonl").write_text(text)
    assert run(place) == 2
    error = capfd.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not (place / "out.jsonl").exists()


def test_answers_to_other_questions_are_not_overwritten(
    place: Path, capfd: pytest.CaptureFixture
) -> None:
    assert run(place) == 0
    before = (place / "out.jsonl").read_text()
    write(place / "in.jsonl", QUESTIONS[1:])
    assert run(place) == 2
    assert "line 1: this answers another question" in capfd.readouterr().err
    assert (place / "out.jsonl").read_text() == before
    assert cli.main(["a.png", "what?", "--jsonl", "in.jsonl"]) == 2
    assert cli.main(["a.png", "what?", "--output", "x"]) == 2
    assert cli.main(["a.png"]) == 2 == cli.main([])


def test_a_picture_is_encoded_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TinyAlign.load(tiny) as model:
        looked: list[int] = []
        look = model._look
        monkeypatch.setattr(model, "_look", lambda p: looked.append(len(p)) or look(p))
        first = model.encode(picture(0))
        assert model.encode(np.asarray(picture(0))) is first  # the same pixels
        model.ask(picture(0), "what?", max_tokens=2)
        model.ask_many([(picture(0), "what?"), (picture(1), "?"), (picture(1), "who?")])
        assert looked == [1, 1]
        for seed in range(2, 30):
            model.encode(picture(seed))
        model.encode(picture(0))
        assert sum(looked) == 31  # forgotten by then
