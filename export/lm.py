"""A Llama as one ONNX graph of few, fused operators, for onnxruntime on a CPU.

Generic exporters give thousands of nodes and copy the key/value cache every step. This graph is
built node by node instead, one operator for each big piece of a decoder layer:

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

Another family of models gets its own `*_layer` function here and shares the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import TensorProto, helper
from transformers import LlamaConfig, LlamaForCausalLM

from tinyalign.export.graph import MICROSOFT, GraphWriter, Precision

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tinyalign.export.quantize import Blocks

EMBEDDINGS_NAME = "embeddings.bin"


def export_lm(
    model: LlamaForCausalLM,
    path: Path,
    precision: Precision = "int8",
    context: int = 2048,
    blocks: Mapping[str, Blocks] | None = None,
) -> None:
    """Write `path` (lm.onnx) and `path`.data.

    `precision` is that of the weights: "int8" is near-lossless; "int4" keeps an 8-bit head, because
    a 4-bit one costs much quality; "fp32" is exact and takes its tied head from embeddings.bin
    (`write_embeddings`), which must lie beside it before onnxruntime opens the graph.
    `blocks`: weights that are quantized already (`gptq.calibrate`).
    `context`: the most tokens a cache may hold, i.e. the length of the rotary table.
    """
    config = model.config
    if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        raise ValueError("only Llamas without biases and with SiLU can be exported")
    with path.with_name(path.name + ".data").open("wb") as data_file:
        graph = GraphWriter(data_file, path.name + ".data", blocks)
        rope = rope_tables(graph, model, context)
        # hidden: what the next layer adds to the residual; None before the first layer
        residual, hidden = "inputs_embeds", None
        for i in range(config.num_hidden_layers):
            last = i == config.num_hidden_layers - 1
            residual, hidden = llama_layer(graph, model, i, residual, hidden, rope, precision, last)
        final = add_and_normalize(
            graph, residual, hidden, weights_of(model.model.norm), "norm", config.rms_norm_eps
        )[1]
        head(graph, model, final, precision)
        inputs, outputs = signature(config)
        graph.save(path, inputs, outputs, check=precision != "fp32")


def llama_layer(
    graph: GraphWriter,
    model: LlamaForCausalLM,
    i: int,
    residual: str,
    hidden: str | None,
    rope: tuple[str, str],
    precision: Precision,
    last: bool,
) -> tuple[str, str]:
    """Add layer `i`; the new residual and hidden values, both [1, N, D] ([1, R, D] if `last`)."""
    config, layer, name = model.config, model.model.layers[i], f"layer.{i}"
    eps = config.rms_norm_eps
    residual, x = add_and_normalize(
        graph, residual, hidden, weights_of(layer.input_layernorm), f"{name}.attention_norm", eps
    )
    attention = layer.self_attn
    qkv = np.concatenate(
        [weights_of(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    )
    qkv_out = graph.matmul(x, qkv, f"{name}.qkv", precision)  # [1, N, (H + 2 Hkv) hd]
    x = graph.node_many(
        "GroupQueryAttention",
        [
            qkv_out,
            "",
            "",
            f"past.{i}.key",
            f"past.{i}.value",
            "seqlens_k",
            "total_sequence_length",
            *rope,
        ],
        [f"{name}.attention", f"present.{i}.key", f"present.{i}.value"],
        MICROSOFT,
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        do_rotary=1,
        scale=float(attention.scaling),
    )[0]  # [1, N, H hd]
    if last:
        x = graph.node("Gather", [x, "logit_rows"], "attention_rows", axis=1)  # [1, R, H hd]
        residual = graph.node("Gather", [residual, "logit_rows"], "residual_rows", axis=1)
    x = graph.matmul(x, weights_of(attention.o_proj), f"{name}.o", precision)
    residual, x = add_and_normalize(
        graph, residual, x, weights_of(layer.post_attention_layernorm), f"{name}.mlp_norm", eps
    )
    gate_up = np.concatenate([weights_of(layer.mlp.gate_proj), weights_of(layer.mlp.up_proj)])
    both = graph.matmul(x, gate_up, f"{name}.gate_up", precision)  # [1, N, 2F]
    gate, up = graph.node_many(
        "Split", [both], [f"{name}.gate", f"{name}.up"], axis=-1, num_outputs=2
    )
    silu = graph.node("QuickGelu", [gate], f"{name}.silu", MICROSOFT, alpha=1.0)
    x = graph.node("Mul", [silu, up], f"{name}.mlp")
    return residual, graph.matmul(x, weights_of(layer.mlp.down_proj), f"{name}.down", precision)


def add_and_normalize(
    graph: GraphWriter,
    residual: str,
    hidden: str | None,
    weight: NDArray[np.float32],
    name: str,
    eps: float,
) -> tuple[str, str]:
    """The sum of residual and hidden, and its RMS-normalized form times weight [D]."""
    gamma = graph.weight(f"{name}.weight", weight)
    if hidden is None:
        normal = graph.node("RMSNormalization", [residual, gamma], name, epsilon=eps, axis=-1)
        return residual, normal
    outputs = [name, "", "", f"{name}.sum"]
    graph.node_many(
        "SkipSimplifiedLayerNormalization",
        [residual, hidden, gamma],
        outputs,
        MICROSOFT,
        epsilon=eps,
    )
    return outputs[3], outputs[0]


def rope_tables(graph: GraphWriter, model: LlamaForCausalLM, context: int) -> tuple[str, str]:
    """Cosines and sines [context, hd / 2] from the model's own rotary embedding."""
    positions = torch.arange(context)[None]
    with torch.inference_mode():
        tables = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
    half = model.config.head_dim // 2  # transformers repeats the table for both halves of a head
    cos, sin = (table[0, :, :half].contiguous().numpy() for table in tables)
    return graph.weight("rope.cos", cos), graph.weight("rope.sin", sin)


def head(graph: GraphWriter, model: LlamaForCausalLM, x: str, precision: Precision) -> None:
    """Add logits [1, R, V] from normalized rows x [1, R, D]."""
    weight = weights_of(model.lm_head)  # [V, D]
    if precision != "fp32":
        graph.matmul(x, weight, "logits", "int8")
    elif model.config.tie_word_embeddings:
        half = graph.external("embeddings", np.dtype(np.float16), weight.shape, EMBEDDINGS_NAME)
        table = graph.node("Cast", [half], "embeddings.fp32", to=TensorProto.FLOAT)
        turned = graph.node("Transpose", [table], "head.weight", perm=[1, 0])  # [D, V]
        graph.node("MatMul", [x, turned], "logits")
    else:
        graph.matmul(x, weight, "logits", precision)


def signature(config: LlamaConfig) -> tuple[list[Any], list[Any]]:
    """Inputs and outputs of the graph, as in this module's description."""
    value = helper.make_tensor_value_info
    inputs = [
        value("inputs_embeds", TensorProto.FLOAT, [1, "N", config.hidden_size]),
        value("seqlens_k", TensorProto.INT32, [1]),
        value("total_sequence_length", TensorProto.INT32, []),
        value("logit_rows", TensorProto.INT64, ["R"]),
    ]
    outputs = [value("logits", TensorProto.FLOAT, [1, "R", config.vocab_size])]
    cache = [1, config.num_key_value_heads, "capacity", config.head_dim]
    for i in range(config.num_hidden_layers):
        for part in ("key", "value"):
            inputs.append(value(f"past.{i}.{part}", TensorProto.FLOAT, cache))
            outputs.append(value(f"present.{i}.{part}", TensorProto.FLOAT, cache))
    return inputs, outputs


def write_embeddings(model: LlamaForCausalLM, path: Path) -> None:
    """Write the token embeddings [V, D] as raw little-endian float16."""
    path.write_bytes(weights_of(model.model.embed_tokens).astype("<f2").tobytes())


def weights_of(module: torch.nn.Module) -> NDArray[np.float32]:
    """The weight of a Linear, norm or embedding as float32 array, not copied if it is that."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    array: NDArray[np.float32] = weight.detach().float().numpy()
    return array
