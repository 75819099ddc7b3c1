"""The memory bank through its public interface."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyalign.bank import (
    Bank,
    BankError,
    InputError,
    NewMemory,
    TinyAlignError,
    content_hash,
    index,
    search_banks,
)

DK, D = 32, 8
FINGERPRINT = "ab" * 32


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def clustered(count: int, seed: int = 0) -> np.ndarray:
    """[count, DK] keys of length 1 in clusters of about 10."""
    random = np.random.default_rng(seed)
    centres = unit(random.standard_normal((max(count // 10, 1), DK)))
    noise = 0.5 * unit(random.standard_normal((count, DK)))
    return unit(centres[random.integers(len(centres), size=count)] + noise)


def memory(key: np.ndarray, text: str, **more: Any) -> NewMemory:
    latents = np.random.default_rng(len(text)).standard_normal((3, D)).astype(np.float32)
    return replace(NewMemory(key, latents, text), **more)


def fill(path: Path, count: int, seed: int = 0) -> np.ndarray:
    keys = clustered(count, seed)
    with Bank.create(path, FINGERPRINT, DK, D) as bank:
        bank.add(memory(k, f"thing {n}", metadata={"n": n % 5}) for n, k in enumerate(keys))
    return keys


def reference(keys: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    scores = keys.astype(np.float16).astype(np.float32) @ query
    return [int(row) + 1 for row in np.lexsort((np.arange(len(keys)), -scores))[:k]]


def found(bank: Bank, query: np.ndarray, k: int = 5, **more: object) -> list[int]:
    return [hit.id for hit in bank.search(query, k, **more)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "things.sqlite"


@pytest.fixture
def bank(path: Path) -> Iterator[Bank]:
    with Bank.create(path, FINGERPRINT, DK, D) as bank:
        yield bank


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hnswlib")
    monkeypatch.setattr(index, "EXACT_LIMIT", 100)


# --- storing -------------------------------------------------------------------------------


def test_round_trip(path: Path) -> None:
    key = clustered(1)[0]
    latents = np.random.default_rng(1).standard_normal((4, D)).astype(np.float32)
    latents[2] = 0
    digest = content_hash(b"picture", "my cup")
    metadata = {"owner": "Zoë", "shelf": 5, "weight": 0.5, "blue": True}
    with Bank.create(path, FINGERPRINT, DK, D, name="cups") as bank:
        new = NewMemory(key, latents, "my cup\n☕", "cup.jpg", metadata, b"\x89PNG", digest)
        assert bank.add([new]) == [1]
    with Bank.open(path, FINGERPRINT) as bank:
        assert (bank.name, bank.fingerprint, bank.key_width, bank.latent_width, len(bank)) == (
            "cups", FINGERPRINT, DK, D, 1,
        )  # fmt: skip
        m = bank.get(1)
        assert (m.text, m.source, m.metadata) == ("my cup\n☕", "cup.jpg", metadata)
        assert (m.thumbnail, m.content_hash) == (b"\x89PNG", digest)
        assert m.metadata["blue"] is True
        np.testing.assert_array_equal(m.key, key.astype(np.float16).astype(np.float32))
        (hit,) = bank.search(key, 3)
        assert (hit.id, hit.text, hit.source, hit.bank) == (1, m.text, m.source, "cups")
        assert hit.score == pytest.approx(1, abs=1e-3)
        np.testing.assert_array_equal(hit.latents, m.latents)


def test_latents_are_at_most_half_a_step_off(bank: Bank) -> None:
    random = np.random.default_rng(2)
    latents = random.standard_normal((64, D)) * 10.0 ** random.integers(-6, 6, (64, 1))
    latents = latents.astype(np.float32)
    bank.add([memory(clustered(1)[0], "x", latents=latents)])
    back = bank.get(1).latents
    assert back.dtype == np.float32
    largest = np.abs(latents).max(axis=1, keepdims=True)
    assert (np.abs(back - latents) <= 0.502 * largest / 127 + 6e-8).all()


def test_number_of_latents_may_differ(bank: Bank) -> None:
    keys = clustered(3)
    bank.add(memory(k, str(n), latents=np.ones((n + 1, D))) for n, k in enumerate(keys))
    assert [len(m.latents) for m in bank.list()] == [1, 2, 3]


def test_duplicates_keep_their_id(bank: Bank) -> None:
    a, b = clustered(2)
    digest = content_hash(b"one", "a")
    assert bank.add([memory(a, "a", content_hash=digest), memory(b, "b")]) == [1, 2]
    again = [memory(b, "b"), memory(b, "other text", content_hash=digest), memory(a, "c")]
    assert bank.add(again) == [2, 1, 3]
    assert bank.add([memory(a, "d"), memory(a, "d")]) == [4, 4]
    assert (len(bank), bank.get(1).text) == (4, "a")


def test_ids_are_never_used_again(bank: Bank) -> None:
    keys = clustered(3)
    bank.add(memory(k, str(n)) for n, k in enumerate(keys[:2]))
    bank.remove([2])
    assert bank.add([memory(keys[2], "2")]) == [3]


def test_an_error_adds_nothing(bank: Bank) -> None:
    good, bad = memory(clustered(1)[0], "good"), memory(np.full(DK, np.nan), "bad")
    with pytest.raises(InputError, match=r"^memory 2 of those to add: the key holds NaN"):
        bank.add([good, bad])
    assert len(bank) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": np.full(DK, np.nan)}, "NaN"),
        ({"key": np.ones(DK + 1) / 6}, r"shape \(33,\)"),
        ({"key": np.zeros(DK)}, "length 0"),
        ({"key": np.ones(DK)}, "length 5.657"),
        ({"key": "text"}, "not an array"),
        ({"latents": np.ones((2, D + 1))}, "latents have shape"),
        ({"latents": np.ones((0, D))}, "latents have shape"),
        ({"latents": np.ones(D)}, "latents have shape"),
        ({"latents": np.full((1, D), np.inf)}, "latents holds NaN or inf"),
        ({"latents": np.full((1, D), 1e9)}, "too large"),
        ({"text": ""}, "text is empty"),
        ({"text": " \n"}, "text is empty"),
        ({"text": 5}, "not text"),
        ({"text": "\ud800"}, "Unicode"),
        ({"source": None}, "source is NoneType"),
        ({"metadata": {"a": [1]}}, "'a' is list"),
        ({"metadata": {"a": None}}, "'a' is NoneType"),
        ({"metadata": {"a": float("nan")}}, "not a finite"),
        ({"metadata": {"a": 2**63}}, "64 bits"),
        ({"metadata": {"": 1}}, "names"),
        ({"metadata": {3: 1}}, "names"),
        ({"metadata": ["a"]}, "not a mapping"),
        ({"thumbnail": "png"}, "not bytes"),
        ({"thumbnail": bytes(17 << 20)}, "over 16 MiB"),
        ({"content_hash": "12"}, "SHA-256"),
        ({"content_hash": "zz" * 32}, "SHA-256"),
    ],
)
def test_what_cannot_be_stored(bank: Bank, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        bank.add([replace(memory(clustered(1)[0], "x"), **change)])
    assert "\n" not in str(error.value)
    assert len(bank) == 0


# --- searching -----------------------------------------------------------------------------


def test_search_is_exact_and_sorted(path: Path) -> None:
    keys = fill(path, 300)
    with Bank.open(path) as bank:
        for query in clustered(20, seed=7):
            hits = bank.search(query, 7)
            assert [hit.id for hit in hits] == reference(keys, query, 7)
            assert [hit.score for hit in hits] == sorted((h.score for h in hits), reverse=True)


def test_ties_go_by_id(bank: Bank) -> None:
    key = clustered(1)[0]
    bank.add(memory(key, f"t{n}") for n in range(20))
    assert found(bank, key, 4) == [1, 2, 3, 4]


def test_fewer_memories_than_asked_for(bank: Bank) -> None:
    keys = clustered(3)
    assert bank.search(keys[0], 5) == []
    bank.add(memory(k, str(n)) for n, k in enumerate(keys))
    assert sorted(found(bank, keys[0], 10**9)) == [1, 2, 3]
    assert sorted(found(bank, keys[0], 3)) == [1, 2, 3]
    bank.remove([1, 2, 3])
    assert bank.search(keys[0], 5) == []
    assert (len(bank), bank.list()) == (0, [])


def test_exclude(bank: Bank) -> None:
    keys = clustered(10)
    bank.add(memory(k, str(n)) for n, k in enumerate(keys))
    best = found(bank, keys[0], 10)
    assert found(bank, keys[0], 10, exclude=frozenset(best[:3])) == best[3:]
    assert found(bank, keys[0], exclude=frozenset(range(100))) == []


def test_where(bank: Bank) -> None:
    metadata = [
        {"kind": "cup", "n": 1, "new": True},
        {"kind": "cup", "n": 2.5, "new": False},
        {"kind": "5", "n": 5},
        {"kind": 5, "new": "true", "a.b": "x' OR 1=1 --"},
        {},
    ]
    keys = clustered(5)
    bank.add(memory(k, f"{m}", metadata=m) for k, m in zip(keys, metadata, strict=True))
    expected = [
        ({"kind": "cup"}, [1, 2]),
        ({"kind": "cup", "n": 1}, [1]),
        ({"n": 2.5}, [2]),
        ({"n": "2.5"}, [2]),
        ({"new": True}, [1]),
        ({"new": "true"}, [1, 4]),
        ({"new": False}, [2]),
        ({"kind": 5}, [4]),
        ({"kind": "5"}, [3, 4]),
        ({"a.b": "x' OR 1=1 --"}, [4]),
        ({"none": "x"}, []),
        ({}, [1, 2, 3, 4, 5]),
    ]
    for where, ids in expected:
        assert [m.id for m in bank.list(where)] == ids, where
        assert sorted(found(bank, keys[0], 9, where=where)) == ids, where
    with pytest.raises(InputError, match="list"):
        bank.search(keys[0], where={"a": [1]})


@pytest.mark.parametrize("k", [0, -1, 2.5, None])
def test_bad_k(bank: Bank, k: object) -> None:
    with pytest.raises(InputError, match="1 or more"):
        bank.search(clustered(1)[0], k)


@pytest.mark.parametrize("key", [np.full(DK, np.nan), np.ones(3), np.ones((1, DK)), np.ones(DK)])
def test_bad_query(bank: Bank, key: np.ndarray) -> None:
    with pytest.raises(InputError):
        bank.search(key)


def test_ids_that_do_not_exist(path: Path) -> None:
    fill(path, 3)
    with Bank.open(path) as bank:
        with pytest.raises(InputError, match="no memory 9"):
            bank.get(9)
        with pytest.raises(InputError, match="no memory 9"):
            bank.remove([1, 9])
        with pytest.raises(InputError):
            bank.get(2**70)
        assert len(bank) == 3


def test_two_banks_are_merged(tmp_path: Path) -> None:
    keys = clustered(40)
    banks = [
        Bank.create(tmp_path / f"{name}.sqlite", FINGERPRINT, DK, D) for name in ("one", "two")
    ]
    for half, bank in enumerate(banks):
        bank.add(memory(k, f"{half}-{n}") for n, k in enumerate(keys[half::2]))
    hits = search_banks(banks, keys[5], 4)
    rows = [2 * (hit.id - 1) + ("one", "two").index(hit.bank) + 1 for hit in hits]
    assert rows == reference(keys, keys[5], 4)
    assert len(search_banks(banks, keys[5], 1000)) == 40
    assert search_banks([], keys[5], 3) == []
    with (
        Bank.create(tmp_path / "other.sqlite", "ff", DK, D) as other,
        pytest.raises(BankError, match="different models"),
    ):
        search_banks([banks[0], other], keys[5])
    for bank in banks:
        bank.close()


# --- the graph and its cache ---------------------------------------------------------------


def recall(bank: Bank, keys: np.ndarray, k: int = 5) -> float:
    queries = clustered(len(keys), seed=0)[::10]
    shared = [len(set(found(bank, q, k)) & set(reference(keys, q, k))) for q in queries]
    return sum(shared) / (k * len(queries))


@pytest.mark.usefixtures("small_limit")
def test_graph_finds_what_exact_search_finds(path: Path) -> None:
    keys = fill(path, 2000)
    with Bank.open(path) as bank:
        assert recall(bank, keys) >= 0.99
        assert all(file.exists() for file in index.cache_files(path))
        ids = reference(keys, keys[0], 5)
        assert (
            found(bank, keys[0], 5, exclude=frozenset(ids[:2])) == reference(keys, keys[0], 7)[2:]
        )
        third = [n for n in reference(keys, keys[0], 2000) if (n - 1) % 5 == 3]
        assert found(bank, keys[0], 5, where={"n": 3}) == third[:5]
        assert sorted(found(bank, keys[0], 5000)) == list(range(1, 2001))


@pytest.mark.usefixtures("small_limit")
def test_graph_follows_what_is_added_and_removed(path: Path) -> None:
    keys = clustered(400)
    fill(path, 300)
    keys[:300] = clustered(300)
    with Bank.open(path) as reader, Bank.open(path) as writer:
        assert recall(reader, keys[:300]) >= 0.99
        built = index.cache_files(path)[0].stat().st_mtime_ns
        writer.add(memory(k, f"late {n}") for n, k in enumerate(keys[300:350]))
        assert found(reader, keys[320], 1) == found(writer, keys[320], 1) == [321]
        best = found(reader, keys[320], 3)
        writer.remove([best[0], *range(1, 40)])
        after = found(reader, keys[320], 400)
        assert len(after) == len(set(after)) == len(reader)
        assert not set(after) & {best[0], *range(1, 40)}
        assert index.cache_files(path)[0].stat().st_mtime_ns == built  # no need to build again
        with Bank.open(path) as fresh:
            assert set(found(fresh, keys[320], 400)) == set(after)
        writer.remove(range(40, 300))
        assert sorted(found(reader, keys[320], 400)) == [n for n in range(300, 351) if n != best[0]]


def damage_cache(path: Path, how: str, other: Path) -> None:
    graph, keys, sidecar = index.cache_files(path)
    bound = json.loads(sidecar.read_text())
    data = graph.read_bytes()
    if how == "truncated":
        graph.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        graph.write_bytes(b"")
    elif how == "bit flipped":
        graph.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif how == "no graph":
        graph.unlink()
    elif how == "no keys":
        keys.unlink()
    elif how == "keys cut":
        keys.write_bytes(keys.read_bytes()[:-1])
    elif how == "keys bit flipped":
        keys.write_bytes(keys.read_bytes()[:-1] + bytes([keys.read_bytes()[-1] ^ 1]))
    elif how == "no sidecar":
        sidecar.unlink()
    elif how == "sidecar not JSON":
        sidecar.write_bytes(b"\xff{")
    elif how == "sidecar a list":
        sidecar.write_text("[1]")
    elif how == "sidecar huge":
        sidecar.write_text("[" * 10_000_000)
    elif how == "foreign":
        for mine, theirs in zip(index.cache_files(path), index.cache_files(other), strict=True):
            shutil.copy(theirs, mine)
    else:
        wrong = {"dim": DK + 1, "count": 7, "generation": 99, "token": "00", "writer": "x"}
        sidecar.write_text(json.dumps(bound | {how: wrong[how]}))


CACHE_DAMAGES = [
    *("truncated", "empty", "bit flipped", "no graph", "no sidecar", "foreign"),
    *("no keys", "keys cut", "keys bit flipped"),
    *("sidecar not JSON", "sidecar a list", "sidecar huge"),
    *("dim", "count", "generation", "token", "writer"),
]


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("how", CACHE_DAMAGES)
def test_bad_cache_is_built_again(path: Path, tmp_path: Path, how: str) -> None:
    other = tmp_path / "other.sqlite"
    keys = fill(path, 200)
    for file, query in ((path, keys[0]), (other, fill(other, 200, seed=9)[0])):
        with Bank.open(file) as bank:
            bank.search(query)
    damage_cache(path, how, other)
    damaged = [file.read_bytes() if file.exists() else b"" for file in index.cache_files(path)]
    with Bank.open(path) as bank:
        assert recall(bank, keys) >= 0.99
    assert damaged != [file.read_bytes() for file in index.cache_files(path)]
    assert len(list(tmp_path.glob("*.tmp"))) == 0


@pytest.mark.usefixtures("small_limit")
def test_cache_of_a_copy_that_went_its_own_way_is_not_used(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sqlite"
    keys = fill(path, 200)
    shutil.copy(path, copy)
    for file, more in ((path, clustered(50, seed=5)), (copy, clustered(50, seed=6))):
        with Bank.open(file) as bank:
            bank.add(memory(k, f"more {n}") for n, k in enumerate(more))
            bank.search(keys[0])
    for mine, theirs in zip(index.cache_files(path), index.cache_files(copy), strict=True):
        shutil.copy(theirs, mine)
    with Bank.open(path) as bank:
        assert recall(bank, np.concatenate([keys, clustered(50, seed=5)])) >= 0.99
        assert found(bank, clustered(50, seed=5)[9], 1) == [210]


def test_without_hnswlib_search_is_exact(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "hnswlib", None)
    monkeypatch.setattr(index, "EXACT_LIMIT", 100)
    keys = fill(path, 300)
    with Bank.open(path) as bank:
        assert recall(bank, keys) == 1
        bank.reindex()
        assert recall(bank, keys) == 1
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("small_limit")
def test_reindex(path: Path) -> None:
    keys = fill(path, 200)
    with Bank.open(path) as bank:
        bank.reindex()
        assert all(file.exists() for file in index.cache_files(path))
        bank.remove(range(1, 150))
        bank.reindex()
        assert not any(file.exists() for file in index.cache_files(path))
        assert found(bank, keys[160], 1) == [161]


# --- files ---------------------------------------------------------------------------------


def test_sealed_bank_is_one_file(path: Path) -> None:
    keys = fill(path, 50)
    with Bank.open(path) as bank:
        bank.remove(range(1, 20))
        bank.seal()
        assert list(path.parent.iterdir()) == [path]
        bank.add([memory(keys[0], "later")])
        assert list(path.parent.iterdir()) == [path]
    before = path.read_bytes()
    with Bank.open(path, FINGERPRINT, read_only=True) as bank:
        assert found(bank, keys[0], 1) == [51]
        assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == before


def test_read_only_bank_is_not_written(path: Path) -> None:
    fill(path, 3)
    with Bank.open(path, read_only=True) as bank:
        for write in (lambda: bank.add([memory(clustered(1)[0], "x")]), lambda: bank.remove([1])):
            with pytest.raises(BankError, match="reading only"):
                write()
        assert len(bank) == 3


READ = """
import os, sys
import numpy as np
from tinyalign.bank import Bank, BankError
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
path, width = sys.argv[1], int(sys.argv[2])
query = np.eye(width, dtype=np.float32)[0]
with Bank.open(path, read_only=True) as bank:
    print(len(bank), len(bank.search(query, 3)))
try:
    Bank.open(path).add([])
except BankError as error:
    print(error)
"""


@pytest.mark.parametrize("sealed", [True, False])
def test_read_only_directory(sealed: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder / "b.sqlite", 20)
        if sealed:
            with Bank.open(folder / "b.sqlite") as bank:
                bank.seal()
        (folder / "b.sqlite").chmod(0o444)
        folder.chmod(0o555)
        try:
            command = [sys.executable, "-c", READ, str(folder / "b.sqlite"), str(DK)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.stderr == ""
            assert done.stdout.splitlines()[0] == "20 3"
            assert [file.name for file in folder.iterdir()] == ["b.sqlite"]
        finally:
            folder.chmod(0o755)


def test_bank_left_open_in_a_read_only_directory() -> None:
    with tempfile.TemporaryDirectory() as name:
        fill(Path(name) / "a.sqlite", 20)
        with Bank.open(Path(name) / "a.sqlite") as bank:
            bank.add([memory(clustered(1, seed=4)[0], "in the -wal only")])
            shutil.copy(Path(name) / "a.sqlite", Path(name) / "b.sqlite")
            shutil.copy(Path(name) / "a.sqlite-wal", Path(name) / "b.sqlite-wal")
        Path(name).chmod(0o555)
        try:
            command = [sys.executable, "-c", READ, str(Path(name) / "b.sqlite"), str(DK)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert "b.sqlite was not closed cleanly" in done.stderr.splitlines()[-1]
        finally:
            Path(name).chmod(0o755)


def test_foreign_fingerprint(path: Path) -> None:
    fill(path, 1)
    with pytest.raises(BankError, match="made for another model"):
        Bank.open(path, "cd" * 32)
    Bank.open(path, FINGERPRINT).close()
    Bank.open(path, None).close()


def test_create_never_replaces(path: Path, tmp_path: Path) -> None:
    fill(path, 1)
    with pytest.raises(BankError, match="already exists"):
        Bank.create(path, FINGERPRINT, DK, D)
    with pytest.raises(BankError, match="already exists"):
        Bank.create(tmp_path, FINGERPRINT, DK, D)
    with pytest.raises(BankError, match="no such directory"):
        Bank.create(tmp_path / "no" / "b.sqlite", FINGERPRINT, DK, D)
    with pytest.raises(BankError, match="name too long"):
        Bank.create(tmp_path / ("n" * 300), FINGERPRINT, DK, D)
    for fingerprint, width in (("", DK), (FINGERPRINT, 0), (FINGERPRINT, 10**9)):
        with pytest.raises(InputError):
            Bank.create(tmp_path / "new.sqlite", fingerprint, width, D)
    assert not (tmp_path / "new.sqlite").exists()


def test_create_after_a_kill_left_an_empty_file(path: Path) -> None:
    path.touch()
    with pytest.raises(BankError, match="empty"):
        Bank.open(path)
    fill(path, 2)
    assert len(Bank.open(path)) == 2


def test_closed_bank(path: Path) -> None:
    fill(path, 1)
    bank = Bank.open(path)
    bank.close()
    bank.close()
    with pytest.raises(BankError, match="is closed"):
        len(bank)


def statements(path: Path, *sql: str) -> None:
    with sqlite3.connect(path) as connection:
        for statement in sql:
            connection.execute(statement)
    connection.close()


DAMAGES = {
    "truncated to half": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "cut"),
    "truncated by a byte": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "cut short"),
    "truncated in the header": (lambda p: p.write_bytes(p.read_bytes()[:50]), "not a memory bank"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "text": (lambda p: p.write_text("hello " * 100), "not an SQLite file"),
    "zeros": (lambda p: p.write_bytes(bytes(9000)), "not an SQLite file"),
    "garbage after the magic": (
        lambda p: p.write_bytes(b"SQLite format 3\0" + b"\xa5" * 9000),
        "cut short",
    ),
    "pages overwritten": (
        lambda p: p.write_bytes(p.read_bytes()[:4096] + b"\x5a" * (p.stat().st_size - 4096)),
        "damaged",
    ),
    "another application": (lambda p: statements(p, "PRAGMA application_id = 7"), "not a memory"),
    "newer format": (lambda p: statements(p, "PRAGMA user_version = 3"), "format 3, newer than 2"),
    "table missing": (lambda p: statements(p, "DROP TABLE thumbnails"), "thumbnails is missing"),
    "view for a table": (
        lambda p: statements(
            p, "DROP TABLE thumbnails", "CREATE VIEW thumbnails AS SELECT 1 AS id, x'00' AS image"
        ),
        "thumbnails is missing",
    ),
    "column missing": (lambda p: statements(p, "ALTER TABLE memories DROP COLUMN text"), "damaged"),
    "header missing": (lambda p: statements(p, "DELETE FROM meta"), "header"),
    "no generation": (lambda p: statements(p, "DELETE FROM generations"), "generation"),
    "width huge": (
        lambda p: statements(p, "UPDATE meta SET value = 1 << 40 WHERE name = 'key_width'"),
        "header",
    ),
    "width wrong": (
        lambda p: statements(p, "UPDATE meta SET value = 31 WHERE name = 'key_width'"),
        "memory 1|shape",
    ),
    "width text": (
        lambda p: statements(p, "UPDATE meta SET value = 'x' WHERE name = 'latent_width'"),
        "header",
    ),
    "key short": (lambda p: statements(p, "UPDATE memories SET key = x'00' WHERE id = 3"), "ry 3"),
    "key NaN": (
        lambda p: statements(p, f"UPDATE memories SET key = x'{'007e' * DK}' WHERE id = 3"),
        "memory 3",
    ),
    "key a number": (lambda p: statements(p, "UPDATE memories SET key = 5 WHERE id = 3"), "ry 3"),
    "latents short": (lambda p: statements(p, "UPDATE memories SET latents = x'00'"), "memory 1"),
    "scales empty": (lambda p: statements(p, "UPDATE memories SET scales = x''"), "memory 1"),
    "scales NaN": (lambda p: statements(p, "UPDATE memories SET scales = x'007e'"), "memory 1"),
    "text a blob": (lambda p: statements(p, "UPDATE memories SET text = x'ff'"), "memory 1"),
    "text not UTF-8": (
        lambda p: statements(p, "UPDATE memories SET text = CAST(x'ff' AS TEXT)"),
        "damaged",
    ),
    "metadata not JSON": (lambda p: statements(p, "UPDATE memories SET metadata = '{'"), "ry 1"),
    "metadata deep": (
        lambda p: statements(p, f"UPDATE memories SET metadata = '{'[' * 100_000}'"),
        "memory 1",
    ),
    "hash a number": (
        lambda p: statements(p, "UPDATE memories SET content_hash = 5 WHERE id = 1"),
        "memory 1",
    ),
    "thumbnail a number": (
        lambda p: statements(p, "INSERT INTO thumbnails VALUES (1, 1000000000000)"),
        "memory 1",
    ),
}
USE = """
import sys
import numpy as np
from tinyalign.bank import Bank, BankError
for path in sys.argv[1:]:
    try:
        with Bank.open(path, read_only=True) as bank:
            bank.search(np.eye(bank.key_width, dtype=np.float32)[0], 50)
            bank.list()
            bank.list({"n": 1})
        print("no error")
    except BankError as error:
        print(error)
"""


def test_damaged_files_give_one_clear_line(tmp_path: Path) -> None:
    """In another process, since the worst answer to a damaged file is a signal."""
    good = tmp_path / "good.sqlite"
    fill(good, 20)
    with Bank.open(good) as bank:
        bank.seal()
    files = [tmp_path / f"{name}.sqlite" for name in DAMAGES]
    for file, (damage, _) in zip(files, DAMAGES.values(), strict=True):
        shutil.copy(good, file)
        damage(file)
    command = [sys.executable, "-c", USE, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(DAMAGES), done.stdout
    for line, file, (_, message) in zip(lines, files, DAMAGES.values(), strict=True):
        assert file.name in line, (file.name, line)
        assert any(part in line for part in message.split("|")), (file.name, line)


def test_random_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    good = tmp_path / "good.sqlite"
    fill(good, 60)
    with Bank.open(good) as bank:
        bank.seal()
    random = np.random.default_rng(3)
    files = [tmp_path / f"{number}.sqlite" for number in range(150)]
    for number, file in enumerate(files):
        data = bytearray(good.read_bytes())
        size = 4096 if number % 2 else len(data)  # every other time in the first page
        for place in random.integers(size, size=random.integers(1, 30)):
            data[place] = random.integers(256)
        file.write_bytes(bytes(data))
    command = [sys.executable, "-c", USE, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == len(files)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="does not exist"):
        Bank.open(tmp_path / "none.sqlite")
    with pytest.raises(BankError, match="not a file"):
        Bank.open(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BankError, match="not a file"):
            Bank.open(tmp_path / "pipe")
    assert not (tmp_path / "none.sqlite").exists()


def test_odd_file_names(tmp_path: Path) -> None:
    path = tmp_path / "a b?mode=memory#ü%41.sqlite"
    fill(path, 2)
    assert path.exists()
    assert len(Bank.open(path, read_only=True)) == 2


def test_error_hierarchy() -> None:
    assert issubclass(BankError, InputError)
    assert issubclass(InputError, TinyAlignError) and issubclass(InputError, ValueError)


# --- at the same time ----------------------------------------------------------------------


ADD = """
import sys
import numpy as np
from tinyalign.bank import Bank, NewMemory
path, width, latent, who = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
random = np.random.default_rng(int(who))
with Bank.open(path) as bank:
    for number in range(40):
        keys = random.standard_normal((2, width))
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        texts = [f"{who} {number} {half}" for half in "ab"]
        bank.add(NewMemory(k, np.ones((1, latent)), t) for k, t in zip(keys, texts))
"""


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("sealed", [False, True])
def test_processes_add_while_threads_search(path: Path, sealed: bool) -> None:
    keys = fill(path, 90)
    bank = Bank.open(path)
    if sealed:
        bank.seal()
    command = [sys.executable, "-c", textwrap.dedent(ADD), str(path), str(DK), str(D)]
    writers = [subprocess.Popen([*command, who]) for who in "12"]
    problems: list[BaseException] = []

    def search() -> None:
        try:
            while any(writer.poll() is None for writer in writers):
                ids = found(bank, keys[0], 1000)
                assert len(ids) == len(set(ids)) and len(ids) % 2 == 0  # two at a time, or none
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert problems == []
    assert sorted(found(bank, keys[0], 1000)) == list(range(1, 251))
    bank.close()
    assert not path.with_name(path.name + "-wal").exists()


KILLED = """
import os, sys
import numpy as np
from tinyalign.bank import Bank, NewMemory
with Bank.open(sys.argv[1]) as bank:
    connection = bank._store._connection
    connection.execute("PRAGMA cache_size = 1")  # so that pages are written before the commit
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE memories SET text = hex(randomblob(2000))")
    os._exit(9)
"""


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_killed_writer_leaves_the_old_state(path: Path, sealed: bool, read_only: bool) -> None:
    keys = fill(path, 60)
    if sealed:
        with Bank.open(path) as bank:
            bank.seal()
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=60).returncode == 9
    assert path.with_name(path.name + ("-journal" if sealed else "-wal")).stat().st_size > 0
    with Bank.open(path, read_only=read_only) as bank:
        assert [m.text for m in bank.list()] == [f"thing {n}" for n in range(60)]
        assert found(bank, keys[7], 1) == [8]
