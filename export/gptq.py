"""Calibrated 4-bit weights: GPTQ (Frantar et al., arXiv 2210.17323).

A weight is quantized column by column; what rounding one column did to the layer's output on real
inputs is made up for by the columns that are still to come. What the inputs are like is all in
their second moments, the matrix `hessian` = sum of x xT [K, K].

Own code, as the kept libraries cannot be used: gptqmodel does not build without CUDA, llmcompressor
wants transformers 5, neural-compressor asks a model hub for every model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinyalign.export.quantize import BLOCK, Blocks, asymmetric_4, dequantize, pack_4, quantize

DAMPING = 0.01  # of the mean diagonal, added to the diagonal of a hessian

CALIBRATED = ("llama", "qwen2", "qwen3")
"""Families whose layers are built alike; the weights of others are rounded to the nearest."""
PRODUCTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Matrix products of a layer as the graph fuses them: modules that share an input."""


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel, prompts: Sequence[Tensor], progress: Callable[[str], None]
) -> dict[str, Blocks]:
    """4-bit weights for all products of all layers, by their names in the graph.

    Every product sees what those that are quantized already make of the prompts. `model` is
    changed: its weights become the quantized ones.

    Args:
        prompts: embedded tokens [1, N, D] of at least some thousand tokens like those that the
            model will read.
    """
    blocks: dict[str, Blocks] = {}
    hidden = list(prompts)
    for number, layer in enumerate(model.model.layers):
        progress(f"calibrating layer {number + 1} of {len(model.model.layers)}")
        for product, names in PRODUCTS.items():
            modules: list[Any] = [layer.get_submodule(name) for name in names]
            moments = second_moments(model, layer, modules[0], hidden)
            weight = torch.cat([module.weight for module in modules])  # [N, K]
            found = quantize_calibrated(weight, moments)
            blocks[f"layer.{number}.{product}"] = found
            rows = [module.out_features for module in modules]
            parts = torch.split(torch.from_numpy(dequantize(found)), rows)
            for module, part in zip(modules, parts, strict=True):
                module.weight.copy_(part)
        hidden = [run_layer(model, layer, rows) for rows in hidden]
    return blocks


def second_moments(
    model: PreTrainedModel, layer: nn.Module, module: nn.Linear, prompts: Sequence[Tensor]
) -> Tensor:
    """The sum of x xT [K, K] over a module's inputs x while a layer reads the prompts."""
    total = torch.zeros(2 * [module.in_features])

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, 1)  # [N, K]
        total.addmm_(rows.T, rows)

    hook = module.register_forward_pre_hook(add)
    try:
        for rows in prompts:
            run_layer(model, layer, rows)
    finally:
        hook.remove()
    return total


def run_layer(model: PreTrainedModel, layer: nn.Module, rows: Tensor) -> Tensor:
    """One decoder layer over a prompt [1, N, D]."""
    places = torch.arange(rows.shape[1])[None]
    result = layer(rows, position_embeddings=model.model.rotary_emb(rows, places))
    states: Tensor = result[0] if isinstance(result, tuple) else result
    return states


def quantize_calibrated(weight: Tensor, hessian: Tensor) -> Blocks:
    """A weight [N, K] in blocks of 4 bits, for inputs with the second moments `hessian` [K, K].

    Rounded to the nearest, without calibration, where K is no multiple of a block.
    """
    rows, columns = weight.shape
    if columns % BLOCK:
        return quantize(weight.numpy(), 4)
    left, hessian = weight.clone(), hessian.clone()
    diagonal = hessian.diagonal()
    diagonal += DAMPING * diagonal.mean() + 1e-8
    # What an error in one column asks of the later ones: the inverse's Cholesky factor, [K, K].
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    spread = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.zeros(rows, columns)
    scales, zeros = torch.zeros(2, rows, columns // BLOCK)
    for start in range(0, columns, BLOCK):
        block = slice(start, start + BLOCK)
        ours, errors = left[:, block], torch.zeros(rows, BLOCK)
        _, scale, zero = map(torch.from_numpy, asymmetric_4(ours[:, None].numpy()))
        scale, zero = scale[:, 0], zero[:, 0].float()
        step = torch.where(scale == 0, 1.0, scale)
        for i, column in enumerate(range(start, start + BLOCK)):
            code = (torch.round(ours[:, i] / step) + zero).clamp(0, 15)
            errors[:, i] = (ours[:, i] - (code - zero) * scale) / spread[column, column]
            ours[:, i:] -= errors[:, i : i + 1] * spread[column, column : start + BLOCK]
            codes[:, column] = code
        left[:, block.stop :] -= errors @ spread[block, block.stop :]
        scales[:, start // BLOCK], zeros[:, start // BLOCK] = scale, zero
    packed = pack_4(codes.reshape(rows, -1, BLOCK).to(torch.uint8).numpy())
    return Blocks(4, rows, columns, packed, scales.numpy(), pack_4(zeros.to(torch.uint8).numpy()))
