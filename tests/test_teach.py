"""Many pictures at once: what comes out does not depend on how they are put together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_model

from tinyalign.bank import Bank, NewMemory
from tinyalign.runtime import TinyAlign, teach
from tinyalign.runtime.errors import InputError, PictureError
from tinyalign.runtime.items import Item

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "examples" / "pictures"
REAL = Path(os.environ.get("TINYALIGN_MODEL") or ROOT / "build" / "default-model")


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """Twelve pictures; the sixth cannot be read, the eighth is the first again."""
    for number in range(12):
        tiny_model.picture(0 if number == 7 else number).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_bytes(b"no picture")
    paths = [tmp_path / f"{number}.png" for number in range(12)]
    return [Item(path, "cup", {"n": n}, path.name) for n, path in enumerate(paths)]


def same(some: Sequence[NewMemory], others: Sequence[NewMemory]) -> bool:
    """Whether memories are equal to the last bit."""

    def contents(memory: NewMemory) -> tuple[object, ...]:
        vectors = memory.key.tobytes(), memory.latents.tobytes(), memory.latents.shape
        return (*vectors, memory.text, memory.source, memory.thumbnail, memory.content_hash)

    return [contents(m) for m in some] == [contents(m) for m in others]


def test_encode_many_is_encode(tiny: Path) -> None:
    pictures = [tiny_model.picture(n) for n in range(11)]  # more than a batch
    with TinyAlign.load(tiny, banks=[]) as model:
        assert model.encode_many([]) == []
        many = model.encode_many(pictures)
        for picture, seen in zip(pictures, many, strict=True):
            alone = model.encode(picture)
            for name in ("cells", "image_tokens", "token_ids"):
                assert getattr(seen, name).tobytes() == getattr(alone, name).tobytes()
                assert not getattr(seen, name).flags.writeable
            assert (seen.pixel_hash, seen.model) == (alone.pixel_hash, alone.model)
        assert model.ask(many[9], "b").token_ids == model.ask(pictures[9], "b").token_ids
        with pytest.raises(PictureError, match=r"no picture at none\.png"):
            model.encode_many([pictures[0], "none.png"])


def test_a_batch_holds_what_memory_makes(tiny: Path, items: list[Item]) -> None:
    with TinyAlign.load(tiny, banks=[]) as model:
        batch = teach.encode_items(model, items, lambda content: None)
        good = [item for n, item in enumerate(items) if n not in (5, 7)]
        alone = [model.memory(i.image, i.text, str(i.image), i.metadata) for i in good]
        assert same(batch.new, alone)
        assert [memory.metadata for memory in batch.new] == [item.metadata for item in good]
        assert [failure.item for failure in batch.failed] == [items[5]]
        assert len(batch.hashes) == 11 and batch.hashes[0] == batch.hashes[6]
        known = {batch.new[2].content_hash: 5}
        rest = teach.encode_items(model, items, known.get)
        assert same(rest.new, [*alone[:2], *alone[3:]])
        assert rest.hashes == batch.hashes


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (5, 2), (32, 3)])
def test_the_bank_is_the_same_whatever_the_batch(
    tiny: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch, batch: int, threads: int
) -> None:
    monkeypatch.setattr(teach, "BATCH", batch)
    done = []
    with (
        TinyAlign.load(tiny, threads, banks=[], lm=False) as model,
        teach.create_bank(model, items[0].image.with_name("b.sqlite")) as bank,
    ):
        taught = teach.teach(model, items, bank, done.append)
        assert taught.added == tuple(range(1, 11)) and taught.known == (1,)
        assert [failure.item.place for failure in taught.failed] == ["5.png"]
        assert done[-1] == 12 and done == sorted(set(done))
        stored = bank.list()
        again = teach.teach(model, items, bank)
        assert (again.added, set(again.known)) == ((), set(taught.added))
        expected = [model.memory(i.image, i.text) for i in items[:5]]
    for memory, new in zip(stored, expected, strict=False):
        np.testing.assert_allclose(memory.key, new.key, atol=1e-3)
        assert (memory.thumbnail, memory.content_hash) == (new.thumbnail, new.content_hash)


def test_nothing_is_added_if_a_text_is_wrong(tiny: Path, items: list[Item]) -> None:
    wrong = [
        Item(items[0].image, text, {}, f"line {n}") for n, text in enumerate(("a", " ", "x" * 9))
    ]
    path = items[0].image.with_name("b.sqlite")
    with TinyAlign.load(tiny, banks=[]) as model, teach.create_bank(model, path) as bank:
        with pytest.raises(
            InputError, match=r"^line 1: the text is empty.*\(and 1 more like this\)$"
        ):
            teach.teach(model, wrong, bank)
        assert len(bank) == 0


def test_a_new_bank_has_the_models_floor(tiny: Path, tmp_path: Path) -> None:
    with TinyAlign.load(tiny, banks=[]) as model:
        teach.create_bank(model, tmp_path / "b.sqlite").close()
        assert teach.model_floor(model) == tiny_model.PROMPT.similarity[-1][1]
    with Bank.open(tmp_path / "b.sqlite") as bank:
        assert bank.score_floor == teach.model_floor(model)


@pytest.mark.real
def test_the_real_model_too_gives_the_same_bits_in_batches_and_on_any_threads() -> None:
    paths = sorted(p for p in PICTURES.iterdir() if p.suffix in (".jpg", ".png", ".webp"))
    items = [Item(path, "This is a thing.", {}, path.name) for path in (paths * 2)[:11]]
    found = []
    for threads in (1, 2):
        with TinyAlign.load(REAL, threads, banks=[], lm=False) as model:
            found.append(teach.encode_items(model, items, lambda content: None).new)
            found.append([model.memory(i.image, i.text, str(i.image)) for i in items[: len(paths)]])
    assert len(found[0]) == len(paths)
    assert all(same(found[0], others) for others in found)
