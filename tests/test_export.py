"""From torch parts to a model directory that answers with the very same tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import PROMPT, language_model, picture, tokenizer

from tinyalign.bank import Bank
from tinyalign.export import cli, model_dir
from tinyalign.export.precisions import FLOATS
from tinyalign.export.quality import Check, TorchSide
from tinyalign.export.report import measure
from tinyalign.export.target import check_target, exchange, replacing
from tinyalign.runtime import InputError, TinyAlign
from tinyalign.runtime.keys import KeyArrays
from tinyalign.runtime.manifest import MANIFEST_NAME, MemoryMode, read_manifest
from tinyalign.training.answer import answer
from tinyalign.training.modules import (
    Compressor,
    Connector,
    ConnectorShape,
    MemoryShape,
    RagConnector,
    SoftVocabulary,
)
from tinyalign.training.parts import Parts
from tinyalign.training.vision import VisionEncoder

D, DV = 32, 1280
TEXTS = ("a cup. b.", "bc", "œ is here")


def tiny_parts() -> Parts:
    """Random parts around the real encoder's shape and a tiny language model."""
    torch.manual_seed(1)
    words = tokenizer()
    lm = language_model(words.get_vocab_size())
    embeddings = lm.get_input_embeddings().weight.detach()
    ids = torch.arange(5, 205)
    vocabulary = SoftVocabulary(embeddings[ids], ids)
    shape = ConnectorShape(10, DV, D, hidden=48, cell_width=8, name_slots=2, attribute_slots=1)
    vision = VisionEncoder()
    names = torch.randint(0, len(ids), (1000, shape.name_slots))
    linear = vision.classifier
    connector = Connector(shape, vocabulary, linear.weight, linear.bias, names)
    memory = MemoryShape(D, DV, latent_width=16, chunks=4, max_text_tokens=16, hidden=8)
    compressor = Compressor(memory)
    rag_connector = RagConnector(memory, vocabulary, radius=1.0)
    rng = np.random.default_rng(0)
    sizes = ((DV,), (DV, 12), (D,), (D, 4))
    arrays = [rng.normal(size=size).astype(np.float32) for size in sizes]
    floors = (("same", 0.9), ("close", -1.0))
    prompt = dataclasses.replace(
        PROMPT, similarity=floors, copy_bonus=(0.5, 1.0, 4.0), unknown_margin=2.0
    )
    for module in (vision, connector, compressor, rag_connector, lm):
        module.eval().requires_grad_(False)
    return Parts(
        vision, lm, words, connector, compressor, rag_connector, prompt, ids, names,
        KeyArrays(*arrays, alpha=0.2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> Parts:
    return tiny_parts()


@pytest.fixture(scope="module")
def model_path(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in fp32 whose bank holds three memories."""
    target = tmp_path_factory.mktemp("export") / "model"
    said: list[str] = []
    with replacing(target) as draft:
        pictures = [picture(1), picture(2)]
        model_dir.write_components(parts, draft, FLOATS, pictures, said.append)
        model_dir.write_bank(parts, draft / "none", draft / model_dir.BANK_NAME)
        manifest = model_dir.write_manifest(parts, draft, FLOATS, {"a": 1})
        with TinyAlign.load(draft, banks=[]) as model:
            memories = [model.memory(picture(i), text) for i, text in enumerate(TEXTS)]
        with Bank.open(draft / model_dir.BANK_NAME, manifest.fingerprint) as bank:
            bank.add(memories)
            bank.seal()
        model_dir.write_manifest(parts, draft, FLOATS, {"a": 1})
    assert said[-1] == "lm (fp32)"
    return target


@pytest.mark.parametrize("mode", ["latent", "text", "both"])
def test_the_same_greedy_tokens(parts: Parts, model_path: Path, mode: MemoryMode) -> None:
    questions = ("What?", "How many are there, and where?", "é")
    with TinyAlign.load(model_path) as model:
        for seed, question in enumerate(questions):
            for banks in (model.banks, ()):
                told = model.ask(
                    picture(seed),
                    question,
                    memory=bool(banks),
                    memory_mode=mode,
                    max_tokens=32,
                )
                expected = answer(parts, banks, picture(seed), question, 32, mode)
                assert told.token_ids == expected.ids
                assert told.text == expected.text
                assert told.prompt_tokens == expected.rows.shape[1]
                assert [hit.id for hit in told.memories] == [hit.id for hit in expected.hits]
                assert len(told.memories) == (2 if banks else 0)


def test_the_directory_is_whole(model_path: Path) -> None:
    manifest = read_manifest(model_path)
    assert {path.name for path in model_path.iterdir()} == {
        *(entry.path for entry in manifest.files),
        MANIFEST_NAME,
    }
    assert manifest.quality == {"a": 1}
    assert manifest.precisions == dict.fromkeys(dataclasses.asdict(FLOATS), "fp32")
    assert any("SmolLM2" in licence.part for licence in manifest.licences)


def test_the_report(parts: Parts, model_path: Path) -> None:
    checks = [Check(picture(1), "What?"), Check(picture(2), "How many?", "latent")]
    with Bank.open(model_path / model_dir.BANK_NAME, read_only=True) as bank:
        side = TorchSide(parts, [bank])
        report = measure(side, model_path, FLOATS, checks, lambda _: None)
    assert report.answers.equal == report.answers.prompts == 2
    assert report.answers.same_choice == report.answers.tokens
    assert all(line.max_difference <= 1e-4 for line in report.components)
    assert all(line.cosine > 0.99999 for line in report.components)
    lines = report.to_table().splitlines()
    assert len(lines) == 1 + 4 + 2 + 1
    json.dumps(report.to_dict())


def test_a_bank_of_other_weights(parts: Parts, tmp_path: Path) -> None:
    with Bank.create(tmp_path / "bank.sqlite", "ab" * 32, 16, 16):
        pass
    with pytest.raises(InputError, match="another model"):
        model_dir.write_bank(parts, tmp_path / "bank.sqlite", tmp_path / "copy.sqlite")


def model_like(path: Path, content: str) -> Path:
    path.mkdir()
    (path / MANIFEST_NAME).write_text(content)
    return path


def test_replacing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    for content in ("one", "two"):
        with replacing(target) as draft:
            assert draft.parent == target.parent
            (draft / MANIFEST_NAME).write_text(content)
        assert (target / MANIFEST_NAME).read_text() == content
        assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, InputError])
def test_a_failure_leaves_the_old_model(tmp_path: Path, error: type[BaseException]) -> None:
    target = model_like(tmp_path / "model", "old")
    with pytest.raises(error), replacing(target) as draft:
        (draft / MANIFEST_NAME).write_text("new")
        raise error
    assert (target / MANIFEST_NAME).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_the_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyalign.export.target.exchange", lambda one, other: False)
    target = model_like(tmp_path / "model", "old")
    with replacing(target) as draft:
        (draft / MANIFEST_NAME).write_text("new")
    assert (target / MANIFEST_NAME).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's system call")
def test_exchange(tmp_path: Path) -> None:
    one, other = model_like(tmp_path / "one", "1"), model_like(tmp_path / "other", "2")
    assert exchange(one, other)
    assert (one / MANIFEST_NAME).read_text() == "2"
    assert (other / MANIFEST_NAME).read_text() == "1"
    with pytest.raises(OSError, match="missing"):
        exchange(one, tmp_path / "missing")


WRITER = """
import sys
from pathlib import Path
from tinyalign.export.target import replacing
for number in range(10**9):
    with replacing(Path(sys.argv[1])) as draft:
        for name in ("tinyalign.json", "a", "b"):
            (draft / name).write_text(str(number) * 1000)
    print(number, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a moment without a model")
def test_killed_at_any_time(tmp_path: Path) -> None:
    """Old or new, never a mix; what the killed one left is gone after the next export."""
    target = tmp_path / "model"
    for delay in np.linspace(0.0, 0.02, 6):
        command = [sys.executable, "-c", WRITER, str(target)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        contents = {path.read_text() for path in target.iterdir()}
        assert len(contents) == 1
        assert len(list(target.iterdir())) == 3
    with replacing(target) as draft:
        (draft / MANIFEST_NAME).write_text("last")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_targets_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_target(tmp_path / "new", force=False)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", force=False)
    check_target(model_like(tmp_path / "model", "{}"), force=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="--force"):
        check_target(tmp_path / "other", force=False)
    check_target(tmp_path / "other", force=True)
    with pytest.raises(InputError, match="is a file"):
        check_target(tmp_path / "other" / "letter.txt", force=True)
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(InputError, match="working directory"):
        check_target(tmp_path, force=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lm-precision", "int3"],
        ["--vision-precision", "int4"],
        ["--unknown"],
        ["--out"],
        ["--weights", "no-such-directory"],
        ["--out", "picture.png"],
        ["--out", "full"],
    ],
)
def test_bad_arguments(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYALIGN_MODEL", str(tmp_path / "never"))
    Image.new("RGB", (4, 4)).save("picture.png")
    Path("full").mkdir()
    Path("full/letter.txt").write_text("dear")
    before = sorted(os.walk("."))
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = int(str(end.code))
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("tinyalign-export: ")
    assert sorted(os.walk(".")) == before


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "export", interrupt)
    assert cli.main([]) == 130


def test_help_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import tinyalign.export.cli as c; c.main(['-h'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--lm-precision" in done.stdout
