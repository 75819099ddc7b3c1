"""The graph of each small part computes what its torch module computes, for any number of rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyalign.export.components import SIGNATURES, export_component
from tinyalign.training.modules import (
    Compressor,
    Connector,
    ConnectorShape,
    MemoryShape,
    Projector,
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
    memory = MemoryShape(WIDTH, DV, latent_width=32, chunks=3, max_text_tokens=12, hidden=16)
    compressor = Compressor(memory)
    rag_connector = RagConnector(memory, vocabulary, radius=0.8)
    nn.init.normal_(rag_connector.out.weight, std=0.1)
    nn.init.constant_(rag_connector.picture_share, 0.3)
    cells = torch.rand(3, 10, DV) * 3
    text = embeddings[torch.randint(0, WORDS, (3, memory.max_text_tokens))]
    members = torch.zeros(3, memory.chunks, memory.max_text_tokens)
    members[0, 0, :5] = 1  # one chunk, none at all, and three
    members[2, 0, :4] = members[2, 1, 4:6] = members[2, 2, 6:] = 1
    latents = compressor(text, members, cells)
    pixels = torch.rand(3, 3, 260, 260) * 2 - 1
    return {
        "vision": Case(VisionEncoder(), (pixels,)),
        "connector": Case(connector, (cells,)),
        "compressor": Case(compressor, (text, members, cells)),
        "rag_connector": Case(rag_connector, (latents.detach(),)),
        "projector": Case(Projector(nn.Linear(DV, WIDTH)), (cells,)),
    }


@pytest.fixture(scope="module")
def folder(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("components")
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
    int8, fp32 = (
        sum(path.stat().st_size for path in folder.glob(f"{name}.{precision}.onnx*"))
        for precision in ("int8", "fp32")
    )
    assert int8 < 0.6 * fp32


def test_no_notes_about_this_machine(folder: Path) -> None:
    for path in folder.glob("*.onnx*"):
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert b".py" not in content
