"""``tinyalign-infer`` as a person runs it: a process, its output, its exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_model
from test_images import encoded, png_header

from tinyalign.bank import Bank
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.manifest import MANIFEST_NAME

COMMAND = Path(sys.executable).with_name("tinyalign-infer")
BLOCK = """
import socket, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "optimum", "onnx", "torchvision"}:
            raise ImportError(f"{name} is blocked")

def no_network(*args, **kwargs):
    raise RuntimeError("the network was touched")

sys.meta_path.insert(0, Blocked())
socket.socket.__init__ = socket.getaddrinfo = socket.create_connection = no_network
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, good and bad, and modules that block torch and the network."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "block").mkdir()
    (folder / "block" / "sitecustomize.py").write_text(BLOCK)
    data = encoded(tiny_model.picture(0), "PNG")
    for name, content in {
        "good.png": data,
        "empty.png": b"",
        "cut.png": data[: len(data) // 2],
        "text.txt": b"not a picture at all\n" * 20,
        "bomb.png": png_header(30000, 30000),
        "zero.png": png_header(0, 7),
        "new\nline.png": b"",
    }.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    return folder


@pytest.fixture(scope="module")
def run(place: Path, tiny: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run the command in ``place`` on the tiny model, torch and the network blocked."""

    def call(*arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
        defaults = {} if "input" in options else {"stdin": subprocess.DEVNULL}
        defaults |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.run(
            [COMMAND, *arguments],
            cwd=place,
            env=environment(place, tiny),
            timeout=60,
            **defaults | options,
        )

    return call


def environment(place: Path, model: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(place / "block"),
        "TINYALIGN_MODEL": str(model),
        "TINYALIGN_CACHE": str(place / "cache"),
        "LC_ALL": "C.UTF-8",
    }


def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.lstat().st_mtime_ns) for p in folder.rglob("*") if p.is_file())


# ---- what works --------------------------------------------


def test_the_answer_is_that_of_the_library(run: Callable, place: Path, tiny: Path) -> None:
    with TinyAlign.load(tiny) as model:
        expected = model.ask(place / "good.png", "what?", max_tokens=30)
        bare = model.ask(place / "good.png", "what?", memory=False, max_tokens=30).text
    done = run("good.png", "what?", "--max-tokens", "30")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == expected.text + "\n"
    assert run("good.png", "what?", "--max-tokens=30", "--no-memory").stdout.decode() == bare + "\n"

    data = (place / "good.png").read_bytes()
    done = run("-", "what?", "--json", "--max-tokens", "30", "--model", str(tiny), input=data)
    result = json.loads(done.stdout)
    assert done.stdout.count(b"\n") == 1
    assert result["answer"] == expected.text
    assert [m["id"] for m in result["memories"]] == [hit.id for hit in expected.memories]
    assert set(result["memories"][0]) == {"id", "score", "text", "bank"}
    times = result["timings"]
    names = {"load", "encode", "retrieve", "prefill", "decode", "first_token", "tokens"}
    assert set(times) == names
    assert times["tokens"] == expected.tokens
    assert isinstance(times["tokens"], int)
    assert min(times.values()) > 0


def test_options(run: Callable, place: Path, tiny: Path) -> None:
    path = place / "cup.sqlite"
    with TinyAlign.load(tiny) as model:
        new = model.memory(tiny_model.picture(0), "my cup", metadata={"room": "den", "size": 5})
    with Bank.create(path, tiny_model.FINGERPRINT, 16, tiny_model.LATENT) as bank:
        bank.add([new])
    both = ("--bank", "cup.sqlite", "--bank", "default", "--json")

    def cited(*options: str) -> set[tuple[str, str]]:
        done = run("good.png", "my cup", *options)
        assert done.returncode == 0, done.stderr
        return {(m["bank"], m["text"]) for m in json.loads(done.stdout)["memories"]}

    mine = {("cup", "my cup")}
    assert cited("--bank", "cup.sqlite", "--json") == mine
    assert cited(*both, "--top-k", "1") == mine
    assert len(cited(*both, "--top-k", "9")) == 4
    assert cited(*both, "--where", "room=den", "--where", "size=5") == mine
    assert cited(*both, "--where", "room=attic") == set()
    assert cited(*both, "--no-memory") == set()
    for mode in ("latent", "text", "both"):
        with TinyAlign.load(tiny) as model:
            expected = model.ask(place / "good.png", "what?", memory_mode=mode, max_tokens=9).text
        done = run("good.png", "what?", "--memory-mode", mode, "--max-tokens", "9")
        assert done.stdout.decode() == expected + "\n"
    sampled = [
        run("good.png", "?", "--temperature", "3", "--top-p", ".9", "--seed", seed).stdout
        for seed in ("1", "1", "2")
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert run("good.png", "?", "--threads", "1").returncode == 0


def test_help_is_for_newcomers(run: Callable) -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in (b"IMAGE", b"--bank", b"--where", b"examples:", b"exit codes", b"memory"):
        assert word in done.stdout


def test_the_block_really_blocks(place: Path) -> None:
    for code in ("import torch", "import socket; socket.socket()"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(place, place), capture_output=True
        )
        assert done.returncode == 1
        assert b"blocked" in done.stderr or b"touched" in done.stderr


# ---- bad input: one line on stderr, exit code 2, nothing written ----------------------------

GOOD = ("good.png", "what?")
BAD_INPUT = [
    (("nothing.png", "what?"), "no picture at nothing.png"),
    (("empty.png", "what?"), "empty.png is empty"),
    (("cut.png", "what?"), "cut.png is damaged or cut short"),
    (("text.txt", "what?"), "text.txt is not a picture"),
    (("zero.png", "what?"), "zero.png"),
    (("bomb.png", "what?"), "more than 80,000,000"),
    (("folder", "what?"), "folder is a directory"),
    (("new\nline.png", "what?"), "new line.png is empty"),
    (("a\x1b[31m.png", "what?"), r"no picture at a\x1b[31m.png"),
    (("-", "what?"), "standard input is empty"),
    (("good.png", ""), "the question is empty"),
    (("good.png", "  \n"), "the question is empty"),
    (("good.png", "x" * 900), "the question is 900 tokens long"),
    (("good.png",), "required: QUESTION"),
    (("good.png", "a", "b"), "unrecognized arguments: b"),
    ((*GOOD, "--colour"), "unrecognized arguments: --colour"),
    ((*GOOD, "--model", "nowhere"), "no model directory at nowhere"),
    ((*GOOD, "--model", "good.png"), "good.png is not a model directory"),
    ((*GOOD, "--model", "folder"), f"has no {MANIFEST_NAME}"),
    ((*GOOD, "--bank", "nothing.sqlite"), "nothing.sqlite"),
    ((*GOOD, "--bank", "text.txt"), "text.txt"),
    ((*GOOD, "--top-k", "0"), "--top-k must be 1 or more, not 0"),
    ((*GOOD, "--top-k", "-3"), "--top-k must be 1 or more, not -3"),
    ((*GOOD, "--top-k", "two"), "invalid int value: 'two'"),
    ((*GOOD, "--temperature", "-0.5"), "--temperature must be 0 or more, not -0.5"),
    ((*GOOD, "--temperature", "nan"), "--temperature must be 0 or more, not nan"),
    ((*GOOD, "--top-p", "0"), "--top-p must be above 0"),
    ((*GOOD, "--seed", "-1"), "seed must be 0 or more"),
    ((*GOOD, "--max-tokens", "0"), "--max-tokens must be 1 or more"),
    ((*GOOD, "--threads", "0"), "--threads must be 1 or more"),
    ((*GOOD, "--where", "room"), "--where takes KEY=VALUE"),
]


def check_refused(done: subprocess.CompletedProcess[bytes], message: str) -> None:
    error = done.stderr.decode()
    assert done.returncode == 2, error
    assert done.stdout == b""
    assert error.startswith("tinyalign-infer: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert error[:-1].isprintable()
    assert message in error


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input(run: Callable, place: Path, arguments: tuple[str], message: str) -> None:
    before = tree(place)
    check_refused(run(*arguments), message)
    assert tree(place) == before


def test_too_long_a_question_says_how_much_fits(run: Callable, tiny: Path) -> None:
    with TinyAlign.load(tiny) as model:
        prompt = model.ask(tiny_model.picture(0), "x", memory=False).prompt_tokens - 1
    room = tiny_model.CONTEXT - prompt - 16
    check_refused(run("good.png", "x" * 900), f"{room} fit beside the picture")


def test_standard_input_that_cannot_be_read(run: Callable, place: Path, tiny: Path) -> None:
    with (place / "good.png").open("ab") as file:
        check_refused(run("-", "what?", stdin=file), "cannot read standard input")
    closed = subprocess.run(
        ["sh", "-c", 'exec "$0" - what? <&-', str(COMMAND)],
        env=environment(place, tiny),
        capture_output=True,
    )
    check_refused(closed, "standard input")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("lm.onnx.data", lambda p: p.unlink(), "incomplete: lm.onnx.data is missing"),
        ("lm.onnx", lambda p: p.write_bytes(p.read_bytes()[:-9]), "bytes, not"),
        ("vision.onnx", lambda p: p.write_bytes(p.read_bytes()[:-1] + b"!"), "SHA-256"),
        (MANIFEST_NAME, lambda p: p.unlink(), f"has no {MANIFEST_NAME}"),
        (MANIFEST_NAME, lambda p: p.write_text(p.read_text()[:300]), "not valid JSON"),
        (MANIFEST_NAME, lambda p: swap(p, '"format": 4', '"format": 9'), "format 9, newer than 4"),
        (MANIFEST_NAME, lambda p: swap(p, "vision.onnx", "../v"), "leaves the model directory"),
    ],
)
def test_bad_model_directory(
    run: Callable, tiny: Path, tmp_path: Path, name: str, damage: Callable, message: str
) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    damage(model / name)
    before = tree(tmp_path)
    check_refused(run(*GOOD, "--model", str(model)), message)
    assert tree(tmp_path) == before


def swap(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def test_bank_of_another_model(run: Callable, tmp_path: Path) -> None:
    with Bank.create(tmp_path / "other.sqlite", "0f" * 16, 16, 8) as bank:
        bank.seal()
    before = tree(tmp_path)
    check_refused(run(*GOOD, "--bank", str(tmp_path / "other.sqlite")), "another model")
    assert tree(tmp_path) == before


# ---- how it ends --------------------------------------------


def test_ctrl_c_is_quiet(place: Path, tiny: Path) -> None:
    process = subprocess.Popen(
        [COMMAND, "-", "what?"],  # waits for a picture that never comes
        env=environment(place, tiny),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdin.write(bytes(300_000))  # more than a pipe holds: returns once it is being read
    process.stdin.flush()
    time.sleep(0.3)  # and now it waits for the rest
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert (process.stdout.read(), process.stderr.read()) == (b"", b"")


def test_ctrl_c_while_answering(
    place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tinyalign.runtime import cli
    from tinyalign.runtime import model as module

    calls = iter(range(5))

    def pick(*_: object) -> int:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return 65

    monkeypatch.setattr(module, "pick", pick)
    assert cli.main([str(place / "good.png"), "what?", "--model", str(tiny)]) == 130
    captured = capsys.readouterr()
    assert len(captured.out) == 5
    assert captured.err == ""


def test_a_reader_that_leaves(run: Callable) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run(*GOOD, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_failure_that_is_not_the_users_is_1(
    place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tinyalign.runtime import cli
    from tinyalign.runtime import model as module

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "finish_loading", fail)
    assert cli.main([str(place / "good.png"), "what?", "--model", str(tiny)]) == 1
    assert capsys.readouterr().err == "tinyalign-infer: MemoryError\n"


@pytest.mark.parametrize("module", ["tinyalign.runtime.model", "tinyalign.export.cli"])
def test_onnxruntime_is_told_to_send_nothing_before_it_is_imported(module: str) -> None:
    code = (
        "import importlib, os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime':\n"
        "            print(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"importlib.import_module({module!r})\n"
        "importlib.import_module('onnxruntime')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.stdout.split() == ["1"], done.stderr
