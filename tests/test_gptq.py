"""Calibrated 4-bit weights."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tinyalign.export.gptq import PRODUCTS, calibrate, quantize_calibrated
from tinyalign.export.lm import export_lm, lm_spec, write_embeddings
from tinyalign.export.quantize import dequantize, quantize
from tinyalign.runtime.lm import LanguageModel
from tinyalign.runtime.loading import open_session


def correlated(rows: int, width: int) -> Tensor:
    """Inputs of which a few directions carry nearly all."""
    mixed = torch.randn(rows, 12) @ torch.randn(12, width)
    return mixed + 0.1 * torch.randn(rows, width)


def test_outputs_on_inputs_like_these_are_nearer_than_by_rounding() -> None:
    torch.manual_seed(0)
    inputs, others = correlated(900, 96).split(700)
    weight = torch.randn(40, 96)
    rounded = torch.from_numpy(dequantize(quantize(weight.numpy(), 4)))
    blocks = quantize_calibrated(weight, inputs.T @ inputs)
    calibrated = torch.from_numpy(dequantize(blocks))
    errors = [((w - weight) @ others.T).square().mean() for w in (calibrated, rounded)]
    assert errors[0] < 0.3 * errors[1]


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded() -> None:
    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    blocks, expected = (
        quantize_calibrated(torch.from_numpy(weight), torch.eye(64)),
        quantize(weight, 4),
    )
    assert np.array_equal(dequantize(blocks), dequantize(expected))


def test_an_input_that_is_always_zero() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(100, 32)
    inputs[:, 3] = 0
    weight = torch.randn(4, 32)
    assert np.isfinite(dequantize(quantize_calibrated(weight, inputs.T @ inputs))).all()


def test_a_width_that_is_no_multiple_of_a_block() -> None:
    weight = torch.randn(4, 40)
    found, expected = quantize_calibrated(weight, torch.eye(40)), quantize(weight.numpy(), 4)
    assert np.array_equal(dequantize(found), dequantize(expected))


def test_the_graph_computes_what_the_calibrated_model_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data *= 3  # so that layers do something
    changed = copy.deepcopy(model)
    ids = torch.randint(96, (6, 40))
    said: list[str] = []
    with torch.inference_mode():
        prompts = [*model.model.embed_tokens(ids)[:, None]]
    blocks = calibrate(changed, prompts, said.append)
    assert set(blocks) == {f"layer.{i}.{name}" for i in range(2) for name in PRODUCTS}
    assert len(said) == 2
    write_embeddings(model, tmp_path / "embeddings.bin")
    export_lm(model, tmp_path / "lm.onnx", "int4", 64, blocks)
    lm = LanguageModel(open_session(tmp_path / "lm.onnx", 1), lm_spec(config, 64))
    rows = prompts[0][0].numpy()
    found = lm.forward(lm.new_state(40), rows, tuple(range(40)))
    with torch.inference_mode():
        expected = changed(inputs_embeds=prompts[0]).logits[0].numpy()
    assert np.abs(found - expected).max() < 0.05 * expected.std() * 4  # int8 activations and head
