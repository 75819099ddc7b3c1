"""A model directory for a device with an onnxruntime built for it: ORT format, and what it needs.

A minimal build of onnxruntime cannot read ONNX, and has only the kernels that it was built with. So
`write_minimal` turns every graph into ORT format (a flatbuffer of graph and weights in one file,
with all fusions done) and lists the operators of all of them for the build's
`--include_ops_by_config`. How to build: docs/edge.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime as ort
from onnxruntime.tools.ort_format_model import OrtFormatModelProcessor

from tinyalign.runtime.errors import TinyAlignError

OPERATORS_NAME = "required_operators.config"
LARGEST = 2**31 - 1  # bytes of a flatbuffer


def write_minimal(directory: Path, progress: Callable[[str], None]) -> None:
    """Put ORT-format graphs in the place of a model directory's ONNX graphs, and list operators.

    The manifest has to be written anew after it. Raises TinyAlignError for a graph that ORT format
    cannot hold (2 GB).
    """
    models = []
    for graph in sorted(directory.glob("*.onnx")):
        progress(f"{graph.stem} in ORT format")
        models.append(graph.with_suffix(".ort"))
        write_ort(graph, models[-1])
        graph.unlink()
        data_of(graph).unlink(missing_ok=True)
    (directory / OPERATORS_NAME).write_text(required_operators(models))


def write_ort(graph: Path, target: Path) -> None:
    """Write an ONNX graph and its weights as one file in ORT format.

    All fusions of operators are done, which a minimal build could not do; no layout of weights
    that only one kind of processor has kernels for is chosen.
    """
    weights = data_of(graph).stat().st_size if data_of(graph).exists() else 0
    if graph.stat().st_size + weights > LARGEST:
        raise TinyAlignError(f"{graph.name} is too large for ORT format, which ends at 2 GB")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.disable_prepacking", "1")  # it is not saved
    try:
        ort.InferenceSession(str(graph), options, ["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # the binding raises a dozen unrelated types
        reason = " ".join(str(error).split())[:200]
        raise TinyAlignError(f"{graph.name} cannot be written in ORT format: {reason}") from None


def required_operators(models: Sequence[Path]) -> str:
    """The operators of ORT-format graphs, in lines of "domain;opset;operator,operator,..."."""
    found: dict[str, dict[int, set[str]]] = {}  # domain -> opset -> operators
    for model in models:
        OrtFormatModelProcessor(str(model), found, None).process()
    lines = [
        f"{domain};{opset};{','.join(sorted(operators))}\n"
        for domain, opsets in sorted(found.items())
        for opset, operators in sorted(opsets.items())
    ]
    return "".join(lines)


def data_of(graph: Path) -> Path:
    """Where the exporter keeps an ONNX graph's weights."""
    return graph.with_name(f"{graph.name}.data")
