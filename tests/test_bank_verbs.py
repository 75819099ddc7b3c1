"""The bank's verbs beyond adding and searching: change, merge, compact, verify, export, count."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_bank import DK, FINGERPRINT, D, clustered, fill, found, memory, statements

from tinyalign.bank import Bank, BankError, InputError, Memory, content_hash, index


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "things.sqlite"


def facts(bank: Bank) -> list[tuple[Any, ...]]:
    """Everything about every memory but its id."""
    return [contents(m) for m in bank.list()]


def contents(m: Memory) -> tuple[Any, ...]:
    vectors = (m.key.tobytes(), m.latents.tobytes())
    return (*vectors, m.text, m.source, dict(m.metadata), m.thumbnail, m.content_hash)


def various(path: Path, count: int = 8, seed: int = 0) -> None:
    """A bank with everything a memory can hold."""
    with Bank.create(path, FINGERPRINT, DK, D) as bank:
        bank.add(
            memory(
                key,
                f"thing {n}\nsecond line é 猫",
                source=f"folder/{n}.jpg",
                metadata={"n": n, "share": n / 3, "odd": n % 2 == 1, "owner": "Zoë"},
                thumbnail=bytes([n, 0, 255]) if n % 3 else None,
                content_hash=content_hash(bytes([n]), "thing") if n % 2 else "",
            )
            for n, key in enumerate(clustered(count, seed))
        )


# --- update and replace ----------------------------------------------------------------------


def test_update_changes_what_is_given(path: Path) -> None:
    various(path)
    with Bank.open(path) as bank:
        before = bank.list()
        bank.update(3, metadata={"owner": "Ann"})
        bank.update(4, source="elsewhere", thumbnail=b"new")
        assert dict(bank.get(3).metadata) == {"owner": "Ann"}
        assert (bank.get(4).source, bank.get(4).thumbnail) == ("elsewhere", b"new")
        assert contents(bank.get(4))[:3] == contents(before[3])[:3]
        assert bank.get(3).source == before[2].source
        assert [m.id for m in bank.list({"owner": "Ann"})] == [3]
        with pytest.raises(InputError, match="has no memory 99"):
            bank.update(99, source="x")
        with pytest.raises(InputError, match="NoneType, not text"):
            bank.update(3, metadata={"a": None})
        assert dict(bank.get(3).metadata) == {"owner": "Ann"}


def test_replace_gives_a_new_id_for_a_new_key(path: Path) -> None:
    keys = fill(path, 5)
    other = clustered(1, seed=7)[0]
    with Bank.open(path) as bank:
        assert found(bank, keys[1], 1) == [2]
        assert bank.replace(2, memory(other, "another")) == 6
        assert found(bank, other, 1) == [6]
        assert 2 not in found(bank, keys[1], 9)
        assert bank.replace(6, memory(other, "better", thumbnail=b"t")) == 6
        assert (bank.get(6).text, bank.get(6).thumbnail, len(bank)) == ("better", b"t", 5)
        with pytest.raises(InputError, match="has no memory 2"):
            bank.replace(2, memory(other, "x"))
        bank.add([memory(keys[1], "twin", content_hash="12" * 32)])
        with pytest.raises(InputError, match=r"memory 7 of .* has that picture and text"):
            bank.replace(1, memory(keys[2], "twin", content_hash="12" * 32))
        with pytest.raises(InputError, match="empty"):
            bank.replace(1, memory(other, " "))
        assert bank.get(1).text == "thing 0"


def test_another_process_sees_the_change(path: Path) -> None:
    fill(path, 3)
    with Bank.open(path) as writer, Bank.open(path, read_only=True) as reader:
        assert reader.search(clustered(1)[0], 1)[0].text
        key = clustered(1, seed=5)[0]
        new = writer.replace(1, memory(key, "changed"))
        assert [(hit.id, hit.text) for hit in reader.search(key, 1)] == [(new, "changed")]


def test_find_by_content(path: Path) -> None:
    various(path)
    with Bank.open(path) as bank:
        assert bank.find(bank.get(4).content_hash) == 4
        assert bank.find("00" * 32) is None
        with pytest.raises(InputError, match="hash"):
            bank.find("xyz")


# --- merge -----------------------------------------------------------------------------------


def test_merge_adds_what_is_not_known(path: Path, tmp_path: Path) -> None:
    various(path)
    shutil.copy(path, tmp_path / "other.sqlite")
    with Bank.open(path) as bank, Bank.open(tmp_path / "other.sqlite") as other:
        bank.remove([2, 5])
        other.remove([1])
        removed = [contents(other.get(number)) for number in (2, 5)]
        assert bank.merge(other) == 2
        assert facts(bank)[-2:] == removed
        assert bank.merge(other) == 0
        assert len(bank) == 8


def test_merge_refuses(path: Path, tmp_path: Path) -> None:
    various(path)
    with Bank.open(path) as bank:
        with pytest.raises(InputError, match="into itself"), Bank.open(path) as same:
            bank.merge(same)
        with (
            Bank.create(tmp_path / "b.sqlite", "cd" * 32, DK, D) as foreign,
            pytest.raises(BankError, match="different models"),
        ):
            bank.merge(foreign)


def test_merge_is_whole_or_not_at_all(path: Path, tmp_path: Path) -> None:
    various(path, 4)
    various(tmp_path / "bad.sqlite", 8, seed=1)
    statements(tmp_path / "bad.sqlite", "UPDATE memories SET key = x'00' WHERE id = 7")
    with Bank.open(path) as bank, Bank.open(tmp_path / "bad.sqlite") as bad:
        before = facts(bank)
        with pytest.raises(BankError, match="memory 7 cannot be read"):
            bank.merge(bad)
        assert facts(bank) == before


# --- compact, verify, stats ------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True])
def test_compact_gives_space_back(path: Path, sealed: bool) -> None:
    fill(path, 2000)
    with Bank.open(path) as bank:
        if sealed:
            bank.seal()
        bank.remove(range(1, 1990))
        before, kept = bank.stats().file_bytes, facts(bank)
        bank.compact()
        assert bank.stats().file_bytes < before / 4
        assert facts(bank) == kept
        assert bank.add([memory(clustered(1, 9)[0], "new")]) == [2001]


def test_verify(path: Path) -> None:
    various(path)
    with Bank.open(path, read_only=True) as bank:
        report = bank.verify()
    assert report.sound and (report.memories, report.index) == (8, "exact")
    statements(
        path,
        "UPDATE memories SET scales = x'' WHERE id = 3",
        "UPDATE memories SET text = CAST(x'ff' AS TEXT) WHERE id = 5",
        "INSERT INTO thumbnails VALUES (77, x'00')",
    )
    with Bank.open(path, read_only=True) as bank:
        assert bank.verify().problems == (
            "memory 3 cannot be read",
            "memory 5 cannot be read",
            "thumbnail 77 belongs to no memory",
        )


@pytest.mark.parametrize(
    "column", ["key", "latents", "scales", "text", "source", "metadata", "image", "content_hash"]
)
def test_a_flipped_bit_is_noticed(path: Path, column: str) -> None:
    """Whatever is flipped would still be a valid value: only the checksum tells."""
    various(path, 4)
    table = "thumbnails" if column == "image" else "memories"
    (value,) = (
        sqlite3.connect(path).execute(f"SELECT {column} FROM {table} WHERE id = 3").fetchone()
    )
    data = bytearray(value.encode() if isinstance(value, str) else value)
    data[data.index(b"2") if column == "metadata" else 2] ^= 1
    flipped = data.decode() if isinstance(value, str) else bytes(data)
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE id = 3", (flipped,))
    connection.close()
    with Bank.open(path) as bank:
        assert bank.verify().problems == ("memory 3 cannot be read",)
        for use in (bank.list, lambda: bank.get(3), lambda: bank.search(clustered(1)[0], 9)):
            with pytest.raises(BankError, match="memory 3 cannot be read; remove it, or take the"):
                use()
        with pytest.raises(BankError, match="memory 3 cannot be read"):
            bank.update(3, source="elsewhere")  # would give the damage a new checksum
        bank.remove([3])
        assert bank.verify().sound and len(bank.list()) == 3


def test_what_is_changed_is_sound(path: Path) -> None:
    various(path, 4)
    with Bank.open(path) as bank:
        bank.update(1, source="elsewhere", metadata={"a": 1}, thumbnail=b"new")
        bank.update(2, thumbnail=b"")
        key = bank.get(3).key
        assert bank.replace(3, memory(key, "another text")) == 3
        assert bank.replace(4, memory(clustered(1, seed=7)[0], "another key")) == 5
        assert bank.verify().sound


def test_an_older_format_is_refused(path: Path) -> None:
    fill(path, 1)
    statements(path, "PRAGMA user_version = 1")
    with pytest.raises(BankError, match=r"has bank format 1, .* reads 2: export it with the") as e:
        Bank.open(path)
    assert "\n" not in str(e.value)


def test_verify_finds_a_torn_structure(path: Path) -> None:
    fill(path, 200)
    with Bank.open(path) as bank:
        bank.seal()
    data = bytearray(path.read_bytes())
    data[-3 * 4096 : -4096] = bytes(2 * 4096)
    path.write_bytes(data)
    with Bank.open(path, read_only=True) as bank:
        try:
            assert not bank.verify().sound
        except BankError as error:
            assert "damaged" in str(error)


def test_stats(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Bank.create(path, FINGERPRINT, DK, D) as bank:
        empty = bank.stats()
        assert (empty.memories, empty.bytes_per_memory, empty.nearest) == (0, 0, None)
        keys = clustered(60)
        bank.add(memory(k, f"{n}", thumbnail=b"t") for n, k in enumerate(keys))
        stats = bank.stats()
        assert (stats.name, stats.fingerprint) == ("things", FINGERPRINT)
        assert (stats.key_width, stats.latent_width) == (DK, D)
        assert (stats.memories, stats.thumbnails, stats.index) == (60, 60, "exact")
        assert stats.bytes_per_memory == stats.file_bytes / 60 > 60
        scores = keys @ keys.T
        np.fill_diagonal(scores, -1)
        assert stats.nearest is not None
        assert stats.nearest.p50 == pytest.approx(np.median(scores.max(axis=1)), abs=5e-3)
        assert stats.nearest.p10 <= stats.nearest.p50 <= stats.nearest.p90


def test_index_states(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hnswlib")
    monkeypatch.setattr(index, "EXACT_LIMIT", 100)
    keys = fill(path, 150)
    with Bank.open(path) as bank:
        assert bank.stats().index == "missing"
        bank.search(keys[0])
        assert bank.stats().index == "cached" and bank.stats().index_bytes > 0
        file = index.cache_files(path)[0]
        file.write_bytes(file.read_bytes()[:-1])
        assert bank.verify().index == "stale"
        bank.reindex()
        assert bank.verify() == bank.verify()
        assert bank.stats().index == "cached"


# --- the score floor -------------------------------------------------------------------------


def test_score_floor_stays_with_the_bank(path: Path, tmp_path: Path) -> None:
    fill(path, 30)
    with Bank.open(path) as bank:
        assert bank.score_floor is None and bank.stats().score_floor is None
        bank.set_score_floor(0.25)
        with Bank.open(path, read_only=True) as reader:
            assert reader.score_floor == reader.stats().score_floor == 0.25
            bank.set_score_floor(-1)
            assert reader.score_floor == -1
            with pytest.raises(BankError, match="reading only"):
                reader.set_score_floor(0.5)
        bank.set_score_floor(0.5)
        bank.compact()
        bank.seal()
        bank.export(tmp_path / "out")
    with Bank.open(path) as bank, Bank.create(tmp_path / "new.db", FINGERPRINT, DK, D) as new:
        assert bank.score_floor == 0.5
        new.merge(bank)
        assert new.score_floor == 0.5
        bank.set_score_floor(0.75)
        new.merge(bank)
        assert new.score_floor == 0.5  # it has memories of its own
    with Bank.create(tmp_path / "back.db", FINGERPRINT, DK, D) as back:
        back.import_folder(tmp_path / "out")
        assert back.score_floor == 0.5
        back.set_score_floor(None)
        back.import_folder(tmp_path / "out")
        assert back.score_floor is None
    with Bank.create(tmp_path / "own.db", FINGERPRINT, DK, D, score_floor=0.125) as own:
        own.import_folder(tmp_path / "out")
        assert own.score_floor == 0.125


@pytest.mark.parametrize("value", [1.5, -2, float("nan"), float("inf"), "0.5", True, 10**400])
def test_bad_score_floor(path: Path, value: Any) -> None:
    with pytest.raises(InputError, match="score floor is a number from -1 to 1"):
        Bank.create(path, FINGERPRINT, DK, D, score_floor=value)
    assert not path.exists()
    with Bank.create(path, FINGERPRINT, DK, D, score_floor=0.5) as bank:
        with pytest.raises(InputError, match="score floor is a number from -1 to 1"):
            bank.set_score_floor(value)
        assert bank.score_floor == 0.5


def test_damaged_score_floor(path: Path) -> None:
    fill(path, 1)
    statements(path, "INSERT INTO meta VALUES ('score_floor', 'high')")
    with Bank.open(path) as bank, pytest.raises(BankError, match=r"damaged: a score floor is"):
        assert bank.score_floor


def test_calibrate_measures_the_nearest_other_memory(path: Path) -> None:
    keys = fill(path, 19)
    with Bank.open(path) as bank:
        with pytest.raises(InputError, match="19 memories: a score floor is measured on 20"):
            bank.calibrate()
        assert bank.score_floor is None
    path.unlink()
    keys = fill(path, 900)
    scores = keys @ keys.T
    np.fill_diagonal(scores, -1)
    with Bank.open(path) as bank:
        floor = bank.calibrate()
        assert floor == bank.score_floor
        assert floor == pytest.approx(np.percentile(scores.max(axis=1), 10), abs=0.01)


# --- export and import -----------------------------------------------------------------------


def test_export_comes_back_bit_for_bit(path: Path, tmp_path: Path) -> None:
    various(path)
    with Bank.open(path) as bank:
        bank.remove([3])
        assert bank.export(tmp_path / "out") == 7
        wanted = facts(bank)
    lines = (tmp_path / "out" / "memories.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [1, 2, 4, 5, 6, 7, 8]
    assert len(list((tmp_path / "out" / "thumbnails").iterdir())) == 4
    header(format=1)(tmp_path / "out")  # an older version wrote the same folder
    with Bank.create(tmp_path / "back.sqlite", FINGERPRINT, DK, D) as back:
        assert back.import_folder(tmp_path / "out") == 7
        assert facts(back) == wanted
        assert back.import_folder(tmp_path / "out") == 0
        assert back.export(tmp_path / "again") == 7


def test_export_replaces_nothing_and_leaves_nothing_half_done(path: Path, tmp_path: Path) -> None:
    various(path)
    (tmp_path / "full").mkdir()
    statements(path, "UPDATE memories SET key = x'00' WHERE id = 7")
    with Bank.open(path) as bank:
        with pytest.raises(InputError, match="already exists"):
            bank.export(tmp_path / "full")
        with pytest.raises(InputError, match="no directory"):
            bank.export(tmp_path / "no" / "where")
        with pytest.raises(BankError, match="memory 7"):
            bank.export(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "things.sqlite"]


def broken(name: str, value: object) -> Any:
    def change(folder: Path) -> None:
        lines = (folder / "memories.jsonl").read_text().splitlines()
        line = json.loads(lines[5]) | {name: value}
        lines[5] = json.dumps(line)
        (folder / "memories.jsonl").write_text("\n".join(lines))

    return change


def header(**changes: object) -> Any:
    def change(folder: Path) -> None:
        data = json.loads((folder / "bank.json").read_text()) | changes
        (folder / "bank.json").write_text(json.dumps(data))

    return change


BROKEN = {
    "cut": (
        lambda f: (f / "memories.jsonl").write_bytes((f / "memories.jsonl").read_bytes()[:-40]),
        "line 8",
    ),
    "no file": (lambda f: (f / "memories.jsonl").unlink(), "No such file"),
    "not UTF-8": (lambda f: (f / "memories.jsonl").write_bytes(b"\xff" * 9), "not UTF-8"),
    "no header": (lambda f: (f / "bank.json").unlink(), "no exported bank"),
    "bad header": (lambda f: (f / "bank.json").write_text("[]"), "not the header"),
    "newer": (header(format=3), "format 3, newer than 2"),
    "foreign": (header(fingerprint="cd" * 32), "another model"),
    "no thumbnail": (lambda f: (f / "thumbnails" / "8.webp").unlink(), "line 8: thumbnails/8.webp"),
    "outside": (broken("thumbnail", "../bank.json"), "line 6: '../bank.json' is not a file"),
    "outside 2": (broken("thumbnail", "thumbnails/../bank.json"), "line 6"),
    "key": (broken("key", "AAAA"), "line 6: the vectors"),
    "no base64": (broken("key", "?"), "line 6: key is not base64"),
    "scales": (broken("scales", ""), "line 6: the vectors"),
    "text": (broken("text", " "), "line 6: the text is empty"),
    "text a number": (broken("text", 5), "line 6: the text is int"),
    "metadata": (broken("metadata", {"a": [1]}), "line 6: metadata 'a' is list"),
    "hash": (broken("content_hash", "12"), "line 6: the content hash"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_adds_nothing(name: str, path: Path, tmp_path: Path) -> None:
    various(path)
    with Bank.open(path) as bank:
        bank.export(tmp_path / "out")
    change, message = BROKEN[name]
    change(tmp_path / "out")
    with Bank.create(tmp_path / "back.sqlite", FINGERPRINT, DK, D) as back:
        with pytest.raises(InputError, match=message) as error:
            back.import_folder(tmp_path / "out")
        assert "\n" not in str(error.value)
        assert len(back) == 0


# --- against a dict --------------------------------------------------------------------------

KEYS = clustered(12, seed=11)
NUMBERS = st.integers(0, len(KEYS) - 1)
OWNERS = st.sampled_from(["Ann", "Bo", "Zoë"])


class BankAgainstDict(RuleBasedStateMachine):
    """Random verbs on a bank and on a dict of id -> (number of the key, text, metadata)."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.bank = Bank.create(self.folder / "b.sqlite", FINGERPRINT, DK, D)
        self.other = Bank.create(self.folder / "other.sqlite", FINGERPRINT, DK, D)
        self.other.add(memory(KEYS[n], "b", metadata={"owner": "Bo"}) for n in range(3))
        self.model: dict[int, tuple[int, str, dict[str, Any]]] = {}
        self.last = 0

    def teardown(self) -> None:
        self.bank.close()
        self.other.close()
        shutil.rmtree(self.folder)

    def known(self, number: int, text: str) -> int | None:
        return next((i for i, (n, t, _) in self.model.items() if (n, t) == (number, text)), None)

    @rule(number=NUMBERS, text=st.sampled_from("abc"), owner=OWNERS)
    def add(self, number: int, text: str, owner: str) -> None:
        expected = self.known(number, text)
        if expected is None:
            self.last = expected = self.last + 1
            self.model[expected] = (number, text, {"owner": owner})
        new = memory(KEYS[number], text, metadata={"owner": owner})
        assert self.bank.add([new]) == [expected]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.model)))
        self.bank.remove([number])
        del self.model[number]
        with pytest.raises(InputError):
            self.bank.get(number)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), owner=OWNERS)
    def update(self, data: st.DataObject, owner: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.model)))
        self.bank.update(number, metadata={"owner": owner})
        key, text, _ = self.model[number]
        self.model[number] = (key, text, {"owner": owner})

    @precondition(lambda self: self.model)
    @rule(data=st.data(), key=NUMBERS, text=st.sampled_from("abcd"))
    def replace(self, data: st.DataObject, key: int, text: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.model)))
        new = replace(memory(KEYS[key], text), metadata={})
        if self.known(key, text) not in (None, number):
            with pytest.raises(InputError):
                self.bank.replace(number, new)
            return
        expected = number
        if key != self.model[number][0]:
            self.last = expected = self.last + 1
        assert self.bank.replace(number, new) == expected
        del self.model[number]
        self.model[expected] = (key, text, {})

    @rule()
    def merge(self) -> None:
        new = [n for n in range(3) if self.known(n, "b") is None]
        for number in new:
            self.last += 1
            self.model[self.last] = (number, "b", {"owner": "Bo"})
        assert self.bank.merge(self.other) == len(new)

    @rule(
        query=NUMBERS,
        k=st.integers(1, 14),
        owner=st.none() | OWNERS,
        exclude=st.frozensets(st.integers(1, 9), max_size=3),
        reader=st.booleans(),
    )
    def search(
        self, query: int, k: int, owner: str | None, exclude: frozenset[int], reader: bool
    ) -> None:
        scores = {
            number: float(KEYS[key].astype(np.float16).astype(np.float32) @ KEYS[query])
            for number, (key, _, metadata) in self.model.items()
            if number not in exclude and (owner is None or metadata.get("owner") == owner)
        }
        where = {"owner": owner} if owner else None
        with ExitStack() as opened:
            bank = self.bank
            if reader:  # as another process sees it
                path = self.folder / "b.sqlite"
                bank = opened.enter_context(Bank.open(path, read_only=True))
            hits = bank.search(KEYS[query], k, where=where, exclude=exclude)
        assert len(hits) == len({hit.id for hit in hits}) == min(k, len(scores))
        best = sorted(scores.values(), reverse=True)[:k]
        np.testing.assert_allclose([hit.score for hit in hits], best, atol=1e-5)
        np.testing.assert_allclose([scores[hit.id] for hit in hits], best, atol=1e-5)

    @rule()
    def compact(self) -> None:
        self.bank.compact()

    @rule()
    def seal(self) -> None:
        self.bank.seal()

    @rule()
    def reopen(self) -> None:
        self.bank.close()
        self.bank = Bank.open(self.folder / "b.sqlite")

    @invariant()
    def the_same(self) -> None:
        stored = {m.id: (m.text, dict(m.metadata)) for m in self.bank.list()}
        assert stored == {i: (text, metadata) for i, (_, text, metadata) in self.model.items()}
        scores = {i: KEYS[n].astype(np.float16) @ KEYS[0] for i, (n, _, _) in self.model.items()}
        assert set(found(self.bank, KEYS[0], 99)) == set(scores)
        ranked = [round(float(scores[i]), 3) for i in found(self.bank, KEYS[0], 99)]
        assert ranked == sorted(ranked, reverse=True)


class GraphAgainstDict(BankAgainstDict):
    """The same with a graph and its cache from a few memories on."""

    def __init__(self) -> None:
        self.limit = index.EXACT_LIMIT
        index.EXACT_LIMIT = 4
        super().__init__()

    def teardown(self) -> None:
        super().teardown()
        index.EXACT_LIMIT = self.limit


QUICK = settings(max_examples=15, stateful_step_count=20, deadline=None)
TestBankAgainstDict = BankAgainstDict.TestCase
TestBankAgainstDict.settings = QUICK
TestGraphAgainstDict = GraphAgainstDict.TestCase
TestGraphAgainstDict.settings = QUICK
