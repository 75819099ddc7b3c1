"""Weights stored as half precision, which halves the file and nothing else.

A CPU computes in float32. So each weight is followed by a Cast, which onnxruntime does once, when
it opens the graph: afterwards the weights lie in memory as float32, as if they had been stored so.
Only factors of products and convolutions are halved; norms and rotary tables stay float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tinyalign.export.graph import GraphWriter

SMALLEST = 4096
"""Weights with fewer numbers than this stay float32: nothing to gain."""
READERS = ("MatMul", "Gemm", "Conv", "Transpose", "Reshape", "Gather", "GatherND")
LARGEST = float(np.finfo(np.float16).max)


def halve(path: Path) -> None:
    """Store the large factors of a written graph, float32 in `path`.data or in the graph, as fp16.

    Weights that lie in other files (the token embeddings) are left alone.
    """
    model = onnx.load(path, load_external_data=False)
    graph, data = model.graph, path.with_name(f"{path.name}.data")
    factors, casts = factor_names(graph), []
    draft = data.with_name(f"{data.name}.half")
    with draft.open("wb") as file:
        writer = GraphWriter(file, data.name)
        for tensor in graph.initializer:
            if location(tensor) not in ("", data.name):
                writer.initializers.append(tensor)
                continue
            values = read(tensor, path.parent)
            if tensor.name in factors and np.abs(values).max() <= LARGEST:
                half = writer.weight(f"{tensor.name}.fp16", values.astype(np.float16))
                casts.append(
                    helper.make_node(
                        "Cast", [half], [tensor.name], name=f"{half}.cast", to=TensorProto.FLOAT
                    )
                )
            else:
                writer.weight(tensor.name, values)
    nodes = [*casts, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(writer.initializers)
    graph.node.extend(nodes)
    draft.replace(data)
    path.write_bytes(model.SerializeToString(deterministic=True))


def factor_names(graph: onnx.GraphProto) -> set[str]:
    """Large float32 constants that only products, convolutions and what leads to them read."""
    others = {name for node in graph.node if node.op_type not in READERS for name in node.input} | {
        value.name for value in graph.output
    }
    return {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) > 1
        and int(np.prod(tensor.dims)) >= SMALLEST
        and tensor.name not in others
    }


def location(tensor: TensorProto) -> str:
    """The file that a constant lies in, "" for the graph itself."""
    return next((str(item.value) for item in tensor.external_data if item.key == "location"), "")


def read(tensor: TensorProto, folder: Path) -> NDArray[np.float32]:
    """A constant's values; the tensor itself stays as it is."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    values: NDArray[np.float32] = numpy_helper.to_array(copy, str(folder))
    return values
