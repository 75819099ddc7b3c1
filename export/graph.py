"""A small writer of ONNX graphs whose weights lie in files beside the graph.

onnx.helper makes nodes; this adds what a graph built by hand needs: weights that are written to an
external data file as they come (so that a model is never twice in memory), and the choice between a
plain and a block-quantized matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tinyalign.export.quantize import BLOCK, Blocks, quantize

Precision = Literal["fp32", "int8", "int4"]
OPSET, MICROSOFT_OPSET, IR_VERSION = 23, 1, 11
MICROSOFT = "com.microsoft"
ALIGNMENT = 4096
"""Weights start on page borders, so that onnxruntime can map them."""


class GraphWriter:
    """Collects the nodes of one graph and writes its weights to `data_file` as they are added."""

    def __init__(
        self, data_file: BinaryIO, data_name: str, blocks: Mapping[str, Blocks] | None = None
    ) -> None:
        """`data_name`: the data file's path as the graph, lying in the same directory, names it.
        `blocks`: weights of products, by name, that are quantized already."""
        self.blocks = blocks or {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.data_file = data_file
        self.data_name = data_name

    def node(
        self, op: str, inputs: list[str], name: str, domain: str = "", **attributes: Any
    ) -> str:
        """Add an operator with one output, called like the node."""
        return self.node_many(op, inputs, [name], domain, **attributes)[0]

    def node_many(
        self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add an operator with several outputs ("" for one that is not needed)."""
        name = outputs[0]
        self.nodes.append(
            helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs

    def weight(self, name: str, values: NDArray[Any]) -> str:
        """Add a constant; small ones stay in the graph, large ones go to the data file."""
        if values.nbytes <= 1024:
            self.initializers.append(onnx.numpy_helper.from_array(values, name))
            return name
        self.data_file.write(b"\0" * (-self.data_file.tell() % ALIGNMENT))
        offset = self.data_file.tell()
        self.data_file.write(np.ascontiguousarray(values).data)
        return self.external(name, values.dtype, values.shape, self.data_name, offset)

    def external(
        self,
        name: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        location: str,
        offset: int = 0,
    ) -> str:
        """Add a constant that already lies in the file `location` of the graph's directory."""
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(dtype),
            dims=shape,
            data_location=TensorProto.EXTERNAL,
        )
        length = dtype.itemsize * int(np.prod(shape))
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def matmul(
        self,
        x: str,
        weight: NDArray[np.float32],
        name: str,
        precision: Precision,
        bias: NDArray[np.float32] | None = None,
    ) -> str:
        """x [..., K] times the transpose of weight [N, K], plus bias [N] -> [..., N]."""
        output = name if bias is None else f"{name}.product"
        if precision == "fp32":
            self.node("MatMul", [x, self.weight(f"{name}.weight", weight.T)], output)
        else:
            blocks = self.blocks.get(name) or quantize(weight, 8 if precision == "int8" else 4)
            self.quantized_product(x, blocks, name, output)
        if bias is not None:
            self.node("Add", [output, self.weight(f"{name}.bias", bias)], name)
        return name

    def quantized_product(self, x: str, blocks: Blocks, name: str, output: str) -> None:
        """Add x [..., K] times a quantized weight [N, K] -> output [..., N]."""
        inputs = [
            x,
            self.weight(f"{name}.weight", blocks.packed),
            self.weight(f"{name}.scales", blocks.scales),
        ]
        if blocks.zero_points is not None:
            inputs.append(self.weight(f"{name}.zero_points", blocks.zero_points))
        self.node(
            "MatMulNBits",
            inputs,
            output,
            MICROSOFT,
            N=blocks.rows,
            K=blocks.columns,
            bits=blocks.bits,
            block_size=BLOCK,
            accuracy_level=4,  # multiply in int8; unset is 2-3 times slower
        )

    def save(
        self,
        path: Path,
        inputs: list[onnx.ValueInfoProto],
        outputs: list[onnx.ValueInfoProto],
        check: bool = True,
    ) -> None:
        """Write the graph; the onnx checker's complaint is an error."""
        graph = helper.make_graph(self.nodes, path.stem, inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, MICROSOFT_OPSET)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="tinyalign"
        )
        path.write_bytes(model.SerializeToString(deterministic=True))
        if check:
            self.data_file.flush()
            onnx.checker.check_model(str(path))
