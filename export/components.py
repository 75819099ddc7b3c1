"""The small parts as ONNX graphs: vision encoder, connector, compressor and RAG connector.

torch's exporter (the torch.export one) writes each graph with a free first axis. What it leaves is
then changed in two ways, both on the graph itself: notes about the source code are dropped, and the
weights are quantized if asked for: constant factors of matrix products to blocks of 8 or 4 bits,
or all large ones stored as fp16.
A vision encoder that is nearly all convolutions is another matter:
onnxruntime's own quantizer takes it to 8 bits, activations too, calibrated on real pictures.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from torch import Tensor, nn

from tinyalign.export.graph import MICROSOFT, MICROSOFT_OPSET
from tinyalign.export.half import SMALLEST, halve
from tinyalign.export.quantize import BLOCK, Bits, quantize
from tinyalign.runtime.manifest import Precision

OPSET = 20


@dataclass(frozen=True)
class Signature:
    """Names of a component's inputs and outputs; the first axis of each is `axis`, any number."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axis: str = "B"


SIGNATURES = {
    "vision": Signature(("pixels",), ("cells",)),
    "connector": Signature(("cells",), ("image_tokens", "token_ids")),
    "projector": Signature(("cells",), ("image_tokens",)),  # a connector that knows no words
    "compressor": Signature(("token_embeddings", "members", "cells"), ("latents",)),
    "rag_connector": Signature(("latents",), ("memory_tokens", "keep"), axis="K"),
}


class Whole(nn.Module):
    """A module as the child of another: the exporter trips over some names at the top."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Tensor) -> object:
        """As the part."""
        return self.part(*inputs)


def export_component(
    name: str, module: nn.Module, path: Path, example: tuple[Tensor, ...], precision: Precision
) -> None:
    """Write one component's graph.

    Args:
        name: one of `SIGNATURES`.
        module: the part in eval mode.
        path: the graph's file; large weights go to `path`.data.
        example: inputs of 2 or more rows: the exporter follows the first two, and a convolutional
            vision encoder in int8 is calibrated on all of them.
        precision: of the weights; no "int4" for a convolutional vision encoder.
    """
    module = with_plain_buffers(module)
    model = trace(Whole(module), tuple(value[:2] for value in example), SIGNATURES[name])
    convolutional = of_convolutions(model)
    if precision in ("int8", "int4") and not convolutional:
        quantize_products(model, 8 if precision == "int8" else 4)
    drop_unused(model)
    if precision == "int8" and convolutional:
        model = quantize_network(model, SIGNATURES[name].inputs[0], example[0])
    # Weights beside the graph are mapped; within it they would be copied twice on loading.
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location=data.name)
    if precision == "fp16":
        halve(path)
    onnx.checker.check_model(str(path))


def with_plain_buffers(module: nn.Module) -> nn.Module:
    """A copy whose buffers are not another module's parameters, which the exporter cannot take."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, value in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, value.detach())
    return module


def trace(module: nn.Module, example: tuple[Tensor, ...], signature: Signature) -> onnx.ModelProto:
    """A module's graph as torch's exporter gives it, with our names and without its notes."""
    axis = torch.export.Dim(signature.axis, min=1, max=1 << 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision need not be there
        program = torch.onnx.export(
            module.eval(),
            example,
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            dynamic_shapes=(tuple({0: axis} for _ in example),),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    bare = onnx.ModelProto(ir_version=10, producer_name="tinyalign")
    bare.opset_import.append(helper.make_opsetid("", OPSET))
    graph = bare.graph
    graph.name = "_".join(signature.outputs)
    graph.initializer.extend(model.graph.initializer)
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        graph.node.append(node)
    for values, target in ((model.graph.input, graph.input), (model.graph.output, graph.output)):
        for value in values:
            value.ClearField("metadata_props")
            value.type.tensor_type.shape.dim[0].dim_param = signature.axis
            target.append(value)
    return bare


def of_convolutions(model: onnx.ModelProto) -> bool:
    """Whether more of a graph's weights are in convolutions than in matrix products."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    counts = {"Conv": 0, "MatMul": 0, "Gemm": 0}
    for node in model.graph.node:
        if node.op_type == "Transpose":  # of a constant factor
            sizes[node.output[0]] = sizes.get(node.input[0], 0)
        if node.op_type in counts:
            counts[node.op_type] += sizes.get(node.input[1], 0)
    return counts["Conv"] > counts["MatMul"] + counts["Gemm"]


def quantize_products(model: onnx.ModelProto, bits: Bits) -> None:
    """Turn every matrix product with a large constant factor into a MatMulNBits."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    turned = {n.output[0]: n.input[0] for n in graph.node if is_plain_transpose(n, weights)}
    nodes, done = [], 0
    for node in graph.node:
        weight = product_weight(node, weights, turned)  # [N, K]
        if weight is None or weight.size < SMALLEST or weight.shape[1] < BLOCK:
            nodes.append(node)
            continue
        nodes.append(quantized_product(graph, node, weight, bits))
        done += 1
    del graph.node[:]
    graph.node.extend(nodes)
    if done:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, MICROSOFT_OPSET))


def is_plain_transpose(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    """Whether a node swaps the two axes of a constant."""
    return (
        node.op_type == "Transpose"
        and node.input[0] in weights
        and attributes(node).get("perm") == [1, 0]
    )


def product_weight(
    node: onnx.NodeProto, weights: dict[str, onnx.TensorProto], turned: dict[str, str]
) -> NDArray[np.float32] | None:
    """The constant factor of a MatMul or plain Gemm as [N, K] (from K to N numbers), or None."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    options, name = attributes(node), node.input[1]
    if node.op_type == "Gemm" and (
        options.get("transA", 0) or options.get("alpha", 1.0) != 1 or options.get("beta", 1.0) != 1
    ):
        return None
    already = bool(options.get("transB", 0)) != (name in turned)  # stored as [N, K]
    tensor = weights.get(turned.get(name, name))
    if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
        return None
    array: NDArray[np.float32] = numpy_helper.to_array(tensor)
    return array if already else np.ascontiguousarray(array.T)


def quantized_product(
    graph: onnx.GraphProto, node: onnx.NodeProto, weight: NDArray[np.float32], bits: Bits
) -> onnx.NodeProto:
    """The MatMulNBits for a product; adds its constants to the graph."""
    name = node.output[0]
    blocks = quantize(weight, bits)
    constants: dict[str, NDArray[Any]] = {"weight": blocks.packed, "scales": blocks.scales}
    if blocks.zero_points is not None:
        constants["zeros"] = blocks.zero_points
    for part, values in constants.items():
        graph.initializer.append(numpy_helper.from_array(values, f"{name}.{part}"))
    inputs = [node.input[0], *(f"{name}.{part}" for part in constants)]
    if len(node.input) > 2:  # a Gemm's bias is the sixth input
        inputs += [""] * (5 - len(inputs)) + [node.input[2]]
    return helper.make_node(
        "MatMulNBits",
        inputs,
        [name],
        name=f"{name}.product",
        domain=MICROSOFT,
        N=blocks.rows,
        K=blocks.columns,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=4,
    )


class Calibration(CalibrationDataReader):  # type: ignore[misc]  # it has no types
    """Gives the quantizer one picture after another."""

    def __init__(self, name: str, rows: Tensor) -> None:
        self.rows = iter([{name: row.numpy()[None]} for row in rows])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next picture, None at the end."""
        return next(self.rows, None)


def quantize_network(model: onnx.ModelProto, name: str, rows: Tensor) -> onnx.ModelProto:
    """A graph of convolutions with 8-bit weights (a scale a channel) and activations.

    Args:
        model: the graph.
        name: its only input.
        rows: inputs [n, ..]; the range of every activation is what these reach.
    """
    with tempfile.TemporaryDirectory() as folder:
        inferred, quantized = Path(folder) / "inferred.onnx", Path(folder) / "quantized.onnx"
        onnx.save(onnx.shape_inference.infer_shapes(model), inferred)
        logging.disable(logging.WARNING)  # it always advises a step that changes nothing here
        try:
            quantize_static(
                str(inferred),
                str(quantized),
                Calibration(name, rows),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(quantized)


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove nodes and constants whose result nobody reads."""
    graph = model.graph
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):  # nodes stand in the order in which they can run
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    constants = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(constants)


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """A node's attributes as Python values."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}
