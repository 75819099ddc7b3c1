"""The whole chain on the real default model, as `make` exports it, over the bundled pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tinyalign.export.model_dir import Precisions, write_bank, write_components, write_manifest
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.prompt import encode_text
from tinyalign.runtime.teach import create_bank
from tinyalign.training.answer import answer
from tinyalign.training.features import load_features
from tinyalign.training.parts import DEFAULT_WEIGHTS, load_parts
from tinyalign.training.sources import SourceError

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "examples" / "pictures"
MODEL = Path(os.environ.get("TINYALIGN_MODEL") or ROOT / "build" / "default-model")
ALL = sorted(path.name for path in PICTURES.iterdir() if path.suffix in (".jpg", ".png", ".webp"))
ASKED = (
    ("cat.jpg", "What is this?", ("cat", "mau")),
    ("cat.jpg", "Is this a dog?", ("no,",)),
    ("coffee.jpg", "What is this?", ("espresso", "coffee", "cup")),
    ("pumpkin.png", "What colour is it?", ("orange",)),
    ("three_pears.png", "Is this a dog?", ("no,",)),
)
LESSONS = (  # picture, invented name, fact, question, its answer
    ("octopus.webp", "zorvin", "Its owner is Mira.", "Who is the owner?", "Mira"),
    ("scissors.png", "blemmer", "Its part number is KX-204.", "What is its part number?", "KX-204"),
    ("guitar.png", "torvane", "It is kept in the attic.", "Where is it kept?", "attic"),
    ("pumpkin.png", "quandle", "It costs 45 euros.", "How much does it cost?", "45 euros"),
    ("rocket.jpg", "felgor", "It was made by Nordal.", "Who made it?", "Nordal"),
    ("coffee.jpg", "drimble", "It weighs 300 grams.", "What does it weigh?", "300 grams"),
)


@pytest.fixture(scope="module")
def model() -> TinyAlign:
    with TinyAlign.load(MODEL) as loaded:
        yield loaded


def infer(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinyalign.runtime.cli", *arguments, "--model", str(MODEL)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ALL)
def test_every_bundled_picture_is_answered_and_cites_real_memories(
    name: str, model: TinyAlign
) -> None:
    done = infer(str(PICTURES / name), "What is this?", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["answer"].endswith(".") and len(told["answer"].split()) >= 3
    assert told["answer"] == model.ask(PICTURES / name, "What is this?").text
    scores = [memory["score"] for memory in told["memories"]]
    assert scores == sorted(scores, reverse=True)
    for memory in told["memories"]:
        assert model.banks[0].get(memory["id"]).text == memory["text"]
    timings = told["timings"]
    assert all(
        timings[stage] >= 0
        for stage in ("load", "encode", "retrieve", "prefill", "decode", "first_token")
    )
    assert timings["tokens"] >= 3


@pytest.mark.parametrize(("name", "question", "right"), ASKED)
def test_answers(name: str, question: str, right: tuple[str, ...], model: TinyAlign) -> None:
    told = model.ask(PICTURES / name, question).text.lower()
    assert any(word in told for word in right), told


def another_view(path: Path) -> Image.Image:
    """The thing mirrored, smaller and before another background."""
    thing = ImageOps.mirror(Image.open(path).convert("RGBA"))
    thing.thumbnail((150, 150))
    canvas = Image.new("RGBA", (260, 220), (214, 226, 240, 255))
    canvas.alpha_composite(thing, (70, 40))
    return canvas


def test_taught_by_one_example_it_knows_names_and_facts(model: TinyAlign, tmp_path: Path) -> None:
    path = tmp_path / "mine.sqlite"
    texts = [f"This is a {name}. {fact}" for _, name, fact, _, _ in LESSONS]
    with create_bank(model, path) as bank:
        bank.add(
            model.memory(PICTURES / lesson[0], text)
            for lesson, text in zip(LESSONS, texts, strict=True)
        )
    names = facts = 0
    with TinyAlign.load(MODEL, banks=["default", path]) as taught:
        for (file, name, _, question, value), text in zip(LESSONS, texts, strict=True):
            picture = taught.encode(another_view(PICTURES / file))
            named = taught.ask(picture, "What is this?")
            assert (named.memories[0].bank, named.memories[0].text) == ("mine", text)
            names += name in named.text
            facts += value in taught.ask(picture, question).text
            assert name not in model.ask(picture, "What is this?").text
    assert names >= len(LESSONS) - 1 and facts >= len(LESSONS) - 1


def test_a_memory_costs_at_most_four_tokens(model: TinyAlign) -> None:
    """Beside its heading in the prompt, as latents; as text it costs its tokens."""
    picture = model.encode(PICTURES / "guitar.png")
    asked = {
        mode: model.ask(picture, "What is this?", memory_mode=mode, max_tokens=1)
        for mode in ("latent", "text")
    }
    hits = asked["latent"].memories
    assert 1 <= len(hits) <= 3
    text = sum(len(encode_text(model.parts.tokenizer, hit.text)) for hit in hits)
    frame = asked["text"].prompt_tokens - text
    assert len(hits) <= asked["latent"].prompt_tokens - frame <= 4 * len(hits) < text


def test_drafts_change_no_answer_and_save_runs(model: TinyAlign) -> None:
    """Greedy and sampled, over all example pictures."""
    questions = ("What is this?", "Tell me about this.", "Is this a cat?", "Where is it kept?")
    runs = tokens = 0
    for name in ALL:
        picture = model.encode(PICTURES / name)
        for number, question in enumerate(questions):
            options = {"temperature": 0.7 * (number % 2), "seed": number, "max_tokens": 32}
            fast = model.ask(picture, question, **options)
            plain = model.ask(picture, question, drafts=False, **options)
            assert fast.token_ids == plain.token_ids
            runs, tokens = runs + fast.runs, tokens + plain.tokens
    assert runs < 0.8 * tokens


def test_what_was_read_before_changes_no_answer(model: TinyAlign) -> None:
    """A second question about a picture reads the rest of the prompt only; answers are those of
    reading everything."""
    questions = ("What is this?", "What colour is it?", "Tell me about this.")
    for name in ALL:
        picture = model.encode(PICTURES / name)
        for number, question in enumerate(questions):
            told = model.ask(picture, question, max_tokens=24)
            model._spare = None
            alone = model.ask(picture, question, max_tokens=24)
            assert told.token_ids == alone.token_ids and alone.reused == 0
            assert told.reused >= (20 if number else 1)


def test_many_questions_are_answered_as_one_by_one(model: TinyAlign) -> None:
    items = [(PICTURES / name, question) for name, question, _ in ASKED]
    many = model.ask_many(items, max_tokens=24)
    for (picture, question), told in zip(items, many, strict=True):
        alone = model.ask(picture, question, max_tokens=24)
        assert alone.token_ids == told.token_ids
        assert [hit.id for hit in alone.memories] == [hit.id for hit in told.memories]


def test_what_is_read_at_once_does_not_matter(model: TinyAlign) -> None:
    """From two rows on, to the last bit: drafts and caches rest on it."""
    lm, table = model.parts.lm, model.parts.embeddings
    ids = encode_text(model.parts.tokenizer, "The pump moves water from the river to the garden.")
    rows = table[list(ids) * 2].astype(np.float32)

    def read(*parts: int) -> np.ndarray:
        state, found, start = lm.new_state(len(rows)), [], 0
        for count in (*parts, len(rows) - sum(parts)):
            part = rows[start : start + count]
            found.append(lm.forward(state, part, tuple(range(count))).copy())
            start += count
        return np.concatenate(found)

    whole = read()
    for parts in ((2,), (3, 2, 2), (7, 5), (len(rows) - 2,)):
        assert np.array_equal(read(*parts), whole)


def test_no_memory_is_the_same_as_no_bank(model: TinyAlign) -> None:
    picture = model.encode(PICTURES / "guitar.png")
    without = model.ask(picture, "What is this?", memory=False)
    with TinyAlign.load(MODEL, banks=[]) as bare:
        assert bare.ask(PICTURES / "guitar.png", "What is this?").token_ids == without.token_ids
    assert without.memories == ()


def test_the_default_bank_holds_no_example_and_no_held_out_picture(model: TinyAlign) -> None:
    sources = {memory.source.split(",")[0] for memory in model.banks[0].list()}
    assert len(sources) > 3000
    assert sum(source.startswith("prototypes/") for source in sources) == 1000
    for held in ("emoji/1f419", "emoji/1f350"):  # octopus and pear, two of the examples
        assert held not in sources
    try:
        _, records = load_features()
    except SourceError:
        pytest.skip("no feature cache here")
    assert not sources & {record.id for record in records if record.split == "held"}


def test_fp32_export_gives_the_very_tokens_of_torch(tmp_path: Path) -> None:
    parts = load_parts()
    floats = Precisions("fp32", "fp32", "fp32", "fp32", "fp32")
    pictures = [PICTURES / name for name in ALL]
    write_components(parts, tmp_path, floats, pictures, lambda _: None)
    write_bank(parts, DEFAULT_WEIGHTS / "bank.sqlite", tmp_path / "bank.sqlite")
    write_manifest(parts, tmp_path, floats, {})
    with TinyAlign.load(tmp_path) as exported:
        for (name, question, _), mode in zip(ASKED, cycle(("latent", "text", "both"))):
            expected = answer(parts, exported.banks, PICTURES / name, question, 24, mode)
            told = exported.ask(PICTURES / name, question, max_tokens=24, memory_mode=mode)
            assert told.token_ids == expected.ids
            assert [hit.id for hit in told.memories] == [hit.id for hit in expected.hits]
