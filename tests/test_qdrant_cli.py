"""The command lines on banks in Qdrant, with the tiny model."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_model

pytest.importorskip("qdrant_client", reason="qdrant-client is not installed: the dev extra has it")
pytest.importorskip("qdrant_edge", reason="qdrant-edge-py is not installed: the dev extra has it")

from qdrant_stand_in import API_KEY, stand_in

from tinyalign.bank import Bank
from tinyalign.bank.opening import create_bank, open_bank
from tinyalign.runtime import TinyAlign, bank_cli, cli
from tinyalign.runtime.teach import create_bank as bank_for

pytestmark = pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")


@pytest.fixture
def place(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: pictures p0.png to p4.png and the tiny model to use."""
    for number in range(5):
        tiny_model.picture(number).save(tmp_path / f"p{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYALIGN_MODEL", str(tiny))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(params=["folder", "server"])
def root(
    request: pytest.FixtureRequest, place: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """What addresses of banks begin with."""
    if request.param == "folder":
        yield f"qdrant://{place}/store"
    else:
        monkeypatch.setenv("QDRANT_API_KEY", API_KEY)
        with stand_in() as (_, address):
            yield f"qdrant://{address}"


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str, main: Callable[..., int] = bank_cli.main) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


@pytest.fixture
def ok(run: Callable[..., Any]) -> Callable[..., str]:
    """Run a command that must succeed quietly; its output."""

    def call(*arguments: str, **more: Any) -> str:
        code, out, err = run(*arguments, **more)
        assert (code, err) == (0, ""), (arguments, err)
        return out

    return call


@pytest.fixture
def bank(ok: Callable[..., str], root: str) -> str:
    """A bank of three memories."""
    name = f"{root}/mine"
    for number, owner in enumerate(("Ann", "Bo", "Ann")):
        picture = f"p{number}.png"
        ok("add", picture, "--text", f"cup {number}", "--set", f"owner={owner}", "--bank", name)
    return name


def listed(ok: Callable[..., str], *arguments: str) -> dict[str, dict[str, Any]]:
    memories = json.loads(ok("list", "--json", *arguments))["memories"]
    return {memory["text"]: memory for memory in memories}


def test_teach_and_ask(ok: Callable[..., str], bank: str, tiny: Path) -> None:
    number = listed(ok, "--bank", bank)["cup 1"]["id"]
    assert ok("add", "p1.png", "--text", "cup 1", "--bank", bank) == f"known already {number}\n"
    ask = ("p1.png", "cup 1", "--bank", bank, "--bank", "default", "--json")
    answer = json.loads(ok(*ask, main=cli.main))
    first = answer["memories"][0]
    assert (first["id"], first["bank"], first["text"]) == (number, "mine", "cup 1")
    answer = json.loads(ok(*ask, "--where", "owner=Ann", main=cli.main))
    assert {m["text"] for m in answer["memories"]} <= {"cup 0", "cup 2"}
    with TinyAlign.load(tiny, banks=[bank]) as model:
        assert model.retrieve("p1.png", "cup 1")[0].id == number


def test_look(ok: Callable[..., str], bank: str, place: Path) -> None:
    memories = listed(ok, "--bank", bank)
    assert set(memories) == {"cup 0", "cup 1", "cup 2"}
    assert set(listed(ok, "--bank", bank, "--where", "owner=Ann")) == {"cup 0", "cup 2"}
    number = str(memories["cup 2"]["id"])
    shown = json.loads(ok("show", number, "--bank", bank, "--json"))
    assert (shown["source"], shown["metadata"]) == ("p2.png", {"owner": "Ann"})
    ok("show", number, "--bank", bank, "--thumbnail", "t.webp")
    assert (place / "t.webp").read_bytes()[8:12] == b"WEBP"
    found = json.loads(ok("search", "p2.png", "--bank", bank, "--json", "--top-k", "2"))["memories"]
    assert found[0]["text"] == "cup 2" and len(found) == 2
    stats = json.loads(ok("stats", "--bank", bank, "--json"))
    assert (stats["memories"], stats["thumbnails"], stats["name"]) == (3, 3, "mine")
    assert "memories       3" in ok("stats", "--bank", bank)
    assert "is sound: 3 memories" in ok("verify", "--bank", bank)


def test_correct(ok: Callable[..., str], bank: str) -> None:
    ids = {text: str(memory["id"]) for text, memory in listed(ok, "--bank", bank).items()}
    out = ok("update", ids["cup 0"], "--set", "room=den", "--unset", "owner", "--bank", bank)
    assert out == f"updated {ids['cup 0']}\n"
    assert ", now " in ok("update", ids["cup 1"], "--text", "mug", "--bank", bank)
    assert ok("remove", ids["cup 2"], "--bank", bank) == "removed 1\n"
    memories = listed(ok, "--bank", bank)
    assert set(memories) == {"cup 0", "mug"}
    assert memories["cup 0"]["metadata"] == {"room": "den"}
    assert (memories["mug"]["source"], memories["mug"]["metadata"]) == ("p1.png", {"owner": "Bo"})
    assert ok("remove", "--where", "room=den", "--bank", bank) == "removed 1\n"
    ok("compact", "--bank", bank)
    assert ok("reindex", "--bank", bank) == "index exact\n"


def test_to_files_and_back(ok: Callable[..., str], bank: str, root: str) -> None:
    assert ok("export", "out", "--bank", bank) == "wrote 3\n"
    assert ok("import", "out", "--bank", "b.db") == "added 3\n"
    assert ok("import", "out", "--bank", f"{root}/copy") == "added 3\n"
    assert ok("merge", "b.db", bank) == f"{bank}: added 0, known already 3\n"
    lines = ok("merge", f"{root}/all", "b.db", "default", f"{root}/copy").splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "added 3, known already 0",
        "added 3, known already 0",
        "added 0, known already 3",
    ]
    with open_bank(bank) as first, open_bank(f"{root}/all") as every, Bank.open("b.db") as file:
        pairs = [{row: small for _, row, small in one.rows()} for one in (first, file, every)]
    assert pairs[0] == pairs[1] and pairs[0].items() <= pairs[2].items() and len(pairs[2]) == 6


def test_bad_input(run: Callable[..., Any], bank: str, root: str, tiny: Path) -> None:
    create_bank(f"{root}/foreign", "0f" * 32, 16, tiny_model.LATENT).close()
    with TinyAlign.load(tiny, banks=[]) as model:
        bank_for(model, f"{root}/empty").close()
    cases = [
        (("add", "p3.png", "--text", "x", "--bank", f"{root}/foreign"), "made for another model"),
        (("add", "none.png", "--text", "x", "--bank", bank), "no picture at none.png"),
        (("add", "p3.png", "--text", "", "--bank", bank), "the text is empty"),
        (("add", "p3.png", "--text", "x", "--bank", "qdrant://x"), "is no address of a bank"),
        (("list", "--bank", f"{root}/none"), "none does not exist"),
        (("show", "9", "--bank", bank), "has no memory 9"),
        (("remove", "9", "--bank", bank), "has no memory 9"),
        (("search", "p0.png", "--bank", f"{root}/foreign"), "made for another model"),
        (("merge", bank, f"{root}/foreign"), "made for another model"),
        (("merge", bank, bank), "into itself"),
        (("import", ".", "--bank", bank), "no exported bank"),
        (("compact", "--seal", "--bank", bank), "cannot be sealed"),
        (("calibrate", "--bank", f"{root}/empty"), "has 0 memories"),
    ]
    for arguments, message in cases:
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (arguments, err)
        assert message in err, (arguments, err)
    code, out, err = run("p0.png", "What?", "--bank", f"{root}/foreign", main=cli.main)
    assert (code, out, err.count("\n")) == (2, "", 1) and "made for another model" in err
    code, out, err = run("list", "--json", "--bank", bank)
    assert len(json.loads(out)["memories"]) == 3


def test_nobody_answers(run: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        name = f"qdrant://127.0.0.1:{closed.getsockname()[1]}/b"
    for arguments, main in (
        (("list", "--bank", name), bank_cli.main),
        (("add", "p0.png", "--text", "cup", "--bank", name), bank_cli.main),
        (("p0.png", "What is this?", "--bank", name), cli.main),
    ):
        code, out, err = run(*arguments, main=main)
        assert (code, out, err.count("\n")) == (2, "", 1), (arguments, err)
        assert "no Qdrant server answers" in err and name in err


def test_without_the_client(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("tinyalign.bank.qdrant"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    code, out, err = run("list", "--bank", "qdrant://host/b")
    assert (code, out, err.count("\n")) == (2, "", 1) and "pip install 'tinyalign[qdrant]'" in err
