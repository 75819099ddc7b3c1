"""Quantization one can trust: what is measured, what is refused, what is recommended."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_export import tiny_parts
from tiny_model import picture
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tinyalign.bank import Bank
from tinyalign.export import cli, model_dir, quality, trials
from tinyalign.export.components import SIGNATURES, export_component
from tinyalign.export.half import halve
from tinyalign.export.lm import export_lm, write_embeddings
from tinyalign.export.precisions import FLOATS, Precisions
from tinyalign.export.quality import AnswerReport, Check, TorchSide, ask_all, compare_answers
from tinyalign.export.size import component_bytes, model_bytes
from tinyalign.export.task import is_right, read_tasks
from tinyalign.export.trials import Trial, recommend
from tinyalign.runtime import InputError, TinyAlign
from tinyalign.runtime.lm import LanguageModel
from tinyalign.runtime.loading import open_session
from tinyalign.runtime.manifest import MANIFEST_NAME, read_manifest
from tinyalign.training.answer import answer
from tinyalign.training.parts import Parts

TESTS = Path(__file__).parent
TEXTS = ("a cup. b.", "bc", "œ is here")


class SmallVision(nn.Module):
    """Convolutions in place of the real encoder: quick to export, and just as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 5, 4)
        self.second = nn.Conv2d(32, 32, 3, 2)
        self.wide = nn.Conv2d(32, 1280, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, 260, 260] -> cells [B, 10, 1280]."""
        x = torch.relu(self.second(torch.relu(self.first(pixels))))  # [B, 32, 31, 31]
        grid = self.wide(nn.functional.avg_pool2d(x, 10)).flatten(2).transpose(1, 2)
        return torch.cat([grid.mean(1, keepdim=True), grid], 1)


def small_parts() -> Parts:
    """Random parts that are exported in a few seconds."""
    parts = tiny_parts()
    parts.vision = SmallVision().eval().requires_grad_(False)  # type: ignore[assignment]
    return parts


@pytest.fixture(scope="module")
def parts() -> Parts:
    return small_parts()


@pytest.fixture(scope="module")
def exported(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All in fp32, with a bank of three memories."""
    folder = tmp_path_factory.mktemp("quality") / "model"
    folder.mkdir()
    pictures = [picture(1), picture(2)]
    model_dir.write_components(parts, folder, FLOATS, pictures, lambda _: None)
    model_dir.write_bank(parts, folder / "none", folder / model_dir.BANK_NAME)
    manifest = model_dir.write_manifest(parts, folder, FLOATS, {})
    with TinyAlign.load(folder, banks=[]) as model:
        memories = [model.memory(picture(i), text) for i, text in enumerate(TEXTS)]
    with Bank.open(folder / model_dir.BANK_NAME, manifest.fingerprint) as bank:
        bank.add(memories)
        bank.seal()
    model_dir.write_manifest(parts, folder, FLOATS, {})
    return folder


@pytest.fixture(scope="module")
def checks() -> list[Check]:
    asked = zip(range(6), 3 * ("What?", "How many are there?"), strict=True)
    ways = (None, True), ("latent", True), (None, False)
    return [Check(picture(i), q, *ways[i % 3]) for i, q in asked]


def blurred(parts: Parts, amount: float) -> Parts:
    """The same with noise on the language model's weights."""
    torch.manual_seed(0)
    lm = tiny_parts().lm
    with torch.no_grad():
        for layer in lm.model.layers:
            for weight in layer.mlp.parameters():
                weight.add_(amount * weight.std() * torch.randn_like(weight))
    return dataclasses.replace(parts, lm=lm)


def swapped_lm(exported: Path, parts: Parts, folder: Path) -> Path:
    """A copy of a model directory with another language model in it."""
    shutil.copytree(exported, folder)
    export_lm(parts.lm, folder / "lm.onnx", "fp32", 2048)
    model_dir.write_manifest(parts, folder, FLOATS, {})
    return folder


# ---- agreement


def test_a_model_in_fp32_agrees(parts: Parts, exported: Path, checks: list[Check]) -> None:
    with TinyAlign.load(exported) as model:
        found = compare_answers(TorchSide(parts, model.banks), checks, ask_all(model, checks))
    assert (found.prompts, found.equal, found.share) == (6, 6, 1.0)
    assert found.tokens > 6
    assert not found.below_floor


def test_the_count_is_that_of_torchs_own_answers(
    parts: Parts, exported: Path, checks: list[Check], tmp_path: Path
) -> None:
    other = swapped_lm(exported, blurred(parts, 0.15), tmp_path / "other")
    with TinyAlign.load(other) as model:
        told = ask_all(model, checks)
        side = TorchSide(parts, model.banks)
        found = compare_answers(side, checks, told)
        expected = [
            answer(
                parts, model.banks if c.memory else (), c.picture, c.question, quality.LIMIT, c.mode
            )
            for c in checks
        ]
    pairs = [(e.ids, t.token_ids) for e, t in zip(expected, told, strict=True)]
    assert found.equal == sum(a == b for a, b in pairs)
    assert found.equal < 6
    assert 0 < found.same_choice < found.tokens
    assert len(side.prompts) == 6


def test_text_quality(parts: Parts, exported: Path, tmp_path: Path) -> None:
    windows = [list(range(1, 60)), list(range(90, 120))]
    reference = quality.torch_logits(parts, windows)
    other = swapped_lm(exported, blurred(parts, 0.3), tmp_path / "other")
    found = []
    for folder in (exported, other):
        with TinyAlign.load(folder) as model:
            table = model.parts.embeddings
            found.append(quality.text_quality(model.parts.lm, table, windows, reference))
    assert abs(found[0].kl) < 1e-5
    assert found[0].cosine > 0.9999
    assert found[0].max_difference < 1e-4
    with torch.inference_mode():
        losses = [
            nn.functional.cross_entropy(torch.from_numpy(r[:-1]), torch.tensor(w[1:])).item()
            for r, w in zip(reference, windows, strict=True)
        ]
    mean = (58 * losses[0] + 29 * losses[1]) / 87
    assert found[0].perplexity == pytest.approx(np.exp(mean), rel=1e-3)
    assert found[1].kl > 0.001
    assert found[1].cosine < found[0].cosine


def test_what_is_asked_about_is_not_calibrated_on(exported: Path, tmp_path: Path) -> None:
    fingerprint = read_manifest(exported).fingerprint
    with TinyAlign.load(exported, banks=[]) as model:
        memories = [model.memory(picture(i), f"thing {i}") for i in range(30)]
    with Bank.create(tmp_path / "bank.sqlite", fingerprint, 16, 16) as bank:
        bank.add(memories)
    asked = quality.check_questions(tmp_path / "bank.sqlite", most=20)
    others = quality.thumbnails(tmp_path / "bank.sqlite", 15, 0.0)
    assert len(asked) == 20
    assert len({(check.question, check.mode, check.memory) for check in asked}) == 15
    shown = [check.picture for check in asked if isinstance(check.picture, bytes)]
    assert len(shown) >= 12
    assert len(others) == 15
    assert not set(quality.thumbnails(tmp_path / "bank.sqlite", 15, 0.5)) & set(others)
    assert len(quality.calibration_pictures(tmp_path / "none")) >= 2


# ---- fp16


@pytest.mark.parametrize("name", ["vision", "connector", "compressor", "rag_connector"])
def test_fp16_is_half_as_large_and_close(
    parts: Parts, exported: Path, tmp_path: Path, name: str
) -> None:
    example = model_dir.examples(parts, [picture(1), picture(2)])[name]
    path = tmp_path / f"{name}.onnx"
    export_component(name, getattr(parts, name), path, example, "fp16")
    values = dict(zip(SIGNATURES[name].inputs, (x.numpy() for x in example), strict=True))
    found, expected = (
        open_session(p, 1).run(SIGNATURES[name].outputs[:1], values)[0]
        for p in (path, exported / path.name)
    )
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 2e-3 * max(1.0, np.abs(expected).max())
    kinds = {t.data_type for t in onnx.load(path).graph.initializer if np.prod(t.dims) >= 4096}
    assert kinds <= {onnx.TensorProto.FLOAT16}


def test_a_language_model_in_fp16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    write_embeddings(model, tmp_path / "embeddings.bin")
    rows, logits, sizes = torch.randn(9, 64).numpy(), [], []
    for precision in ("fp32", "fp16"):
        export_lm(model, tmp_path / "lm.onnx", "fp32", 1024)
        if precision == "fp16":
            halve(tmp_path / "lm.onnx")
        lm = LanguageModel(open_session(tmp_path / "lm.onnx", 1), model_dir.lm_spec(config, 1024))
        logits.append(lm.forward(lm.new_state(9), rows).copy())
        sizes.append((tmp_path / "lm.onnx.data").stat().st_size)
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.01 * np.abs(logits[0]).max()
    assert sizes[1] < 0.8 * sizes[0]  # the rotary tables stay
    assert len(list(tmp_path.iterdir())) == 3


def test_weights_too_large_for_fp16_stay(tmp_path: Path) -> None:
    weight = np.full((64, 64), 1e5, np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [value("x", 1, [1, 64])], [value("y", 1, [1, 64])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 18)]
    path = tmp_path / "large.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    halve(path)
    result = open_session(path, 1).run(None, {"x": np.ones((1, 64), np.float32)})[0]
    assert np.allclose(result, 6.4e6)


# ---- the command line


@pytest.fixture
def quick(parts: Parts, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command exports the small parts, and takes the graphs that are there; its weights."""
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copy(exported / model_dir.BANK_NAME, weights)

    def copy_graphs(parts: Parts, directory: Path, *_: object) -> None:
        for path in exported.iterdir():
            if path.name not in (MANIFEST_NAME, model_dir.BANK_NAME):
                shutil.copy(path, directory)

    monkeypatch.setattr("tinyalign.training.parts.load_parts", lambda _: parts)
    monkeypatch.setattr(model_dir, "write_components", copy_graphs)
    monkeypatch.setattr(trials, "write_components", copy_graphs)
    return weights


def test_below_the_floor(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = AnswerReport(prompts=48, equal=30, tokens=300, same_choice=270)
    monkeypatch.setattr("tinyalign.export.report.compare_answers", lambda *_: lost)
    out = tmp_path / "deep" / "model"
    command = ["--weights", str(quick), "--out", str(out)]
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert "0.900" in last
    assert str(quality.FLOOR) in last
    assert "--accept-quality-loss" in last
    assert list(out.parent.iterdir()) == []

    assert cli.main([*command, "--accept-quality-loss"]) == 0
    assert "0.900" in capsys.readouterr().out
    kept = read_manifest(out).quality
    assert kept["accepted_loss"]["floor"] == quality.FLOOR
    assert kept["answers"]["share"] == kept["accepted_loss"]["share"] == 0.9


def test_too_little_disk(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5)
    monkeypatch.setattr("tinyalign.export.size.shutil.disk_usage", lambda _: usage)
    assert cli.main(["--weights", str(quick), "--out", str(tmp_path / "a" / "b")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "only 0 MB are free" in last
    assert not (tmp_path / "a").exists()


def test_the_estimate(parts: Parts, exported: Path) -> None:
    bank = exported / model_dir.BANK_NAME
    whole = sum(path.stat().st_size for path in exported.iterdir())
    assert 0.8 * whole < model_bytes(parts, FLOATS, bank) < 1.5 * whole
    sizes = [component_bytes(parts, "connector", p) for p in ("fp32", "fp16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)


def test_the_report(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = {"vision": ("fp32", "int8"), "rag_connector": ("fp32", "int8"), "lm": ("fp32", "int8")}
    monkeypatch.setattr(trials, "CHOICES", some)
    picture(0).save(tmp_path / "cup.png")
    lines = [{"image": "cup.png", "question": "What?", "answer": text} for text in ("zz", "y")]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    floats = [f"--{name.replace('_', '-')}-precision=fp32" for name in dataclasses.asdict(FLOATS)]
    folder, out = tmp_path / "report", tmp_path / "model"
    command = ["--weights", str(quick), "--out", str(out), *floats, "--report", str(folder)]
    assert cli.main([*command, "--report-set", str(tmp_path / "set.jsonl")]) == 0
    printed = capsys.readouterr().out
    names = {path.name for path in folder.iterdir()}
    assert trials.REPORT_NAME in names
    assert names <= {trials.REPORT_NAME, trials.PLOT_NAME}
    told = json.loads((folder / trials.REPORT_NAME).read_text())
    tried = [(t["component"], t["precision"]) for t in told["trials"]]
    assert tried == [*((name, p) for name in some for p in some[name]), ("chosen", "")]
    by_name = dict(zip(tried, told["trials"], strict=True))
    for trial in (by_name["lm", "fp32"], by_name["vision", "fp32"], by_name["chosen", ""]):
        assert trial["answers"]["share"] == 1
        assert trial["cosine"] > 0.9999
    assert by_name["vision", "int8"]["size_mb"] < by_name["vision", "fp32"]["size_mb"]
    assert by_name["lm", "int8"]["kl"] > by_name["lm", "fp32"]["kl"]
    assert {"perplexity", "accuracy", "latency"} <= set(by_name["lm", "int8"])
    assert [item["component"] for item in told["recommended"]] == list(some)
    assert all(f"{name:14}{precision:8}" in printed for name, precision in tried)
    assert read_manifest(out).quality["answers"]["share"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report-set", "set.jsonl"], "needs --report"),
        (["--report", "taken"], "is a file"),
        (["--report", "--report-set", "missing.jsonl"], "cannot read"),
        (["--report", "--report-set", "set.jsonl"], "line 1"),
    ],
)
def test_bad_arguments_of_the_report(
    arguments: list[str],
    message: str,
    quick: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("")
    Path("set.jsonl").write_text('{"image": "none.png", "question": "What?", "answer": "a"}\n')
    before = sorted(os.walk("."))
    assert cli.main(["--weights", "weights", "--out", "model", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(os.walk(".")) == before


KILLED = """
import sys
from test_quality import small_parts
from tinyalign.export import cli
import tinyalign.training.parts
tinyalign.training.parts.load_parts = lambda _: small_parts()
sys.exit(cli.main(["--weights", sys.argv[1], "--out", sys.argv[2]]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_it_writes(tmp_path: Path, number: int) -> None:
    """The old model stays; what an interrupted export wrote is gone, of a killed one aside."""
    weights, target = tmp_path / "weights", tmp_path / "models" / "model"
    weights.mkdir()
    target.mkdir(parents=True)
    (target / MANIFEST_NAME).write_text("old")
    command = [sys.executable, "-c", KILLED, str(weights), str(target)]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as process:
        while process.poll() is None and not list(target.parent.glob(".*.partial/*")):
            time.sleep(0.01)
        process.send_signal(number)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert [path.name for path in target.iterdir()] == [MANIFEST_NAME]
    assert (target / MANIFEST_NAME).read_text() == "old"
    left = [path.name for path in target.parent.iterdir() if path != target]
    assert len(left) == (1 if number == signal.SIGKILL else 0)
    assert all(name.startswith(".model.") and name.endswith(".partial") for name in left)


# ---- tasks and recommendations


@pytest.mark.parametrize(
    ("expected", "told", "right"),
    [
        ("Egyptian cat", "This is an egyptian cat.", True),
        ("cat", "These are cats.", False),
        ("yes", "Yes, it is.", True),
        ("no", "There is no cat.", False),
        ("3", "There are three.", True),
        ("three", "3 pears", True),
        ("KX-204", "It is part KX-204.", True),
    ],
)
def test_right_answers(expected: str, told: str, right: bool) -> None:
    assert is_right(expected, told) == right


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no questions"),
        ("[1]", "line 1"),
        ('{"image": "a.png", "question": "What?"}', "line 1"),
        ('\n{"image": "a.png", "question": " ", "answer": "a"}', "line 2"),
    ],
)
def test_sets_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "set.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_tasks(tmp_path / "set.jsonl")


def trial(precision: str, size: float, share: float, cosine: float, kl: float | None) -> Trial:
    answers = AnswerReport(48, 0, 1000, int(1000 * share))
    return Trial("lm" if kl is not None else "vision", precision, size, 1.0, cosine,
                 kl=kl, answers=answers)  # fmt: skip


@pytest.mark.parametrize(
    ("tried", "expected", "reason"),
    [
        ((("fp32", 4, 1, 1, 0), ("int8", 1, 1, 0.9, 0.006)), "int8", "1.0 of 4.0 MB"),
        ((("fp32", 4, 1, 1, 0), ("int8", 1, 1, 0.9, 0.3)), "fp32", "int8 has KL 0.300"),
        ((("fp32", 4, 1, 1, 0), ("int8", 1, 0.9, 1, 0)), "fp32", "int8 has same 0.900"),
        (
            (("fp32", 4, 1, 1, None), ("int8", 1, 1, 0.995, None), ("fp16", 2, 1, 1, None)),
            "fp16",
            "int8 has cosine 0.9950",
        ),
        ((("fp32", 4, 0.5, 1, 0),), "fp32", "none is within"),
    ],
)
def test_recommendations(tried: Sequence[tuple[str, float]], expected: str, reason: str) -> None:
    rows = [trial(*row) for row in tried]
    found = recommend(rows[0].component, rows)
    assert found.precision == expected
    assert reason in found.reason


def test_a_floor_between_what_is_near_lossless_and_what_is_not() -> None:
    assert not AnswerReport(48, 47, 320, 317).below_floor
    assert AnswerReport(48, 30, 320, 294).below_floor
    assert Precisions().of("lm") == "int8"
