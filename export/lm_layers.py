"""What the decoder layers of all families are made of: products, norms, attention, MLP.

Each function adds one or a few operators and returns the name of its result. Shapes: N new tokens,
R rows that logits are asked for, width D, H query heads and Hkv key/value heads of hd numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from tinyalign.export.graph import MICROSOFT, GraphWriter, Precision
from tinyalign.runtime.errors import InputError
from tinyalign.training.models.supported import head_dim

if TYPE_CHECKING:
    from numpy.typing import NDArray

TANH_GELU = {"approximate": "tanh"}
ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # transformers' name -> operator, its domain and attributes
    "silu": ("QuickGelu", MICROSOFT, {"alpha": 1.0}),
    "relu": ("Relu", "", {}),
    "gelu": ("Gelu", "", {}),
    "gelu_new": ("Gelu", "", TANH_GELU),
    "gelu_pytorch_tanh": ("Gelu", "", TANH_GELU),
}


@dataclass(frozen=True)
class Layer:
    """One decoder layer of a transformers model, and how it enters the graph."""

    module: Any
    index: int
    config: PretrainedConfig
    rope: tuple[str, str] | None  # the tables that turn queries and keys, if any do
    window: int | None  # so many tokens, the newest itself among them, are seen; None: all
    precision: Precision
    last: bool

    @property
    def name(self) -> str:
        """What its nodes are called."""
        return f"layer.{self.index}"


def product(
    graph: GraphWriter, x: str, linears: Sequence[nn.Linear], name: str, precision: Precision
) -> str:
    """x [.., K] through Linears that share it, their outputs side by side: [.., N]."""
    weights = [weights_of(linear) for linear in linears]
    weight = np.concatenate(weights) if len(weights) > 1 else weights[0]  # [N, K]
    biases = [array_of(linear.bias) for linear in linears if linear.bias is not None]
    bias = np.concatenate(biases) if biases else None
    return graph.matmul(x, weight, name, precision, bias)


def add_and_normalize(
    graph: GraphWriter, residual: str, hidden: str | None, norm: nn.Module, name: str
) -> tuple[str, str]:
    """The sum of residual and hidden (None: the residual itself), and its normalized form."""
    if hidden is None:
        return residual, normalize(graph, residual, norm, name)
    op = "SkipLayerNormalization" if is_layer_norm(norm) else "SkipSimplifiedLayerNormalization"
    outputs = [name, "", "", f"{name}.sum"]
    inputs = [residual, hidden, *norm_weights(graph, norm, name)]
    graph.node_many(op, inputs, outputs, MICROSOFT, epsilon=epsilon_of(norm))
    return outputs[3], outputs[0]


def normalize(graph: GraphWriter, x: str, norm: nn.Module, name: str) -> str:
    """x, normalized over its last axis."""
    op = "LayerNormalization" if is_layer_norm(norm) else "RMSNormalization"
    inputs = [x, *norm_weights(graph, norm, name)]
    return graph.node(op, inputs, name, epsilon=epsilon_of(norm), axis=-1)


def norm_weights(graph: GraphWriter, norm: Any, name: str) -> list[str]:
    """Scale, and shift of a LayerNorm, both [D]. Gemma's norms hold the scale less 1."""
    scale = weights_of(norm)
    if isinstance(norm, (Gemma2RMSNorm, Gemma3RMSNorm)):
        scale = scale + np.float32(1)
    names = [graph.weight(f"{name}.weight", scale)]
    if is_layer_norm(norm) and norm.bias is not None:
        names.append(graph.weight(f"{name}.bias", array_of(norm.bias)))
    return names


def is_layer_norm(norm: nn.Module) -> bool:
    """Whether it takes the mean away (LayerNorm), or not (all the RMSNorms)."""
    return isinstance(norm, nn.LayerNorm)


def epsilon_of(norm: Any) -> float:
    """What a norm adds to the variance."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def attention(graph: GraphWriter, layer: Layer, x: str, linears: Sequence[nn.Linear]) -> str:
    """What the heads gather for x [1, N, D], appended to the cache on the way: [1, N, H hd].

    `linears` make queries, keys and values, in one or in three.
    """
    config, options = layer.config, dict[str, Any]()
    qkv = product(graph, x, linears, f"{layer.name}.qkv", layer.precision)  # [1, N, (H+2Hkv) hd]
    inputs = [qkv, "", ""]
    if hasattr(layer.module.self_attn, "q_norm"):
        inputs = normalize_heads(graph, layer, qkv)
    if layer.window is not None:
        options["local_window_size"] = layer.window
    if softcap := getattr(config, "attn_logit_softcapping", None):
        options["softcap"] = float(softcap)
    cache = [f"{part}.{layer.index}.{kind}" for part in ("past", "present") for kind in CACHE]
    return graph.node_many(
        "GroupQueryAttention",
        [*inputs, *cache[:2], "seqlens_k", "total_sequence_length", *(layer.rope or ())],
        [f"{layer.name}.attention", *cache[2:]],
        MICROSOFT,
        num_heads=config.num_attention_heads,
        kv_num_heads=kv_heads(config),
        do_rotary=int(layer.rope is not None),
        scale=float(layer.module.self_attn.scaling),
        **options,
    )[0]


CACHE = ("key", "value")


def normalize_heads(graph: GraphWriter, layer: Layer, qkv: str) -> list[str]:
    """Queries [1, N, H hd] and keys [1, N, Hkv hd], every head normalized by itself, and values."""
    config, name, width = layer.config, layer.name, head_dim(layer.config)
    widths = [count * width for count in (config.num_attention_heads, *2 * [kv_heads(config)])]
    sizes = graph.weight(f"{name}.widths", np.array(widths, np.int64))
    parts = [f"{name}.query", f"{name}.key", f"{name}.value"]
    graph.node_many("Split", [qkv, sizes], parts, axis=-1)
    heads = graph.weight(f"{name}.heads", np.array([0, 0, -1, width], np.int64))
    row = graph.weight(f"{name}.row", np.array([0, 0, -1], np.int64))
    found = []
    norms = (layer.module.self_attn.q_norm, layer.module.self_attn.k_norm)
    for part, norm in zip(parts, norms, strict=False):
        x = graph.node("Reshape", [part, heads], f"{part}.heads")  # [1, N, heads, hd]
        x = normalize(graph, x, norm, f"{part}.norm")
        found.append(graph.node("Reshape", [x, row], f"{part}.row"))
    return [*found, parts[2]]


def wanted_rows(graph: GraphWriter, layer: Layer, *values: str) -> tuple[str, ...]:
    """From values [1, N, ..] of the last layer the rows that logits are asked for, [1, R, ..]."""
    if not layer.last:
        return values
    return tuple(
        graph.node("Gather", [value, "logit_rows"], f"{value}.rows", axis=1) for value in values
    )


def mlp(graph: GraphWriter, layer: Layer, x: str, up: nn.Linear, down: nn.Linear, kind: str) -> str:
    """x widened, through an activation, and narrowed again."""
    x = product(graph, x, [up], f"{layer.name}.up", layer.precision)  # [1, N, F]
    x = activate(graph, x, f"{layer.name}.mlp", kind)
    return product(graph, x, [down], f"{layer.name}.down", layer.precision)


def gated_mlp(
    graph: GraphWriter, layer: Layer, x: str, gate_up: Sequence[nn.Linear], kind: str
) -> str:
    """x through an MLP in which one half, activated, weighs the other; `gate_up`: in that order,
    as one Linear or two."""
    name = layer.name
    both = product(graph, x, gate_up, f"{name}.gate_up", layer.precision)  # [1, N, 2F]
    gate, up = graph.node_many(
        "Split", [both], [f"{name}.gate", f"{name}.up"], axis=-1, num_outputs=2
    )
    x = graph.node("Mul", [activate(graph, gate, f"{name}.active", kind), up], f"{name}.mlp")
    return product(graph, x, [layer.module.mlp.down_proj], f"{name}.down", layer.precision)


def activate(graph: GraphWriter, x: str, name: str, kind: str) -> str:
    """x through an activation, by transformers' name; InputError for an unknown one."""
    if kind not in ACTIVATIONS:
        raise InputError(
            f"the activation {kind!r} is not supported, only {', '.join(sorted(ACTIVATIONS))}"
        )
    op, domain, attributes = ACTIVATIONS[kind]
    return graph.node(op, [x], name, domain, **attributes)


def rope_tables(
    graph: GraphWriter, rotary: nn.Module, context: int, name: str = "rope"
) -> tuple[str, str]:
    """Cosines and sines [context, r / 2] from a model's own rotary embedding, which turns the
    first r numbers of every head."""
    positions = torch.arange(context)[None]
    with torch.inference_mode():
        tables = rotary(torch.zeros(1, dtype=torch.float32), positions)
    half = tables[0].shape[-1] // 2  # transformers repeats the table for both halves
    cos, sin = (table[0, :, :half].contiguous().numpy() for table in tables)
    return graph.weight(f"{name}.cos", cos), graph.weight(f"{name}.sin", sin)


def kv_heads(config: PretrainedConfig) -> int:
    """Heads of keys and values (Hkv): as many as of queries where a config names none."""
    named = None if config.model_type == "opt" else config.num_key_value_heads
    return int(named or config.num_attention_heads)


def weights_of(module: torch.nn.Module) -> NDArray[np.float32]:
    """The weight of a Linear, norm or embedding as float32 array, not copied if it is that."""
    return array_of(module.weight)


def array_of(values: Any) -> NDArray[np.float32]:
    """A parameter as float32 array, not copied if it is that."""
    array: NDArray[np.float32] = values.detach().float().numpy()
    return array
