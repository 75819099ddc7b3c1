"""A complete model directory with random weights, made in a second: small, but every part is real.

The language model goes through the exporter's own graph builder; the other graphs are a few nodes
each with the shapes and names of the real ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from tinyalign.bank import Bank
from tinyalign.export.lm import export_lm, write_embeddings
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.files import file_entry
from tinyalign.runtime.keys import KeyArrays, save_key_arrays
from tinyalign.runtime.manifest import (
    MANIFEST_NAME,
    CompressorSpec,
    ConnectorSpec,
    ImageSpec,
    Licence,
    LmSpec,
    Manifest,
    PromptSpec,
    RagConnectorSpec,
    VisionSpec,
)

SIZE, CELLS, DV = 24, 10, 16  # picture, cells, vision width
T, D = 3, 32  # image tokens, LM width
N, L, LATENT = 8, 3, 8  # text tokens of a memory, latents, latent width
CONTEXT = 320
TEXTS = ("a cat", "b", "œ 猫")  # of the bank's memories 1, 2, 3, with pictures 0, 1, 2
FINGERPRINT = "f1" * 16
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PROMPT = PromptSpec(
    system="<|im_start|>user\n",
    image=("Here:", 2, ", then", 1, "."),
    memory="\nMemory ({similarity}):",
    memory_end="\n",
    question="\n{question}<|im_end|>\n<|im_start|>assistant\n",
    similarity=(("same", 0.99), ("close", 0.5), ("similar", -1.0)),
    stop=("<|im_end|>", "<|endoftext|>"),
    top_k=2,
    copy_bonus=(0.5, 1.0),
)
FILES = (
    "vision.onnx",
    "connector.onnx",
    "compressor.onnx",
    "rag_connector.onnx",
    "lm.onnx",
    "lm.onnx.data",
    "embeddings.bin",
    "key.npz",
    "tokenizer.json",
    "bank.sqlite",
)


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of smooth random colours."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def tokenizer() -> Tokenizer:
    """Bytes as tokens and the special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    return tok


def language_model(vocab: int) -> LlamaForCausalLM:
    """A Llama of two layers whose answers depend on every token it reads."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.6,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table.copy_(table.half().float())
    return model


def write_tiny_model(directory: Path) -> Path:
    """Write the model directory, with a bank of three memories."""
    directory.mkdir(parents=True)
    tok = tokenizer()
    lm = language_model(tok.get_vocab_size())
    tok.save(str(directory / "tokenizer.json"))
    write_embeddings(lm, directory / "embeddings.bin")
    export_lm(lm, directory / "lm.onnx", "fp32", CONTEXT)
    rng = np.random.default_rng(3)
    for name, model in (
        ("vision", _vision(rng)),
        ("connector", _connector(rng)),
        ("compressor", _compressor(rng)),
        ("rag_connector", _rag_connector(rng)),
    ):
        (directory / f"{name}.onnx").write_bytes(model.SerializeToString())
    arrays = [rng.normal(size=s).astype(np.float32) for s in ((DV,), (DV, 12), (D,), (D, 4))]
    save_key_arrays(directory / "key.npz", KeyArrays(*arrays, alpha=0.2))
    with _new_bank(directory / "bank.sqlite") as bank:
        bank.seal()
    write_manifest(directory, tok.get_vocab_size())

    with TinyAlign.load(directory, banks=[]) as loaded:
        memories = [loaded.memory(picture(i), text) for i, text in enumerate(TEXTS)]
    (directory / "bank.sqlite").unlink()
    with _new_bank(directory / "bank.sqlite") as bank:
        bank.add(memories)
        bank.seal()
    write_manifest(directory, tok.get_vocab_size())
    return directory


def write_manifest(directory: Path, vocab: int) -> None:
    """Write ``tinyalign.json`` for the files as they are now."""
    manifest = Manifest(
        name="tiny",
        fingerprint=FINGERPRINT,
        licences=(Licence("all", "CC0-1.0", "random numbers"),),
        image=ImageSpec(size=SIZE),
        vision=VisionSpec(CELLS, DV),
        connector=ConnectorSpec(T),
        compressor=CompressorSpec(N, L, LATENT),
        rag_connector=RagConnectorSpec(L - 1),
        lm=LmSpec(vocab, D, layers=2, kv_heads=1, head_dim=D // 2, context=CONTEXT),
        precisions={"lm": "fp32"},
        prompt=PROMPT,
        chat=None,
        files=tuple(file_entry(directory, name) for name in FILES),
        quality={},
    )
    (directory / MANIFEST_NAME).write_text(manifest.to_json())


def _new_bank(path: Path) -> Bank:
    return Bank.create(path, FINGERPRINT, key_width=16, latent_width=LATENT, name="tiny")


def _vision(rng: np.random.Generator) -> ModelProto:
    weights = {
        "filter": rng.normal(size=(DV, 3, 1, 1)),
        "grid": np.array([0, DV, 9]),
        "whole": np.array([0, DV, 1]),
    }
    nodes = [
        helper.make_node("Conv", ["pixels", "filter"], ["colours"]),
        helper.make_node("Tanh", ["colours"], ["features"]),
        helper.make_node(
            "AveragePool", ["features"], ["cells9"], kernel_shape=[8, 8], strides=[8, 8]
        ),
        helper.make_node("Reshape", ["cells9", "grid"], ["rows"]),
        helper.make_node("GlobalAveragePool", ["features"], ["mean4"]),
        helper.make_node("Reshape", ["mean4", "whole"], ["mean"]),
        helper.make_node("Concat", ["mean", "rows"], ["columns"], axis=2),
        helper.make_node("Transpose", ["columns"], ["cells"], perm=[0, 2, 1]),
    ]
    return _model(nodes, {"pixels": ["B", 3, SIZE, SIZE]}, {"cells": ["B", CELLS, DV]}, weights)


def _connector(rng: np.random.Generator) -> ModelProto:
    weights = {
        "flat": np.array([0, CELLS * DV]),
        "weight": rng.normal(size=(CELLS * DV, T * D)) / 10,
        "tokens": np.array([0, T, D]),
    }
    nodes = [
        helper.make_node("Reshape", ["cells", "flat"], ["joined"]),
        helper.make_node("MatMul", ["joined", "weight"], ["slots"]),
        helper.make_node("Reshape", ["slots", "tokens"], ["image_tokens"]),
        helper.make_node("ArgMax", ["image_tokens"], ["token_ids"], axis=2, keepdims=0),
    ]
    outputs = {"image_tokens": ["B", T, D], "token_ids": ["B", T]}
    return _model(nodes, {"cells": ["B", CELLS, DV]}, outputs, weights)


def _compressor(rng: np.random.Generator) -> ModelProto:
    weights = {
        "text": rng.normal(size=(D, LATENT)),
        "zero": np.array([0]),
        "one": np.array([1]),
        "axis": np.array([1]),
        "look": rng.normal(size=(DV, LATENT)),
    }
    nodes = [
        helper.make_node("MatMul", ["members", "token_embeddings"], ["words"]),
        helper.make_node("MatMul", ["words", "text"], ["said"]),
        helper.make_node("Slice", ["cells", "zero", "one", "axis"], ["whole"]),
        helper.make_node("MatMul", ["whole", "look"], ["seen"]),
        helper.make_node("Concat", ["seen", "said"], ["latents"], axis=1),
    ]
    inputs = {
        "token_embeddings": ["B", N, D],
        "members": ["B", L - 1, N],
        "cells": ["B", CELLS, DV],
    }
    return _model(nodes, inputs, {"latents": ["B", L, LATENT]}, weights)


def _rag_connector(rng: np.random.Generator) -> ModelProto:
    weights = {
        "weight": rng.normal(size=(LATENT, D)),
        "first": np.array([1]),
        "last": np.array([L]),
        "rows": np.array([1]),
        "axis": np.array([2]),
        "floor": np.array(1e-6),
    }
    nodes = [
        helper.make_node("Slice", ["latents", "first", "last", "rows"], ["text"]),
        helper.make_node("MatMul", ["text", "weight"], ["memory_tokens"]),
        helper.make_node("Abs", ["text"], ["size"]),
        helper.make_node("ReduceSum", ["size", "axis"], ["sizes"], keepdims=0),
        helper.make_node("Greater", ["sizes", "floor"], ["keep"]),
    ]
    outputs = {"memory_tokens": ["K", L - 1, D], "keep": ["K", L - 1]}
    return _model(nodes, {"latents": ["K", L, LATENT]}, outputs, weights)


def _model(
    nodes: list[NodeProto],
    inputs: dict[str, list[int | str]],
    outputs: dict[str, list[int | str]],
    weights: dict[str, np.ndarray],
) -> ModelProto:
    kinds = {"token_ids": TensorProto.INT64, "keep": TensorProto.BOOL}
    values = [
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s) for n, s in side]
        for side in (inputs.items(), outputs.items())
    ]
    arrays = [
        numpy_helper.from_array(w if w.dtype == np.int64 else w.astype(np.float32), name)
        for name, w in weights.items()
    ]
    graph = helper.make_graph(nodes, "part", *values, arrays)
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)
