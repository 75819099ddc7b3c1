"""The families of language models that can be exported: what each one's decoder layer does.

A layer function adds one layer to the graph. Between layers go two values: `residual` and `hidden`,
what the next norm adds to it (None before the first layer), so that adding and normalizing is one
operator. Both are [1, N, D]; of the last layer [1, R, D], only the rows that logits are asked for.

`LAYERS` names the function of every `model_type` of transformers. What else differs between
families, at the ends of the graph and in what of a config can be expressed, is below it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from tinyalign.export.graph import GraphWriter
from tinyalign.export.lm_layers import (
    Layer,
    add_and_normalize,
    attention,
    gated_mlp,
    mlp,
    normalize,
    product,
    wanted_rows,
    weights_of,
)
from tinyalign.training.models.supported import activation

LayerFunction: TypeAlias = Callable[[GraphWriter, Layer, str, str | None], tuple[str, str]]
OPT_OFFSET = 2  # OPT's table of positions starts with two rows that no position uses


def llama_layer(
    graph: GraphWriter, layer: Layer, residual: str, hidden: str | None
) -> tuple[str, str]:
    """Llama, and with it Qwen (biases, norms of heads) and Phi-3 (weights fused already)."""
    module, name = layer.module, layer.name
    residual, x = attended(
        graph, layer, residual, hidden, module.input_layernorm, module.self_attn.o_proj
    )
    residual, x = add_and_normalize(
        graph, residual, x, module.post_attention_layernorm, f"{name}.mlp_norm"
    )
    return residual, gated_mlp(graph, layer, x, gate_up(module.mlp), activation(layer.config))


def gemma_layer(
    graph: GraphWriter, layer: Layer, residual: str, hidden: str | None
) -> tuple[str, str]:
    """Gemma 2 and 3: what attention and MLP give is normalized before it is added, too."""
    module, name = layer.module, layer.name
    residual, x = attended(
        graph, layer, residual, hidden, module.input_layernorm, module.self_attn.o_proj
    )
    x = normalize(graph, x, module.post_attention_layernorm, f"{name}.after_attention_norm")
    residual, x = add_and_normalize(
        graph, residual, x, module.pre_feedforward_layernorm, f"{name}.mlp_norm"
    )
    x = gated_mlp(graph, layer, x, gate_up(module.mlp), activation(layer.config))
    return residual, normalize(
        graph, x, module.post_feedforward_layernorm, f"{name}.after_mlp_norm"
    )


def phi_layer(
    graph: GraphWriter, layer: Layer, residual: str, hidden: str | None
) -> tuple[str, str]:
    """Phi 1 and 2: attention and MLP side by side read the same normalized rows."""
    module, name = layer.module, layer.name
    residual, normal = add_and_normalize(
        graph, residual, hidden, module.input_layernorm, f"{name}.norm"
    )
    x = attention(graph, layer, normal, query_key_value(module.self_attn))
    x, normal, residual = wanted_rows(graph, layer, x, normal, residual)
    x = product(graph, x, [module.self_attn.dense], f"{name}.o", layer.precision)
    residual = graph.node("Add", [residual, x], f"{name}.sum")
    up, down = module.mlp.fc1, module.mlp.fc2
    return residual, mlp(graph, layer, normal, up, down, activation(layer.config))


def opt_layer(
    graph: GraphWriter, layer: Layer, residual: str, hidden: str | None
) -> tuple[str, str]:
    """OPT: LayerNorms, biases, a plain MLP; positions were added to the inputs."""
    module, name = layer.module, layer.name
    residual, x = attended(
        graph, layer, residual, hidden, module.self_attn_layer_norm, module.self_attn.out_proj
    )
    residual, x = add_and_normalize(graph, residual, x, module.final_layer_norm, f"{name}.mlp_norm")
    return residual, mlp(graph, layer, x, module.fc1, module.fc2, activation(layer.config))


def attended(
    graph: GraphWriter, layer: Layer, residual: str, hidden: str | None, norm: Any, out: nn.Linear
) -> tuple[str, str]:
    """The first half of a layer: norm, attention and the product behind it; the residual and what
    is to be added to it."""
    residual, x = add_and_normalize(graph, residual, hidden, norm, f"{layer.name}.attention_norm")
    x = attention(graph, layer, x, query_key_value(layer.module.self_attn))
    x, residual = wanted_rows(graph, layer, x, residual)
    return residual, product(graph, x, [out], f"{layer.name}.o", layer.precision)


LAYERS: dict[str, LayerFunction] = {
    "llama": llama_layer,
    "qwen2": llama_layer,
    "qwen3": llama_layer,
    "phi3": llama_layer,
    "phi": phi_layer,
    "gemma2": gemma_layer,
    "gemma3_text": gemma_layer,
    "opt": opt_layer,
}


def query_key_value(attention: Any) -> list[nn.Linear]:
    """The Linears of queries, keys and values, in that order."""
    if hasattr(attention, "qkv_proj"):
        return [attention.qkv_proj]
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def gate_up(mlp: Any) -> list[nn.Linear]:
    """The Linears into a gated MLP, the gate first."""
    return [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]


def decoder_of(model: PreTrainedModel) -> Any:
    """The module that holds the layers and the token embeddings."""
    return model.model.decoder if model.config.model_type == "opt" else model.model


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm before the head."""
    names = {"opt": "final_layer_norm", "phi": "final_layernorm"}
    norm = getattr(decoder_of(model), names.get(model.config.model_type, "norm"))
    assert isinstance(norm, nn.Module)
    return norm


def window(config: PretrainedConfig, layer: int) -> int | None:
    """How many tokens, the newest itself among them, a layer's queries see; None: all."""
    types = getattr(config, "layer_types", None)
    if config.model_type != "phi3" and (types is None or types[layer] == "full_attention"):
        return None
    size: int | None = getattr(config, "sliding_window", None)
    return size


def first_residual(graph: GraphWriter, model: PreTrainedModel, context: int) -> str:
    """What the first layer reads, [1, N, D], made from inputs_embeds as transformers does."""
    if model.config.model_type == "gemma2":
        scale = graph.weight("inputs.scale", np.array(model.config.hidden_size**0.5, np.float32))
        return graph.node("Mul", ["inputs_embeds", scale], "inputs")
    if model.config.model_type == "opt":
        table = weights_of(decoder_of(model).embed_positions)[OPT_OFFSET:][:context]
        return add_positions(graph, table)
    return "inputs_embeds"


def add_positions(graph: GraphWriter, table: Any) -> str:
    """inputs_embeds and the rows of a table [context, D] for their places in the cache."""
    for name, value in (("inputs.axis", 1), ("inputs.step", 1)):
        graph.weight(name, np.array(value, np.int64))
    end = graph.node("Cast", ["total_sequence_length"], "inputs.end", to=TensorProto.INT64)
    shape = graph.node("Shape", ["inputs_embeds"], "inputs.shape")
    count = graph.node("Gather", [shape, "inputs.axis"], "inputs.count")  # N
    start = graph.node("Sub", [end, count], "inputs.start")
    places = graph.node("Range", [start, end, "inputs.step"], "inputs.places")  # [N]
    weight = graph.weight("positions", table)
    rows = graph.node("Gather", [weight, places], "inputs.positions", axis=0)  # [N, D]
    return graph.node("Add", ["inputs_embeds", rows], "inputs")
