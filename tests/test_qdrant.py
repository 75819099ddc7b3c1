"""Banks in Qdrant do what bank files do: in a folder (the client's local mode) and over HTTP.

``qdrant_stand_in`` answers in place of a server, with Qdrant's own engine behind it.
"""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bank import DK, FINGERPRINT, D, clustered, memory

pytest.importorskip("qdrant_client", reason="qdrant-client is not installed: the dev extra has it")
pytest.importorskip("qdrant_edge", reason="qdrant-edge-py is not installed: the dev extra has it")

from qdrant_client import QdrantClient, models
from qdrant_client.local.persistence import CollectionPersistence
from qdrant_stand_in import API_KEY, StandIn, stand_in

from tinyalign.bank import (
    BankError,
    InputError,
    content_hash,
    qdrant,
    qdrant_connection,
    qdrant_points,
    search_banks,
)
from tinyalign.bank.bank import MemoryBank
from tinyalign.bank.opening import create_bank, open_bank, open_if_there

Place = Callable[[str], str]
KINDS = ("file", "folder", "server")
pytestmark = pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")


@pytest.fixture(autouse=True)
def quick_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local mode commits every point by itself; here it need not wait for the disk. No proxies."""
    table = CollectionPersistence._ensure_table

    def ensure(self: Any) -> None:
        self.storage.execute("PRAGMA synchronous = OFF")
        table(self)

    monkeypatch.setattr(CollectionPersistence, "_ensure_table", ensure)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "QDRANT_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[StandIn, str]]:
    monkeypatch.setenv("QDRANT_API_KEY", API_KEY)
    with stand_in() as running:
        yield running


def folder(path: Path) -> Place:
    return lambda name: f"qdrant://{path}/q/{name}"


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """How banks are named in one kind of place."""
    if request.param == "file":
        return lambda name: str(tmp_path / f"{name}.sqlite")
    if request.param == "folder":
        return folder(tmp_path)
    _, address = request.getfixturevalue("server")
    return lambda name: f"qdrant://{address}/{name}"


@pytest.fixture(params=KINDS[1:])
def qdrant_place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return folder(tmp_path)
    _, address = request.getfixturevalue("server")
    return lambda name: f"qdrant://{address}/{name}"


def create(name: str, **more: Any) -> MemoryBank:
    return create_bank(name, FINGERPRINT, DK, D, **more)


def several(count: int, seed: int = 0) -> list[Any]:
    """Memories with everything that a memory can hold."""
    return [
        memory(
            key,
            f"thing {n}\nsecond line é 猫",
            source=f"folder/{n}.jpg",
            metadata={"n": n % 3, "share": n / 3, "odd": n % 2 == 1, "owner": "Zoë"},
            thumbnail=bytes([n, 0, 255]) if n % 3 else None,
            content_hash=content_hash(bytes([n, seed]), "thing") if n % 2 else "",
        )
        for n, key in enumerate(clustered(count, seed))
    ]


def stored(bank: MemoryBank) -> dict[bytes, Any]:
    """Every byte of every memory but its id, by content hash."""
    return {row.content_hash: (row, thumbnail) for _, row, thumbnail in bank.rows()}


def texts(bank: MemoryBank, query: np.ndarray, k: int = 5, **more: Any) -> list[str]:
    return [hit.text for hit in bank.search(query, k, **more)]


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


# --- the verbs -------------------------------------------------------------------------------


def test_round_trip(place: Place) -> None:
    new = several(5)
    name = place("things")
    assert open_if_there(name, FINGERPRINT) is None
    with create(name) as bank:
        ids = bank.add(new)
        assert len(bank) == len(set(ids)) == 5
    with open_bank(name, FINGERPRINT, read_only=True) as bank:
        assert (bank.name, bank.fingerprint) == ("things", FINGERPRINT)
        assert (bank.key_width, bank.latent_width, bank.read_only) == (DK, D, True)
        assert str(bank.path) == name
        for number, wanted in zip(ids, new, strict=True):
            m = bank.get(number)
            assert m.id == number and bank.find(m.content_hash) == number
            assert (m.text, m.source, m.thumbnail) == (wanted.text, wanted.source, wanted.thumbnail)
            assert dict(m.metadata) == wanted.metadata and m.metadata["odd"] in (True, False)
            np.testing.assert_array_equal(m.key, wanted.key.astype(np.float16).astype(np.float32))
            np.testing.assert_allclose(m.latents, wanted.latents, atol=0.05)
        assert [m.id for m in bank.list()] == sorted(ids)
        assert bank.find("00" * 32) is None
        (hit,) = bank.search(new[2].key, 1)
        assert (hit.id, hit.text, hit.bank) == (ids[2], new[2].text, "things")
        np.testing.assert_array_equal(hit.latents, bank.get(hit.id).latents)
    with open_bank(name, read_only=True, label="mine") as bank:
        assert bank.search(new[0].key, 1)[0].bank == "mine"


def test_duplicates_keep_their_id(place: Place) -> None:
    a, b = clustered(2)
    digest = content_hash(b"one", "a")
    with create(place("b")) as bank:
        first, second = bank.add([memory(a, "a", content_hash=digest), memory(b, "b")])
        again = [memory(b, "b"), memory(b, "other text", content_hash=digest), memory(a, "c")]
        assert bank.add(again)[:2] == [second, first]
        third, twin = bank.add([memory(a, "d"), memory(a, "d")])
        assert third == twin
        assert (len(bank), bank.get(first).text) == (4, "a")
        assert bank.add([]) == []


def test_update_replace_remove(place: Place) -> None:
    new = several(6)
    other = clustered(1, seed=9)[0]
    with create(place("b")) as bank:
        ids = bank.add(new)
        before = bank.get(ids[3])
        bank.update(ids[3], metadata={"owner": "Ann"})
        bank.update(ids[4], source="elsewhere", thumbnail=b"new")
        bank.update(ids[4])
        assert dict(bank.get(ids[3]).metadata) == {"owner": "Ann"}
        assert bank.get(ids[3]).key.tobytes() == before.key.tobytes()
        assert (bank.get(ids[4]).source, bank.get(ids[4]).thumbnail) == ("elsewhere", b"new")
        assert [m.id for m in bank.list({"owner": "Ann"})] == [ids[3]]
        assert [h.id for h in bank.search(other, 9, {"owner": "Ann"})] == [ids[3]]
        number = bank.replace(ids[0], memory(other, "another"))
        assert number not in ids and bank.search(other, 1)[0].id == number
        same_key = bank.replace(ids[1], replace(new[1], text="better", thumbnail=None))
        assert (bank.get(same_key).text, bank.get(same_key).thumbnail) == (
            "better", new[1].thumbnail,
        )  # fmt: skip
        with pytest.raises(InputError, match="has that picture and text"):
            bank.replace(ids[2], new[3])
        bank.remove([ids[5], ids[5]])
        with pytest.raises(InputError, match="has no memory"):
            bank.remove([ids[2], ids[5]])
        with pytest.raises(InputError, match="has no memory"):
            bank.get(ids[5])
        assert len(bank) == 5 and bank.get(ids[2]).text == new[2].text
        assert bank.verify().sound


def test_a_score_floor(place: Place) -> None:
    with create(place("b"), score_floor=0.25) as bank:
        assert bank.score_floor == 0.25
        bank.add(several(19))
        with pytest.raises(InputError, match="has 19 memories: a score floor is measured on 20"):
            bank.calibrate()
        bank.add(several(12, seed=3))
        measured = bank.calibrate()
    with open_bank(place("b")) as bank:
        keys = np.stack([m.key for m in bank.list()])
        scores = keys @ keys.T
        np.fill_diagonal(scores, -1)
        assert measured == pytest.approx(np.percentile(scores.max(axis=1), 10), abs=1e-5)
        assert bank.score_floor == measured
        bank.set_score_floor(None)
        assert bank.score_floor is None
        with pytest.raises(InputError, match="-1 to 1"):
            bank.set_score_floor(1.5)


def test_stats(place: Place) -> None:
    with create(place("b")) as bank:
        assert (bank.stats().memories, bank.stats().nearest) == (0, None)
        bank.add(several(9))
        stats = bank.stats()
        assert (stats.name, stats.memories, stats.thumbnails) == ("b", 9, 6)
        assert (stats.index, stats.key_width, stats.latent_width) == ("exact", DK, D)
        keys = np.stack([m.key for m in bank.list()])
        scores = keys @ keys.T
        np.fill_diagonal(scores, -1)
        assert stats.nearest is not None
        assert stats.nearest.p50 == pytest.approx(np.median(scores.max(axis=1)), abs=1e-5)
        assert (stats.file_bytes is None) == ("127.0.0.1" in str(bank.path))
        bank.compact()
        bank.reindex()
        assert len(bank) == 9


def test_what_cannot_be_used(place: Place) -> None:
    new = several(2)
    with create(place("b")) as bank:
        bank.add(new)
        for wrong, message in (
            (replace(new[0], key=np.full(DK, np.nan)), "NaN"),
            (replace(new[0], key=np.ones(DK + 1)), "shape"),
            (replace(new[0], key=np.ones(DK)), "length"),
            (replace(new[0], latents=np.ones((2, D + 1))), "shape"),
            (replace(new[0], text=" "), "the text is empty"),
            (replace(new[0], text="\ud800"), "Unicode"),
            (replace(new[0], content_hash="12"), "hash"),
            (replace(new[0], metadata={"a": [1]}), "list"),
        ):
            with pytest.raises(InputError, match=f"memory 2 of those to add: .*{message}"):
                bank.add([several(1, seed=5)[0], wrong])
        for key in (np.full(DK, np.inf), np.ones(3), np.zeros(DK)):
            with pytest.raises(InputError):
                bank.search(key)
        with pytest.raises(InputError, match="k is 1 or more"):
            bank.search(new[0].key, 0)
        with pytest.raises(InputError):
            bank.search(new[0].key, 3, {"owner": float("nan")})
        for number in (-1, 0, 2**63, 2**70):
            with pytest.raises(InputError):
                bank.get(number)
            with pytest.raises(InputError):
                bank.remove([number])
            with pytest.raises(InputError):
                bank.update(number, source="x")
        with pytest.raises(InputError, match="into itself"):
            bank.merge(bank)
        with pytest.raises(InputError, match="already exists"):
            create(place("b"))
        assert len(bank) == 2
    with pytest.raises(InputError, match="closed"):
        bank.get(1)
    bank.close()


def test_read_only(place: Place) -> None:
    create(place("b")).close()
    with open_bank(place("b"), read_only=True) as bank:
        for change in (
            lambda: bank.add(several(1)),
            lambda: bank.remove([1]),
            lambda: bank.update(1, source="x"),
            lambda: bank.replace(1, several(1)[0]),
            lambda: bank.set_score_floor(0.5),
        ):
            with pytest.raises(BankError, match="open for reading only"):
                change()


def test_banks_of_another_model(place: Place) -> None:
    with create(place("b")) as bank, create_bank(place("c"), "cd" * 32, DK, D) as foreign:
        with pytest.raises(BankError, match="different models"):
            bank.merge(foreign)
        with pytest.raises(BankError, match="different models"):
            search_banks([bank, foreign], clustered(1)[0])
    for opening in (open_bank, open_if_there):
        with pytest.raises(BankError, match="made for another model") as error:
            opening(place("c"), FINGERPRINT)
        one_line(error)
    with pytest.raises(BankError, match="does not exist"):
        open_bank(place("d"))


# --- the same as a bank file -----------------------------------------------------------------


def test_search_finds_what_a_file_finds(qdrant_place: Place, tmp_path: Path) -> None:
    new = several(40) + several(20, seed=4)
    with create(qdrant_place("b")) as bank, create(str(tmp_path / "b.sqlite")) as file:
        bank.add(new)
        file.add(new)
        wheres = (None, {"n": 1}, {"n": "2", "odd": True}, {"owner": "nobody"}, {"odd": "false"})
        for query, where, k in itertools.product(clustered(4, seed=8), wheres, (1, 4, 99)):
            wanted, got = file.search(query, k, where), bank.search(query, k, where)
            assert [(h.text, h.source) for h in got] == [(h.text, h.source) for h in wanted]
            assert [h.score for h in got] == [h.score for h in wanted]
            assert [h.latents.tobytes() for h in got] == [h.latents.tobytes() for h in wanted]
        best, second = file.search(new[0].key, 2)
        number = bank.find(file.get(best.id).content_hash)
        left = bank.search(new[0].key, 1, exclude=frozenset([number, -5, 2**80]))
        assert [h.text for h in left] == [second.text]
        both = search_banks([bank, file], new[0].key, 3)
        assert [h.text for h in both] == [best.text, best.text, second.text]


def test_equal_scores_come_by_id(qdrant_place: Place) -> None:
    a, b = clustered(2)
    with create(qdrant_place("b")) as bank:
        equal = sorted(bank.add(memory(a, f"a {n}") for n in range(40)))
        bank.add([memory(b, "b")])
        for k in (1, 5, 30, 41):
            assert [h.id for h in bank.search(a, k)][:40] == equal[:k]


VALUES = (
    5, 5.0, 0.5, "5", "5.0", "0.5", True, "true", 1, 1.0, 0, False, "false", "True", "", "a=b",
    1e20, "1.0e+20", -2.5e-7, "-2.5e-07", 2**62, 2**53 + 1, float(2**53), 123456.75, "é", '"', "猫",
)  # fmt: skip
NAMES = ("n", "a.b", 'say "n"', "n[0]", "é", "a=b", "where")


def test_where_means_what_it_means_in_a_file(qdrant_place: Place, tmp_path: Path) -> None:
    keys = clustered(len(VALUES))
    new = [
        memory(key, f"{n}", metadata={NAMES[n % len(NAMES)]: value, "all": value})
        for n, (key, value) in enumerate(zip(keys, VALUES, strict=True))
    ]
    with create(qdrant_place("b")) as bank, create(str(tmp_path / "b.sqlite")) as file:
        bank.add(new)
        file.add(new)
        asked = [{name: value} for name in (*NAMES, "all") for value in VALUES]
        asked += [{"all": value, "n": value} for value in VALUES] + [{"none": 1}]
        for where in asked:
            wanted = [m.text for m in file.list(where)]
            assert sorted(m.text for m in bank.list(where)) == sorted(wanted), where
        assert [m.text for m in bank.list({"all": 5})] != []
        with pytest.raises(InputError):
            bank.list({"": 1})


def test_memories_travel_bit_for_bit(qdrant_place: Place, tmp_path: Path) -> None:
    with create(str(tmp_path / "b.sqlite"), score_floor=0.3) as file:
        file.add(several(9))
        wanted = stored(file)
        with create(qdrant_place("b")) as bank:
            assert bank.merge(file) == 9
            assert bank.score_floor == 0.3
            assert stored(bank) == wanted
            assert bank.merge(file) == 0 and file.merge(bank) == 0
            assert bank.export(tmp_path / "out") == 9
    with create(str(tmp_path / "back.sqlite")) as back, create(qdrant_place("again")) as again:
        for copy in (back, again):
            assert copy.import_folder(tmp_path / "out") == 9
            assert copy.import_folder(tmp_path / "out") == 0
            assert stored(copy) == wanted and copy.score_floor == 0.3
        with create(qdrant_place("third")) as third:
            assert third.merge(again) == 9 and stored(third) == wanted
            assert third.merge(again) == 0


def test_a_broken_folder_adds_nothing(qdrant_place: Place, tmp_path: Path) -> None:
    with create(str(tmp_path / "b.sqlite")) as file:
        file.add(several(6))
        file.export(tmp_path / "out")
    lines = (tmp_path / "out" / "memories.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "memories.jsonl").write_text("".join(lines[:5]) + "{}\n")
    with create(qdrant_place("b")) as bank:
        with pytest.raises(InputError, match="line 6"):
            bank.import_folder(tmp_path / "out")
        with pytest.raises(InputError, match="no exported bank"):
            bank.import_folder(tmp_path)
        assert len(bank) == 0


# --- what is Qdrant's own --------------------------------------------------------------------


def test_ids_are_the_same_everywhere(tmp_path: Path) -> None:
    """63 bits of the content hash: a change would make every bank in Qdrant unreadable."""
    assert qdrant_points.id_of(bytes([255] * 32)) == 2**63 - 1
    assert qdrant_points.id_of(bytes(range(32))) == 0x0001020304050607 >> 1
    new = several(4)
    with create(folder(tmp_path)("b")) as a, create(folder(tmp_path)("c")) as b:
        ids = a.add(new)
        assert b.add(reversed(new)) == ids[::-1]
        a.remove(ids)
        assert a.add(new) == ids


def test_hashes_that_begin_alike_are_refused(tmp_path: Path) -> None:
    a, b, c, d = (memory(key, f"{n}") for n, key in enumerate(clustered(4)))
    a = replace(a, content_hash="ab" * 8 + "00" * 24)
    b = replace(b, content_hash="ab" * 8 + "01" * 24)
    with create(folder(tmp_path)("b")) as bank:
        first, second = bank.add([a, d])
        assert bank.find(b.content_hash) is None
        for attempt in (lambda: bank.add([c, b]), lambda: bank.replace(second, b)):
            with pytest.raises(BankError, match="begin alike") as error:
                attempt()
            one_line(error)
        assert {m.id for m in bank.list()} == {first, second}


def raw(name: str) -> Any:
    """A client for what lies behind an address."""
    address = qdrant_connection.parse_address(name)
    return qdrant_connection.Connection(address)


def test_damaged_memories_are_named(qdrant_place: Place) -> None:
    name = qdrant_place("b")
    with create(name) as bank:
        ids = sorted(bank.add(several(6)))
        connection = raw(name)
        with connection.client() as client:
            client.set_payload("b", {"scales": "AAAA"}, [ids[0]])
            client.set_payload("b", {"content_hash": "00" * 32}, [ids[1]])
            client.set_payload("b", {"latents": "?"}, [ids[2]])
            client.set_payload("b", {"text": [1]}, [ids[3]])
            foreign = models.PointStruct(id=str(uuid.UUID(int=5)), vector=[0.1] * DK)
            client.upsert("b", [foreign])
        connection.close()
        report = bank.verify()
        assert [p.split()[1] for p in report.problems[:4]] == [str(n) for n in ids[:4]]
        assert len(report.problems) == 5 and report.memories == 7
        for number in ids[:4]:
            with pytest.raises(BankError, match=f"memory {number} cannot be read") as error:
                bank.get(number)
            one_line(error)
        with pytest.raises(BankError, match="damaged"):
            bank.list()
        bank.remove(ids[:4])


def test_collections_that_are_no_banks(qdrant_place: Place) -> None:
    connection = raw(qdrant_place("x"))
    good = {
        "tinyalign_bank": 1,
        "fingerprint": "ab",
        "key_width": DK,
        "latent_width": D,
        "name": "n",
    }
    size = models.VectorParams(size=DK, distance=models.Distance.DOT)
    cosine = models.VectorParams(size=DK, distance=models.Distance.COSINE)
    wrong = {
        "plain": (size, None, "not a memory bank"),
        "newer": (size, good | {"tinyalign_bank": 2}, "format 2, newer than 1"),
        "part": (size, {"tinyalign_bank": 1, "fingerprint": "ab"}, "header is incomplete"),
        "type": (size, good | {"key_width": "9"}, "header is incomplete"),
        "width": (size, good | {"key_width": DK + 1}, "its vectors are no keys"),
        "cosine": (cosine, good, "its vectors are no keys"),
        "named": ({"a": size}, good, "its vectors are no keys"),
    }
    with connection.client() as client:
        for name, (vectors, metadata, _) in wrong.items():
            client.create_collection(name, vectors, metadata=metadata)
    for name, (_, _, message) in wrong.items():
        with pytest.raises(BankError, match=message) as error:
            open_bank(qdrant_place(name))
        one_line(error)
    connection.close()


@pytest.mark.parametrize(
    "address",
    [
        "qdrant://", "qdrant://host", "qdrant://host/", "qdrant:///name", "qdrant:///a/..",
        "qdrant://host:port/b", "qdrant://host:99999/b", "qdrant://host/a/b", "qdrant:///a/b?c",
        "qdrant://:6333/b", "qdrant://me:secret@host/b", 'qdrant:///a/"b"', "qdrants:///",
    ],
)  # fmt: skip
def test_bad_addresses(address: str) -> None:
    with pytest.raises(InputError) as error:
        open_bank(address)
    assert "address" in one_line(error)


def test_addresses() -> None:
    parse = qdrant_connection.parse_address
    assert parse("qdrant://host/b").url == "http://host:6333"
    assert parse("qdrants://host:7/b").url == "https://host:7"
    assert parse("qdrant://[::1]:7/b").url == "http://[::1]:7"
    local = parse("qdrant:///some folder/more/b")
    assert (local.folder, local.collection) == (Path("/some folder/more"), "b")


# --- a folder --------------------------------------------------------------------------------


def test_a_folder_is_for_one_process(tmp_path: Path) -> None:
    name = folder(tmp_path)
    with create(name("a")) as a, create(name("b")) as b, open_bank(name("a")) as same:
        a.add(several(2))
        assert len(same) == 2 and b.merge(a) == 2
        a.close()
        assert len(same) == 2
    client = QdrantClient(path=str(tmp_path / "q"))  # nobody has it open any more
    with pytest.raises(BankError, match="in use by another process") as error:
        open_bank(name("a"))
    one_line(error)
    client.close()
    with open_bank(name("a")) as again:
        assert len(again) == 2


def test_looking_for_a_bank_makes_no_folder(tmp_path: Path) -> None:
    name = folder(tmp_path)("b")
    assert open_if_there(name, None) is None
    with pytest.raises(BankError, match="does not exist"):
        open_bank(name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    name = folder(tmp_path)("b")
    create(name).close()
    (tmp_path / "q" / "collection" / "b" / "storage.sqlite").write_bytes(b"no database" * 99)
    with pytest.raises(BankError) as error:
        open_bank(name)
    one_line(error)
    (tmp_path / "q" / "meta.json").write_text("{")
    with pytest.raises(BankError) as error:
        open_bank(name)
    one_line(error)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BankError) as error:
        create(f"qdrant://{tmp_path}/file/b")
    one_line(error)


def test_a_bank_left_open_at_the_end_of_the_program(tmp_path: Path) -> None:
    name = folder(tmp_path)("b")
    program = f"from tinyalign.bank import opening; b = opening.create_bank({name!r}, 'f', 4, 4)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


# --- a server --------------------------------------------------------------------------------


def test_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for opening in (open_bank, create):
        with pytest.raises(BankError, match="no Qdrant server answers") as error:
            opening(f"qdrant://127.0.0.1:{port}/b")
        assert f"127.0.0.1:{port}" in one_line(error)


def test_a_server_that_keeps_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant_connection, "TIMEOUT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        name = f"qdrant://127.0.0.1:{silent.getsockname()[1]}/b"
        with pytest.raises(BankError, match="does not answer within 1 s") as error:
            open_bank(name)
    one_line(error)


def test_something_else_that_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            connection.recv(9999)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(BankError, match="is it a Qdrant server") as error:
            open_bank(f"qdrant://127.0.0.1:{other.getsockname()[1]}/b")
        thread.join()
    one_line(error)


def test_the_server_refuses(server: tuple[StandIn, str], monkeypatch: pytest.MonkeyPatch) -> None:
    state, address = server
    name = f"qdrant://{address}/b"
    bank = create(name)
    bank.add(several(2))
    with monkeypatch.context() as patch:
        patch.delenv("QDRANT_API_KEY")
        with pytest.raises(BankError, match="set QDRANT_API_KEY") as error:
            open_bank(name)
        one_line(error)
    for status, message in ((500, "HTTP 500"), (503, "HTTP 503"), (404, "does not exist")):
        state.status = status
        for verb in (lambda: len(bank), bank.list, lambda: bank.add(several(3, seed=2))):
            with pytest.raises(BankError, match=message) as error:
                verb()
            one_line(error)
    state.status = None
    assert len(bank) == 2
    state.completed = False
    with pytest.raises(BankError, match="not applied it in time"):
        bank.add(several(3, seed=2))
    bank.close()


def test_an_old_server(server: tuple[StandIn, str]) -> None:
    state, address = server
    state.old = True
    with pytest.raises(BankError, match=r"Qdrant 1\.17 or newer is needed") as error:
        create(f"qdrant://{address}/b")
    one_line(error)
    assert state.shards == {}


def test_an_interrupted_merge_goes_on(
    server: tuple[StandIn, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdrant_points, "POINTS_AT_ONCE", 4)
    state, address = server
    with create(str(tmp_path / "b.sqlite")) as file, create(f"qdrant://{address}/b") as bank:
        file.add(several(19))
        upsert, count = state._act, [0]

        def fail(method: str, name: str, path: str, body: bytes) -> Any:
            adds = (method, path) == ("PUT", "points")
            count[0] += adds
            if adds and count[0] == 3:
                raise ValueError("no space is left")
            return upsert(method, name, path, body)

        monkeypatch.setattr(state, "_act", fail)
        with pytest.raises(BankError):
            bank.merge(file)
        assert len(bank) == 8
        monkeypatch.setattr(state, "_act", upsert)
        assert bank.merge(file) == 11
        assert stored(bank) == stored(file)


def test_many_devices_add_at_once(server: tuple[StandIn, str]) -> None:
    _, address = server
    name = f"qdrant://{address}/b"
    create(name).close()
    new = several(24)
    ids: dict[int, list[int]] = {}

    def device(number: int) -> None:
        with open_bank(name, FINGERPRINT) as bank:
            ids[number] = []
            for start in range(0, 24, 6):
                ids[number] += bank.add(new[start : start + 6])
                assert bank.search(new[start].key, 1)[0].text == new[start].text

    threads = [threading.Thread(target=device, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 4 and all(found == ids[0] for found in ids.values())
    with open_bank(name) as bank:
        assert len(bank) == 24 and bank.verify().sound


def test_requests_are_of_a_size_that_servers_take(server: tuple[StandIn, str]) -> None:
    state, address = server
    new = [replace(m, thumbnail=bytes(3 << 20)) for m in several(5)] + several(150, seed=1)
    with create(f"qdrant://{address}/b") as bank:
        bank.add(new)
        sizes = [
            size
            for method, path, size in state.requests
            if path.endswith("/points") and method == "PUT"
        ]
        assert len(sizes) >= 7 and max(sizes) < 16 << 20
        with pytest.raises(InputError, match="over 16 MiB"):
            bank.add(
                [several(1, seed=7)[0], replace(several(2, seed=8)[1], thumbnail=bytes(17 << 20))]
            )
        assert len(bank) == 155


def test_only_what_is_large_is_searched_by_the_servers_index(
    server: tuple[StandIn, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, address = server
    monkeypatch.setattr(qdrant, "EXACT_LIMIT", 5)
    asked: list[bool | None] = []
    answer = StandIn._query

    def query(self: StandIn, name: str, q: models.QueryRequest) -> Any:
        asked.append(q.params.exact if q.params else None)
        return answer(self, name, q)

    monkeypatch.setattr(StandIn, "_query", query)
    with create(f"qdrant://{address}/b") as bank:
        bank.add(several(5))
        bank.search(clustered(1)[0])
        bank.add(several(2, seed=1))
        bank.search(clustered(1)[0])
        bank.search(clustered(1)[0], where={"n": 1})
        assert bank.stats().index == "server"
    assert asked[:3] == [True, False, True]


def test_seal_says_what_to_do(qdrant_place: Place) -> None:
    with (
        create(qdrant_place("b")) as bank,
        pytest.raises(InputError, match="merge it into a bank file"),
    ):
        bank.seal()


# --- without the client ----------------------------------------------------------------------


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("tinyalign.bank.qdrant"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    for opening in (open_bank, create):
        with pytest.raises(InputError, match=r"pip install 'tinyalign\[qdrant\]'") as error:
            opening("qdrant://host/b")
        one_line(error)


def test_a_bank_file_needs_no_client() -> None:
    program = (
        "import sys, tinyalign.bank, tinyalign.bank.opening, tinyalign.runtime\n"
        "print([n for n in sys.modules if n.startswith(('qdrant', 'grpc', 'torch', 'pydantic'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr
