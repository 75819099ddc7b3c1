"""Adding with Ray: two real workers, the same bank as without."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from test_bank_cli import COMMAND, lines
from test_cli import environment

from tinyalign.bank import Bank
from tinyalign.runtime import bank_cli, shards

HAS_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="ray is not installed: pip install 'tinyalign[ray]'",
)


def rows(path: str) -> list[tuple[Any, ...]]:
    """Everything a bank holds, as it is stored."""
    with sqlite3.connect(path) as bank:
        memories = bank.execute("SELECT * FROM memories ORDER BY id").fetchall()
        thumbnails = bank.execute("SELECT * FROM thumbnails ORDER BY id").fetchall()
        meta = bank.execute("SELECT * FROM meta WHERE name <> 'name' ORDER BY name").fetchall()
    return memories + thumbnails + meta


@pytest.fixture
def place(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: pictures p0.png to p7.png and the tiny model to use."""
    for number in range(8):
        tiny_model.picture(number).save(tmp_path / f"p{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYALIGN_MODEL", str(tiny))
    return tmp_path


@pytest.fixture
def run(place: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command in this process: (exit code, stdout, stderr), those of Ray's too."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = bank_cli.main(arguments)
        done = capfd.readouterr()
        return code, done.out, done.err

    return call


@pytest.fixture
def many(place: Path) -> str:
    """A list of 150 items, which are three shards: twins, two texts of a picture, failures."""
    items = [
        {"image": f"p{n % 8}.png", "text": f"{n % 60}", "metadata": {"n": n}} for n in range(150)
    ]
    items[3]["image"] = items[70]["image"] = "none.png"
    lines(place / "items.jsonl", *items)
    return "items.jsonl"


@HAS_RAY
def test_two_workers_make_the_bank_of_one_process(
    run: Callable[..., Any],
    many: str,
    place: Path,
) -> None:
    alone = run("add", many, "--bank", "alone.db", "--json")
    # what another run has left is skipped
    lines(place / "part.jsonl", *Path(many).read_text().splitlines()[:10])
    for bank in ("half.db", "twice.db"):
        assert run("add", "part.jsonl", "--bank", bank)[0] == 1
    half = run("add", many, "--bank", "half.db", "--json")
    before = set(place.iterdir())
    fast = run("add", many, "--bank", "fast.db", "--json", "--ray", "--workers", "2")
    assert set(place.iterdir()) - before == {place / "fast.db"}
    twice = run("add", many, "--bank", "twice.db", "--json", "--ray", "--workers", "2")
    assert rows("fast.db") == rows("alone.db")
    assert rows("twice.db") == rows("half.db")
    for with_ray, without in ((fast, alone), (twice, half)):
        assert with_ray[0] == without[0] == 1
        given, wanted = json.loads(with_ray[1]), json.loads(without[1])
        assert len(wanted["failed"]) == 2 and wanted["known"]
        assert given["failed"] == wanted["failed"]
        assert (given["added"], given["known"]) == (wanted["added"], wanted["known"])
    assert fast[2].splitlines() == [
        "tinyalign-bank: 64 of 150",
        "tinyalign-bank: 128 of 150",
        "tinyalign-bank: items.jsonl, line 4: no picture at none.png",
        "tinyalign-bank: items.jsonl, line 71: no picture at none.png",
    ]


@HAS_RAY
def test_interrupted_it_goes_on_where_it_stopped(place: Path, tiny: Path, many: str) -> None:
    command = [COMMAND, "add", many, "--bank", "b.db", "--ray", "--workers", "2"]
    settings: dict[str, Any] = {"cwd": place, "env": environment(place, tiny), "text": True}
    adding = subprocess.Popen(
        command, **settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (place / "b.db").exists() or not len(rows("b.db")) > 10:
        assert adding.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(adding.pid, signal.SIGINT)  # as Ctrl-C does
    out, err = adding.communicate(timeout=60)
    assert (adding.returncode, out) in ((130, ""), (1, out))  # or it was done already
    assert all(line.startswith("tinyalign-bank: ") for line in err.splitlines()), err
    assert not list(place.glob("*shards*"))
    done = subprocess.run(command, **settings, capture_output=True, timeout=120)
    assert done.returncode == 1  # the two pictures that are not there
    alone = [COMMAND, "add", many, "--bank", "alone.db"]
    assert subprocess.run(alone, **settings, capture_output=True, timeout=120).returncode == 1
    assert rows("b.db") == rows("alone.db")


def test_without_ray_one_line(
    run: Callable[..., Any],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = run("add", "p0.png", "--text", "cup", "--bank", "b.db", "--ray")
    assert (code, out) == (2, "")
    assert err == "tinyalign-bank: --ray needs Ray: pip install 'tinyalign[ray]'\n"
    assert not Path("b.db").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "--workers needs --ray"),
        (["--ray", "--workers", "0"], "--workers must be 1 or more, not 0"),
        (["--ray", "--threads", "2"], "give --workers, not --threads"),
    ],
)
def test_options_that_do_not_go_together(
    run: Callable[..., Any],
    options: list[str],
    message: str,
) -> None:
    code, out, err = run("add", "p0.png", "--text", "cup", "--bank", "b.db", *options)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_a_shard_holds_what_the_target_does_not_know(place: Path, tiny: Path) -> None:
    """A worker's task, in this process."""
    from tinyalign.runtime.items import Item
    from tinyalign.runtime.model import TinyAlign
    from tinyalign.runtime.teach import create_bank, teach

    items = [Item(Path(f"p{n}.png"), "cup", {"n": n}, f"p{n}.png") for n in (0, 1, 9, 2, 1)]
    with TinyAlign.load(tiny, banks=[], lm=False) as model, create_bank(model, "b.db") as bank:
        teach(model, items[:1], bank)
    shard = shards.write_shard(items, Path("shard.db"), tiny, Path("b.db"), place)
    assert len(shard.hashes) == 4 and [f.item.place for f in shard.failed] == ["p9.png"]
    with Bank.open("shard.db") as written:
        assert [m.source for m in written.list()] == ["p1.png", "p2.png"]
        assert [m.content_hash for m in written.list()] == [shard.hashes[1], shard.hashes[2]]
