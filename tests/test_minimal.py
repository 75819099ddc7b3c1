"""Graphs for small devices: ORT format, the operators they need, and which CPUs have kernels."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import tiny_encoders
from test_export import tiny_parts
from tiny_model import language_model, picture, tokenizer

from tinyalign.export import cli, minimal, model_dir
from tinyalign.export.components import export_component
from tinyalign.export.lm import export_lm, write_embeddings
from tinyalign.export.minimal import OPERATORS_NAME, required_operators, write_minimal, write_ort
from tinyalign.runtime import ModelError, TinyAlign, TinyAlignError
from tinyalign.runtime.files import file_entry
from tinyalign.runtime.manifest import MANIFEST_NAME, read_manifest
from tinyalign.runtime.providers import RECORD_PLACEMENT, placement_lines
from tinyalign.training.models.encoders import load_encoder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from families import CONTEXT, FAMILIES, Family
from families import tiny_model as tiny_language_model

# Operators of onnxruntime's CPU provider whose kernels are compiled for every processor, x86-64 and
# ARM64 alike (OperatorKernels.md of onnxruntime). A graph with another one is not exported by
# accident: look where its kernel is, then add it.
EVERY_CPU = {
    "": """Abs Add ArgMax AveragePool Cast Clip Concat Conv DequantizeLinear Div Exp Expand Gather
    GatherND Gelu Gemm Greater LayerNormalization MatMul Mul QLinearConv QuantizeLinear
    RMSNormalization Range ReduceL2 ReduceMax ReduceMean ReduceSum Relu Reshape Shape
    Sigmoid Slice Softmax Split Squeeze Sub Tanh Transpose Unsqueeze""".split(),
    "com.microsoft": """BiasGelu FastGelu FusedConv FusedMatMul GroupQueryAttention MatMulNBits
    QLinearAdd QLinearAveragePool QLinearConcat QuickGelu SkipLayerNormalization
    SkipSimplifiedLayerNormalization""".split(),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real components around a tiny language model, the vision encoder in 8 bits as well."""
    folder = tmp_path_factory.mktemp("exported")
    pictures = [picture(1), picture(2)]
    parts, precisions = tiny_parts(), model_dir.Precisions()
    model_dir.write_components(parts, folder, precisions, pictures, lambda _: None)
    example = model_dir.examples(parts, pictures)["vision"]
    export_component("vision", parts.vision, folder / "vision_int8.onnx", example, "int8")
    return folder


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its graphs in ORT format."""
    folder = tmp_path_factory.mktemp("minimal") / "tiny"
    shutil.copytree(tiny, folder)
    write_minimal(folder, lambda _: None)
    write_manifest(folder)
    return folder


def write_manifest(folder: Path) -> None:
    manifest = read_manifest(folder)
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST_NAME)
    files = tuple(file_entry(folder, name) for name in names)
    (folder / MANIFEST_NAME).write_text(dataclasses.replace(manifest, files=files).to_json())


def operators(path: Path) -> set[tuple[str, str]]:
    """Domain and type of all operators of an ONNX graph."""
    graph = onnx.load(path, load_external_data=False).graph
    return {("" if node.domain == "ai.onnx" else node.domain, node.op_type) for node in graph.node}


def listed(lines: str) -> set[tuple[str, str]]:
    """Domain and type of all operators of a list for a build of onnxruntime."""
    found: set[tuple[str, str]] = set()
    for line in lines.splitlines():
        domain, opset, kinds = line.split(";")
        assert int(opset) > 0
        found |= {("" if domain == "ai.onnx" else domain, kind) for kind in kinds.split(",")}
    return found


def unknown(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those that are not in the list above."""
    return found - {(domain, kind) for domain, kinds in EVERY_CPU.items() for kind in kinds}


def test_every_cpu_has_kernels_for_the_graphs(exported: Path) -> None:
    graphs = list(exported.glob("*.onnx"))
    assert len(graphs) == 6
    for graph in graphs:
        assert unknown(operators(graph)) == set(), graph


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_every_cpu_has_kernels_for_other_precisions(precision: str, tmp_path: Path) -> None:
    lm = language_model(tokenizer().get_vocab_size())
    write_embeddings(lm, tmp_path / "embeddings.bin")
    export_lm(lm, tmp_path / "lm.onnx", precision)
    assert unknown(operators(tmp_path / "lm.onnx")) == set()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_cpu_has_kernels_for_other_language_models(family: Family, tmp_path: Path) -> None:
    export_lm(tiny_language_model(family), tmp_path / "lm.onnx", "int8", CONTEXT)
    assert unknown(operators(tmp_path / "lm.onnx")) == set()


@pytest.mark.parametrize("family", ["clip", "dinov2_with_registers"])
def test_every_cpu_has_kernels_for_other_encoders(family: str, tmp_path: Path) -> None:
    module = load_encoder(tiny_encoders.families()[family].save(tmp_path / family)).module
    graph, example = tmp_path / "vision.onnx", (tiny_encoders.pixels(2),)
    export_component("vision", module, graph, example, "int8")
    assert unknown(operators(graph)) == set()


def test_the_installed_onnxruntime_has_these_kernels() -> None:
    state = pytest.importorskip("onnxruntime.capi._pybind_state")
    kernels = {
        (kernel.domain, kernel.op_name)
        for kernel in state.get_all_opkernel_def()
        if kernel.provider == "CPUExecutionProvider"
    }
    assert {(domain, kind) for domain, kinds in EVERY_CPU.items() for kind in kinds} <= kernels


def test_ort_format_of_the_real_components(exported: Path, tmp_path: Path) -> None:
    """Weights in files of their own and onnxruntime's own operators go over into one file."""
    models = []
    for graph in exported.glob("*.onnx"):
        models.append(tmp_path / f"{graph.stem}.ort")
        write_ort(graph, models[-1])
        session, onnx_session = ort.InferenceSession(models[-1]), ort.InferenceSession(graph)
        for mine, theirs in zip(session.get_inputs(), onnx_session.get_inputs(), strict=True):
            assert (mine.name, mine.type, mine.shape) == (theirs.name, theirs.type, theirs.shape)
    assert unknown(listed(required_operators(models))) == set()
    assert ("com.microsoft", "MatMulNBits") in listed(required_operators(models))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".ort"] * 6


def test_a_minimal_model_answers_the_same(tiny: Path, small: Path) -> None:
    assert not list(small.glob("*.onnx*"))
    assert listed((small / OPERATORS_NAME).read_text()) >= {
        ("com.microsoft", "GroupQueryAttention")
    }
    with TinyAlign.load(tiny) as whole, TinyAlign.load(small) as model:
        for seed, question in enumerate(("What?", "How many are there?")):
            expected = whole.ask(picture(seed), question, max_tokens=24)
            told = model.ask(picture(seed), question, max_tokens=24)
            assert told.token_ids == expected.token_ids
            assert [hit.id for hit in told.memories] == [hit.id for hit in expected.memories]
        assert model.memory(picture(9), "a dog").text == "a dog"  # the compressor too


def test_nothing_is_told_of_ort_format_on_other_providers(small: Path) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry(RECORD_PLACEMENT, "1")
    session = ort.InferenceSession(small / "connector.ort", options)
    (line,) = placement_lines({"connector": session}, "cuda")
    assert "0 of" not in line


def test_a_graph_must_be_there_in_one_format(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    (folder / "vision.ort").unlink()
    write_manifest(folder)
    with pytest.raises(ModelError, match=r"does not list vision\.onnx"):
        TinyAlign.load(folder)


def test_a_damaged_graph(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    (folder / "lm.ort").write_bytes(b"no flatbuffer" * 9)
    write_manifest(folder)
    with pytest.raises(ModelError, match=r"lm\.ort cannot be loaded"):
        TinyAlign.load(folder)


def test_too_large(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimal, "LARGEST", 1000)
    with pytest.raises(TinyAlignError, match="too large for ORT format"):
        write_ort(exported / "vision.onnx", tmp_path / "vision.ort")
    assert not list(tmp_path.iterdir())


def test_the_flag() -> None:
    assert cli.parser().parse_args(["--minimal"]).minimal
    assert not cli.parser().parse_args([]).minimal
