"""What a bank survives: kills, a full disk, locks, damaged files, and many processes at once.

What could end in a signal runs in a process of its own. `kill_loop.py` kills by the thousand.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_bank import DK, FINGERPRINT, D, clustered, fill, found, memory

from tinyalign.bank import Bank, BankError, index

HERE = Path(__file__).parent


def python(code: str, *arguments: object, timeout: float = 120) -> list[str]:
    """The lines that code prints; it must end well and say nothing on stderr."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=HERE)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "things.sqlite"


# --- kills -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_killed_at_any_moment_nothing_is_lost_or_half_there() -> None:
    """SIGKILL amid add, remove, update, merge, compact and writing the index cache."""
    command = [sys.executable, str(HERE / "kill_loop.py"), "--kills", "240"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("240 kills in ") and last == "nothing lost, nothing half there"
    assert all(verb in first for verb in ("add", "merge", "compact", "reindex"))


def test_what_a_killed_cache_writer_left_is_swept(path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("hnswlib")
    monkeypatch.setattr(index, "EXACT_LIMIT", 100)
    keys = fill(path, 150)
    old, new = (path.with_name(f"{path.name}.hnsw.{name}.tmp") for name in ("a1", "b2"))
    for left in (old, new):
        left.write_bytes(b"half a graph")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    with Bank.open(path) as bank:
        bank.search(keys[0])
    assert not old.exists() and new.exists()  # another process may still be writing the new one


def test_power_fails_and_the_end_of_the_log_is_lost(path: Path, tmp_path: Path) -> None:
    """Cut anywhere, with rubbish after it: all adds that were synced by then are there, whole."""
    Bank.create(path, FINGERPRINT, DK, D).close()
    log = path.with_name(path.name + "-wal")
    with Bank.open(path) as bank:
        synced = []
        for turn in range(12):
            keys = clustered(3, seed=turn)
            bank.add(memory(key, f"{turn} {n}") for n, key in enumerate(keys))
            synced.append(log.stat().st_size)
        state, data = path.read_bytes(), log.read_bytes()
    assert synced == sorted(set(synced))
    random = np.random.default_rng(2)
    copy = tmp_path / "copy.sqlite"
    for cut in [*synced, *random.integers(synced[0], len(data), 40).tolist()]:
        copy.write_bytes(state)
        rubbish = random.bytes(int(random.integers(8192)))
        copy.with_name(copy.name + "-wal").write_bytes(data[:cut] + rubbish)
        with Bank.open(copy) as bank:
            assert bank.verify().sound
            turns = sum(size <= cut for size in synced)
            assert [m.text for m in bank.list()] == [
                f"{turn} {n}" for turn in range(turns) for n in range(3)
            ]


# --- a full disk -----------------------------------------------------------------------------


def check_nothing_lost(bank: Bank, before: int) -> None:
    assert len(bank) == before
    assert bank.verify().sound
    assert [m.text for m in bank.list()][:60] == [f"thing {n}" for n in range(60)]


@pytest.mark.parametrize("sealed", [False, True])
def test_no_space_is_left(path: Path, tmp_path: Path, sealed: bool) -> None:
    """SQLite's own page limit stands for the full disk: the same error, on any system."""
    fill(path, 60)
    with Bank.create(tmp_path / "more.sqlite", FINGERPRINT, DK, D) as more:
        more.add(memory(key, f"more {n}") for n, key in enumerate(clustered(400, seed=3)))
    with Bank.open(path) as bank, Bank.open(tmp_path / "more.sqlite") as more:
        if sealed:
            bank.seal()
        connection = bank._store._connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        many = [memory(key, f"new {n}") for n, key in enumerate(clustered(400, seed=4))]
        thumbnail = bytes(1 << 20)
        for change in (
            lambda: bank.add(many),
            lambda: bank.merge(more),
            lambda: bank.update(3, thumbnail=thumbnail),
            lambda: bank.replace(3, memory(clustered(1, 5)[0], "x" * 100_000)),
        ):
            with pytest.raises(BankError, match="no space is left; nothing was changed") as error:
                change()
            assert "\n" not in str(error.value)
            check_nothing_lost(bank, 60)
        connection.execute("PRAGMA max_page_count = 1000000")
        assert bank.merge(more) == 400
        check_nothing_lost(bank, 460)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB, where mounting one is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    with contextlib.suppress(OSError):
        if subprocess.run(mount, capture_output=True).returncode == 0:
            try:
                yield place
            finally:
                subprocess.run(["umount", "-l", str(place)], check=True)
            return
    pytest.skip("mounting a small disk is not allowed here")


@pytest.mark.parametrize("sealed", [False, True])
def test_a_disk_that_is_really_full(small_disk: Path, sealed: bool) -> None:
    path, ballast = small_disk / "things.sqlite", small_disk / "ballast"
    fill(path, 60)
    ballast.write_bytes(bytes(400_000))
    if sealed:
        with Bank.open(path) as bank:
            bank.seal()
    with Bank.open(path) as bank:
        added = 60
        with pytest.raises(BankError, match=r"no space is left|disk reports an error") as error:
            for turn in range(1000):
                keys = clustered(20, seed=100 + turn)
                bank.add(memory(key, f"{turn} {n} {'x' * 900}") for n, key in enumerate(keys))
                added += 20
        assert "\n" not in str(error.value)
        assert added > 60
        check_nothing_lost(bank, added)
        with contextlib.suppress(BankError):
            bank.compact()
        check_nothing_lost(bank, added)
    with Bank.open(path) as bank:
        check_nothing_lost(bank, added)
        ballast.unlink()
        bank.add([memory(clustered(1, seed=8)[0], "again")])
        check_nothing_lost(bank, added + 1)


def test_no_space_for_the_index_cache(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hnswlib does not say that it could not write its file."""
    pytest.importorskip("hnswlib")
    monkeypatch.setattr(index, "EXACT_LIMIT", 100)
    path, ballast = small_disk / "things.sqlite", small_disk / "ballast"
    keys = fill(path, 400)
    free = shutil.disk_usage(small_disk).free
    for left in (0, 4096, 30_000):  # not even its header, a part of it
        ballast.write_bytes(bytes(free - left))
        with Bank.open(path, read_only=True) as bank:
            assert found(bank, keys[7], 1) == [8]
            assert bank.stats().index == "missing"
        if not left:
            with pytest.raises(BankError, match="no space is left"):
                Bank.open(path)
        ballast.unlink()
    with Bank.open(path, read_only=True) as bank:
        assert found(bank, keys[7], 1) == [8]
        assert bank.stats().index == "cached"


FILE_LIMIT = """
import resource, signal, sys
from pathlib import Path
from test_bank import clustered, memory
from tinyalign.bank import Bank, BankError
path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20_000,) * 2)
with Bank.open(path) as bank:
    try:
        for turn in range(1000):
            bank.add(memory(key, f"{turn} {n}") for n, key in enumerate(clustered(20, 100 + turn)))
    except BankError as error:
        print(turn)
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of processes")
def test_a_file_that_may_not_grow(path: Path) -> None:
    fill(path, 60)
    turns, line = python(FILE_LIMIT, path)
    assert path.name in line and ("no space" in line or "reports an error" in line)
    with Bank.open(path) as bank:
        check_nothing_lost(bank, 60 + 20 * int(turns))


# --- no permission, locked -------------------------------------------------------------------

AS_NOBODY = """
import os, sys
import numpy as np
from test_bank import clustered, memory
from tinyalign.bank import Bank, BankError
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
changes = (
    lambda bank: bank.add([memory(clustered(1, 9)[0], "new")]),
    lambda bank: bank.remove([1]),
    lambda bank: bank.compact(),
    lambda bank: bank.set_score_floor(0.5),
)
for change in changes:
    try:
        with Bank.open(sys.argv[1]) as bank:
            change(bank)
        print("done")
    except BankError as error:
        print(error)
"""


@pytest.mark.parametrize("sealed", [False, True])
def test_a_read_only_file(sealed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "things.sqlite"
        fill(path, 60)
        if sealed:
            with Bank.open(path) as bank:
                bank.seal()
        path.chmod(0o444)
        Path(folder).chmod(0o777)
        for line in python(AS_NOBODY, path):
            assert "read-only" in line or "no permission" in line
        with Bank.open(path, read_only=True) as bank:
            check_nothing_lost(bank, 60)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_locked_bank(path: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool) -> None:
    keys = fill(path, 60)
    with Bank.open(path) as bank:
        if sealed:
            bank.seal()
    monkeypatch.setattr("tinyalign.bank.sqlite.BUSY_SECONDS", 0.1)
    other = sqlite3.connect(path, isolation_level=None)
    with Bank.open(path) as bank:
        other.execute("BEGIN IMMEDIATE")
        for change in (
            lambda: bank.add([memory(clustered(1, 9)[0], "new")]),
            lambda: bank.remove([1]),
            lambda: bank.compact(),
            lambda: bank.update(1, source="x"),
        ):
            with pytest.raises(BankError, match="locked by another process"):
                change()
        assert found(bank, keys[3], 1) == [4]  # reading goes on
        other.execute("ROLLBACK")
        check_nothing_lost(bank, 60)
        assert bank.add([memory(clustered(1, 9)[0], "new")]) == [61]
    if sealed:
        with Bank.open(path) as bank:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(BankError, match="locked by another process"):
                bank.search(keys[3])
            other.execute("ROLLBACK")
            assert found(bank, keys[3], 1) == [4]
    other.close()


# --- damaged files ---------------------------------------------------------------------------

USE_ALL = """
import shutil, sys
from pathlib import Path
import numpy as np
from test_bank import DK, clustered, memory
from tinyalign.bank import Bank, InputError
key = clustered(1, 9)[0]
for name in sys.argv[1:]:
    path = Path(name)
    whole = path.read_bytes()
    verbs = {
        "read": lambda bank: (bank.search(key, 50), bank.list({"n": 1}), bank.score_floor),
        "count": lambda bank: (bank.stats(), bank.verify()),
        "add": lambda bank: bank.add([memory(key, "new")]),
        "update": lambda bank: bank.update(3, source="x", metadata={"a": 1}, thumbnail=b"t"),
        "replace": lambda bank: bank.replace(4, memory(key, "new")),
        "remove": lambda bank: bank.remove([5]),
        "compact": lambda bank: bank.compact(),
        "seal": lambda bank: bank.seal(),
        "export": lambda bank: bank.export(path.with_suffix(".folder")),
        "reindex": lambda bank: bank.reindex(),
        "calibrate": lambda bank: bank.calibrate(),
    }
    for verb, use in verbs.items():
        for more in ("", "-wal", "-shm", "-journal"):
            Path(name + more).unlink(missing_ok=True)
        shutil.rmtree(path.with_suffix(".folder"), ignore_errors=True)
        path.write_bytes(whole)
        try:
            with Bank.open(path) as bank:
                use(bank)
        except InputError as error:
            assert "\\n" not in str(error) and (path.name in str(error)), (verb, error)
print("all used")
"""


def test_no_verb_dies_of_a_damaged_bank(tmp_path: Path) -> None:
    """Truncated, bit-flipped, overwritten, foreign: a typed error or success, never a signal."""
    good = tmp_path / "good.sqlite"
    fill(good, 60)
    with Bank.open(good) as bank:
        bank.seal()
    data = good.read_bytes()
    random = np.random.default_rng(8)
    damaged: list[bytes] = [data[:size] for size in random.integers(1, len(data), 8)]
    damaged += [data + b"more", data[: 3 * 4096], bytes(100) + data[100:], good.name.encode() * 99]
    for number in range(30):
        other = bytearray(data)
        place = int(random.integers(4096 if number % 3 == 0 else len(data)))
        other[place] ^= 1 << int(random.integers(8))
        damaged.append(bytes(other))
    for _ in range(8):  # a whole page of zeros, or another page twice
        page, source = random.integers(1, len(data) // 4096, 2) * 4096
        piece = data[source : source + 4096] if random.random() < 0.5 else bytes(4096)
        damaged.append(data[:page] + piece + data[page + 4096 :])
    files = [tmp_path / f"{number}.sqlite" for number in range(len(damaged))]
    for file, content in zip(files, damaged, strict=True):
        file.write_bytes(content)
    assert python(USE_ALL, *files) == ["all used"]


SEARCH_WITH_CACHES = """
import shutil, sys
from pathlib import Path
import numpy as np
from test_bank import clustered
from tinyalign.bank import Bank, index
index.EXACT_LIMIT = 100
folder, path = Path(sys.argv[1]), Path(sys.argv[2])
query = clustered(200)[7]
for place in sorted(folder.iterdir()):
    for file in index.cache_files(path):
        shutil.copy(place / file.name, file)
    with Bank.open(path, read_only=True) as bank:
        state = bank.stats().index
        hits = [hit.id for hit in bank.search(query, 3)]
        print(place.name, state, bank.stats().index, *hits)
"""


def test_a_bad_index_cache_is_never_loaded(path: Path, tmp_path: Path) -> None:
    """Truncated, bit-flipped, foreign: noticed and built again, never a signal."""
    pytest.importorskip("hnswlib")
    keys = fill(path, 200)
    fill(tmp_path / "other.sqlite", 200, seed=4)
    places = tmp_path / "caches"
    names = [file.name for file in index.cache_files(path)]

    def cache(name: str, *contents: bytes) -> None:
        (places / name).mkdir(parents=True)
        for file, content in zip(names, contents, strict=True):
            (places / name / file).write_bytes(content)

    made = "from tinyalign.bank import Bank, index; import sys; index.EXACT_LIMIT = 100; "
    for bank in (path, tmp_path / "other.sqlite"):
        python(made + "Bank.open(sys.argv[1]).reindex()", bank)
    mine = [file.read_bytes() for file in index.cache_files(path)]
    other = [file.read_bytes() for file in index.cache_files(tmp_path / "other.sqlite")]
    cache("good", *mine)
    cache("foreign", *other)
    cache("empty", b"", b"", b"")
    random = np.random.default_rng(6)
    for number, (name, data) in enumerate(zip(("graph", "keys", "binding"), mine, strict=True)):

        def damaged(how: str, content: bytes, number: int = number, name: str = name) -> None:
            cache(f"{name} {how}", *mine[:number], content, *mine[number + 1 :])

        damaged("foreign", other[number])
        damaged("longer", data + bytes(8))
        for size in np.unique(random.integers(0, len(data), 8)):
            damaged(f"cut to {size}", data[:size])
        for turn in range(20):
            place = int(random.integers(100 if turn % 2 else len(data)))  # half in the header
            flipped = data[place] ^ 1 << int(random.integers(8))
            damaged(f"flipped {turn}", data[:place] + bytes([flipped]) + data[place + 1 :])
    with Bank.open(path) as bank:
        wanted = " ".join(map(str, found(bank, keys[7], 3)))
    lines = python(SEARCH_WITH_CACHES, places, path)
    assert len(lines) == len(list(places.iterdir()))
    for line in lines:
        state = "cached" if line.startswith("good ") else "stale"
        assert line.endswith(f" {state} cached {wanted}"), line


# --- many processes at once ------------------------------------------------------------------

WRITER = """
import sys
from test_bank import clustered, memory
from tinyalign.bank import Bank, index
index.EXACT_LIMIT = 100
path, who = sys.argv[1], int(sys.argv[2])
with Bank.open(path) as bank:
    for number in range(40):
        keys = clustered(4, seed=1000 * who + number)
        ids = bank.add(memory(k, f"{who} {number} {n}") for n, k in enumerate(keys))
        if number % 4 == 3:
            bank.remove(ids)
        if number % 8 == 5:
            assert bank.search(keys[0], 1)[0].id == ids[0]
    if who == 2:
        bank.compact()
"""
READER = """
import sys, time
from pathlib import Path
from test_bank import clustered
from tinyalign.bank import Bank, index
index.EXACT_LIMIT = 100
path, stop = sys.argv[1], Path(sys.argv[2])
query = clustered(1)[0]
searches, last = 0, 0
with Bank.open(path, read_only=True) as bank:
    while not stop.exists() or not searches:
        hits = bank.search(query, 2000)
        ids = [hit.id for hit in hits]
        assert len(ids) == len(set(ids))
        assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
        groups = {}
        for hit in hits:
            if not hit.text.startswith("thing"):
                groups.setdefault(hit.text.rpartition(" ")[0], []).append(hit.text)
        assert sum(hit.text.startswith("thing") for hit in hits) == 120
        searches += 1
        assert all(len(group) == 4 for group in groups.values()), groups
print("searched")
"""


@pytest.mark.parametrize("sealed", [False, True])
def test_processes_add_and_remove_while_processes_search(
    path: Path, tmp_path: Path, sealed: bool
) -> None:
    """With a graph over most of the bank; four memories are added or removed at a time."""
    pytest.importorskip("hnswlib")
    fill(path, 120)
    if sealed:
        with Bank.open(path) as bank:
            bank.seal()
    stop = tmp_path / "stop"
    start = {"cwd": HERE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(path), str(stop)], **start)
        for _ in range(2)
    ]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), who], **start) for who in "12"
    ]
    ended = [writer.communicate(timeout=120) for writer in writers]
    stop.touch()
    assert ended == [("", "")] * 2
    assert [reader.communicate(timeout=60) for reader in readers] == [("searched\n", "")] * 2
    with Bank.open(path) as bank:
        assert bank.verify().sound
        texts = {m.text for m in bank.list()}
    kept = [number for number in range(40) if number % 4 != 3]
    expected = {f"{who} {number} {n}" for who in (1, 2) for number in kept for n in range(4)}
    assert texts == expected | {f"thing {n}" for n in range(120)}
