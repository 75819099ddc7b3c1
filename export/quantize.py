"""Weights in blocks of 4 or 8 bits, as onnxruntime's MatMulNBits operator wants them.

A weight [N, K] (as torch keeps a Linear's) is cut along K into blocks; each block has one float32
scale and, for 4 bits, one integer zero point: `weight = (q - zero_point) * scale`. 8-bit blocks are
symmetric, with the operator's default zero point of 128. Zero points are never floats: those make
MatMulNBits tens to hundreds of times slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Bits = Literal[4, 8]
BLOCK = 32
"""Weights that share a scale. 32 keeps 8 bits near-lossless and is what the CPU kernels do best."""


@dataclass(frozen=True)
class Blocks:
    """A quantized weight [N, K]; B = K / BLOCK blocks a row (the last one padded with zeros)."""

    bits: Bits
    rows: int  # N
    columns: int  # K
    packed: NDArray[np.uint8]  # [N, B, BLOCK * bits / 8], the low half of a byte first
    scales: NDArray[np.float32]  # [N, B]
    zero_points: NDArray[np.uint8] | None  # [N, ceil(B / 2)], two in a byte; None for 8 bits


def quantize(weight: NDArray[np.float32], bits: Bits) -> Blocks:
    """Quantize a weight [N, K] to blocks of 4 or 8 bits."""
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -columns % BLOCK)))
    blocks = padded.reshape(rows, -1, BLOCK)  # [N, B, BLOCK]
    if bits == 8:
        codes, scales = symmetric_8(blocks)
        return Blocks(8, rows, columns, codes, scales, None)
    codes, scales, zero_points = asymmetric_4(blocks)
    return Blocks(4, rows, columns, pack_4(codes), scales, pack_4(zero_points))


def dequantize(blocks: Blocks) -> NDArray[np.float32]:
    """The weight [N, K] that a quantized one stands for."""
    if blocks.zero_points is None:
        codes, zero_points = blocks.packed, np.full_like(blocks.scales, 128)
    else:
        codes = unpack_4(blocks.packed)
        zero_points = unpack_4(blocks.zero_points)[:, : blocks.scales.shape[1]].astype(np.float32)
    values = (codes.astype(np.float32) - zero_points[:, :, None]) * blocks.scales[:, :, None]
    return values.reshape(blocks.rows, -1)[:, : blocks.columns].astype(np.float32)


def symmetric_8(blocks: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes [N, B, BLOCK] around 128 and scales [N, B]."""
    scales = np.abs(blocks).max(axis=2) / np.float32(127)
    codes = np.rint(blocks / nonzero(scales)[:, :, None]) + 128
    return codes.astype(np.uint8), scales


def asymmetric_4(
    blocks: NDArray[np.float32],
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Codes [N, B, BLOCK] in 0..15, scales and zero points [N, B]: the least squared error of a
    few ranges, the full one and narrower ones that clip outliers."""
    low = np.minimum(blocks.min(axis=2), 0)
    high = np.maximum(blocks.max(axis=2), 0)
    best_error = np.full(low.shape, np.inf, dtype=np.float32)
    best_scales, best_zero = np.zeros_like(low), np.zeros_like(low)
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        scales = (high - low) * np.float32(shrink / 15)
        zero = np.clip(np.rint(-low * np.float32(shrink) / nonzero(scales)), 0, 15)
        error = np.square(decode_4(encode_4(blocks, scales, zero), scales, zero) - blocks).sum(
            axis=2
        )
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scales = np.where(better, scales, best_scales)
        best_zero = np.where(better, zero, best_zero)
    codes = encode_4(blocks, best_scales, best_zero)
    return codes.astype(np.uint8), best_scales, best_zero.astype(np.uint8)


def encode_4(
    blocks: NDArray[np.float32], scales: NDArray[np.float32], zero: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Nearest codes 0..15 of blocks [N, B, BLOCK], still as floats."""
    steps: NDArray[np.float32] = np.rint(blocks / nonzero(scales)[:, :, None])
    codes: NDArray[np.float32] = np.clip(steps + zero[:, :, None], 0, 15)
    return codes


def decode_4(
    codes: NDArray[np.float32], scales: NDArray[np.float32], zero: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What codes [N, B, BLOCK] stand for."""
    return (codes - zero[:, :, None]) * scales[:, :, None]


def nonzero(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales to divide by: 1 where a block is all zeros."""
    return np.where(scales == 0, np.float32(1), scales)


def pack_4(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two 4-bit codes of the last axis in a byte, the first one low; an odd end is padded."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: NDArray[np.uint8] = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return packed


def unpack_4(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inverse of `pack_4` (with the padding)."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
