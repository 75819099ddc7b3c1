"""The graph of each small part computes what its torch module computes, for any number of rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyalign.export.components import SIGNATURES, export_component
from tinyalign.export.graph import Precision
from tinyalign.training.modules import (
    Compressor,
    Connector,
    ConnectorShape,
    MemoryShape,
    RagConnector,
    SoftVocabulary,
)
from tinyalign.training.vision import VisionEncoder

WORDS, WIDTH, DV = 700, 64, 96


@dataclass(frozen=True)
class Case:
    """A part and inputs for three."""

    module: nn.Module
    inputs: tuple[Tensor, ...]


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    embeddings = torch.randn(WORDS, WIDTH).mul(0.1).half().float()
    vocabulary = SoftVocabulary(embeddings[::2], torch.arange(0, WORDS, 2))
    shape = ConnectorShape(10, DV, WIDTH, hidden=80, cell_width=32)
    classifier = nn.Linear(DV, 50)
    names = torch.randint(0, WORDS // 2, (50, shape.name_slots))
    connector = Connector(shape, vocabulary, classifier.weight, classifier.bias, names)
    memory = MemoryShape(WIDTH, DV, latent_width=32, text_latents=3, tokens_per_latent=4)
    compressor = Compressor(memory)
    codes = compressor.codes(embeddings).detach()
    rag_connector = RagConnector(memory, vocabulary, embeddings, codes)
    nn.init.normal_(rag_connector.text_out.weight, std=0.1)
    cells = torch.rand(3, 10, DV) * 3
    text = embeddings[torch.randint(0, WORDS, (3, memory.max_text_tokens))]
    text[0, 5:] = 0  # a shorter text, and none at all
    text[1] = 0
    latents = compressor(text, cells)
    pixels = torch.rand(3, 3, 260, 260) * 2 - 1
    return {
        "vision": Case(VisionEncoder(), (pixels,)),
        "connector": Case(connector, (cells,)),
        "compressor": Case(compressor, (text, cells)),
        "rag_connector": Case(rag_connector, (latents.detach(),)),
    }


@pytest.fixture(scope="module")
def folder(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("components")
    embeddings = cases["rag_connector"].module.get_buffer("embeddings").numpy()
    (folder / "embeddings.bin").write_bytes(embeddings.astype("<f2").tobytes())
    for name, case in cases.items():
        for precision in ("fp32", "int8"):
            path = folder / f"{name}.{precision}.onnx"
            export_component(name, case.module.eval(), path, case.inputs, precision)
    return folder


def run(path: Path, name: str, inputs: tuple[Tensor, ...]) -> list[NDArray[np.generic]]:
    signature = SIGNATURES[name]
    values = {key: value.numpy() for key, value in zip(signature.inputs, inputs, strict=True)}
    result: list[NDArray[np.generic]] = ort.InferenceSession(path).run(signature.outputs, values)
    return result


def torch_run(case: Case, inputs: tuple[Tensor, ...]) -> list[NDArray[np.generic]]:
    with torch.inference_mode():
        result = case.module(*inputs)
    return [value.numpy() for value in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fp32(cases: dict[str, Case], folder: Path, name: str, count: int) -> None:
    inputs = tuple(value[:count] for value in cases[name].inputs)
    found = run(folder / f"{name}.fp32.onnx", name, inputs)
    for got, expected in zip(found, torch_run(cases[name], inputs), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        if got.dtype == np.float32:
            assert np.abs(got - expected).max() <= 1e-4
        else:
            assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("vision", 0.03), ("connector", 0.1), ("compressor", 0.03), ("rag_connector", 0.05)],
)
def test_int8_is_close(cases: dict[str, Case], folder: Path, name: str, limit: float) -> None:
    case = cases[name]
    got, expected = (
        run(folder / f"{name}.int8.onnx", name, case.inputs)[0],
        torch_run(case, case.inputs)[0],
    )
    assert np.sqrt(np.square(got - expected).mean()) <= limit * expected.std()


@pytest.mark.parametrize("name", ["vision", "connector", "rag_connector"])
def test_int8_is_smaller(folder: Path, name: str) -> None:
    sizes = [(folder / f"{name}.{p}.onnx").stat().st_size for p in ("int8", "fp32")]
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_embeddings_are_not_copied(folder: Path, precision: Precision) -> None:
    model = onnx.load(folder / f"rag_connector.{precision}.onnx", load_external_data=False)
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert [item.value for tensor in external for item in tensor.external_data][:1] == [
        "embeddings.bin"
    ]


def test_no_notes_about_this_machine(folder: Path) -> None:
    for path in folder.glob("*.onnx"):
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert b".py" not in content


def test_the_module_stays_as_it_was(cases: dict[str, Case], folder: Path) -> None:
    module = cases["rag_connector"].module
    assert folder.exists()
    assert module.get_buffer("embeddings").dtype == torch.float32
