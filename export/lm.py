"""A language model as one ONNX graph of few, fused operators, for onnxruntime on a CPU.

Generic exporters give thousands of nodes and copy the key/value cache every step. This graph is
built node by node instead, one operator for each big piece of a decoder layer; a Llama's is

    normalize ─ MatMul(q,k,v) ─ GroupQueryAttention ─ MatMul(o) ─ add + normalize
      ─ MatMul(gate,up) ─ SiLU · ─ MatMul(down) ─ add + normalize of the next layer

GroupQueryAttention rotates, appends to the cache and attends. Bind the same buffer as past.{i}.*
and present.{i}.* and nothing of the cache is ever copied. Logits are computed only for the rows
asked for, and so is the last layer from its attention on.

Inputs   inputs_embeds          f32 [1, N, D]     new tokens, already embedded
         seqlens_k              i32 [1]           tokens in the cache after this run, minus 1
         total_sequence_length  i32 []            tokens in the cache after this run
         logit_rows             i64 [R]           which of the N rows want logits
         past.{i}.key, .value   f32 [1, Hkv, capacity, hd]
Outputs  logits                 f32 [1, R, V]
         present.{i}.key, .value, shaped as past

`inputs_embeds` means what it means for the same model in transformers, so that image tokens made
for one fit the other. `write_embeddings` writes the rows to feed for the vocabulary's tokens.

What a layer does in each family of models is in lm_families.py, its pieces are in lm_layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper
from transformers import PretrainedConfig, PreTrainedModel

from tinyalign.export.graph import GraphWriter, Precision
from tinyalign.export.lm_families import (
    LAYERS,
    decoder_of,
    final_norm,
    first_residual,
    window,
)
from tinyalign.export.lm_layers import (
    Layer,
    add_and_normalize,
    kv_heads,
    product,
    rope_tables,
    weights_of,
)
from tinyalign.runtime.errors import InputError
from tinyalign.runtime.manifest import LmSpec
from tinyalign.training.lm import embedding_rows, embedding_scale
from tinyalign.training.models.supported import check_exportable, head_dim

if TYPE_CHECKING:
    from tinyalign.export.quantize import Blocks

EMBEDDINGS_NAME = "embeddings.bin"


def export_lm(
    model: PreTrainedModel,
    path: Path,
    precision: Precision = "int8",
    context: int = 2048,
    blocks: Mapping[str, Blocks] | None = None,
) -> None:
    """Write `path` (lm.onnx) and `path`.data.

    `model`: a causal language model of one of the types in `lm_families.LAYERS`.
    `precision` is that of the weights: "int8" is near-lossless; "int4" keeps an 8-bit head, because
    a 4-bit one costs much quality; "fp32" is exact and takes its tied head from embeddings.bin
    (`write_embeddings`), which must lie beside it before onnxruntime opens the graph.
    `context`: the most tokens a cache may hold, i.e. the length of the tables of positions.
    `blocks`: weights that are quantized already (`gptq.calibrate`).

    Raises InputError for a model that the graph cannot express.
    """
    config = model.config
    check_exportable(config, context)
    with path.with_name(path.name + ".data").open("wb") as data_file:
        graph = GraphWriter(data_file, path.name + ".data", blocks)
        ropes = all_rope_tables(graph, model, context)
        # hidden: what the next layer adds to the residual; None before the first layer
        residual, hidden = first_residual(graph, model, context), None
        for i, module in enumerate(decoder_of(model).layers):
            seen = window(config, i)
            layer = Layer(
                module,
                i,
                config,
                rope=ropes.get("rope.local" if seen else "rope", ropes.get("rope")),
                window=seen if seen is not None and seen < context else None,
                precision=precision,
                last=i == config.num_hidden_layers - 1,
            )
            residual, hidden = LAYERS[config.model_type](graph, layer, residual, hidden)
        final = add_and_normalize(graph, residual, hidden, final_norm(model), "norm")[1]
        head(graph, model, final, precision)
        inputs, outputs = signature(config)
        graph.save(path, inputs, outputs, check=precision != "fp32")


def all_rope_tables(
    graph: GraphWriter, model: PreTrainedModel, context: int
) -> dict[str, tuple[str, str]]:
    """The tables of a model's rotary embeddings: none (OPT), one, or two (Gemma 3, whose layers
    with a window have their own)."""
    modules = {"rope": "rotary_emb", "rope.local": "rotary_emb_local"}
    decoder = decoder_of(model)
    return {
        name: rope_tables(graph, getattr(decoder, module), context, name)
        for name, module in modules.items()
        if hasattr(decoder, module)
    }


def head(graph: GraphWriter, model: PreTrainedModel, x: str, precision: Precision) -> None:
    """Add logits [1, R, V] from normalized rows x [1, R, D]."""
    config, linear = model.config, model.lm_head
    cap = getattr(config, "final_logit_softcapping", None)
    name = "logits" if cap is None else "logits.uncapped"
    if precision != "fp32":
        product(graph, x, [linear], name, "int8")
    elif config.tie_word_embeddings and linear.bias is None:
        tied_head(graph, model, x, name)
    else:
        product(graph, x, [linear], name, precision)
    if cap is not None:
        limit = graph.weight("logits.cap", np.array(cap, np.float32))
        x = graph.node("Div", [name, limit], "logits.share")
        x = graph.node("Tanh", [x], "logits.bent")
        graph.node("Mul", [x, limit], "logits")


def tied_head(graph: GraphWriter, model: PreTrainedModel, x: str, name: str) -> None:
    """Add the product of x [1, R, D] and the table in embeddings.bin."""
    shape = weights_of(model.lm_head).shape  # [V, D]
    half = graph.external("embeddings", np.dtype(np.float16), shape, EMBEDDINGS_NAME)
    table = graph.node("Cast", [half], "embeddings.fp32", to=TensorProto.FLOAT)
    turned = graph.node("Transpose", [table], "head.weight", perm=[1, 0])  # [D, V]
    if (scale := embedding_scale(model)) != 1:
        factor = graph.weight("head.scale", np.array(1 / scale, np.float32))
        x = graph.node("Mul", [x, factor], "norm.scaled")
    graph.node("MatMul", [x, turned], name)


def signature(config: PretrainedConfig) -> tuple[list[Any], list[Any]]:
    """Inputs and outputs of the graph, as in this module's description."""
    value = helper.make_tensor_value_info
    inputs = [
        value("inputs_embeds", TensorProto.FLOAT, [1, "N", config.hidden_size]),
        value("seqlens_k", TensorProto.INT32, [1]),
        value("total_sequence_length", TensorProto.INT32, []),
        value("logit_rows", TensorProto.INT64, ["R"]),
    ]
    outputs = [value("logits", TensorProto.FLOAT, [1, "R", config.vocab_size])]
    cache: list[str | int | None] = [1, kv_heads(config), "capacity", head_dim(config)]
    for i in range(config.num_hidden_layers):
        for part in ("key", "value"):
            inputs.append(value(f"past.{i}.{part}", TensorProto.FLOAT, cache))
            outputs.append(value(f"present.{i}.{part}", TensorProto.FLOAT, cache))
    return inputs, outputs


def lm_spec(config: PretrainedConfig, context: int) -> LmSpec:
    """The manifest's description of a language model exported for `context` tokens."""
    return LmSpec(
        vocab=config.vocab_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        kv_heads=kv_heads(config),
        head_dim=head_dim(config),
        context=context,
    )


def write_embeddings(model: PreTrainedModel, path: Path) -> None:
    """Write the rows of inputs_embeds for all tokens [V, D] as raw little-endian float16.

    Raises InputError where float16 cannot hold one.
    """
    with np.errstate(over="ignore"):
        table = embedding_rows(model).astype("<f2")
    if not np.isfinite(table).all():
        raise InputError("token embeddings beyond 65504 do not fit into embeddings.bin (float16)")
    path.write_bytes(table.tobytes())
