"""How large a model will be, so that an export that cannot fit does not start."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from tinyalign.export.half import SMALLEST
from tinyalign.export.precisions import Precisions, components_of
from tinyalign.export.quantize import BLOCK
from tinyalign.runtime.errors import InputError
from tinyalign.runtime.manifest import Precision
from tinyalign.training.parts import Parts

BYTES: dict[Precision, float] = {
    "fp32": 4,
    "fp16": 2,
    "int8": 1 + 4 / BLOCK,  # a float32 scale for each block
    "int4": 0.5 + 4.5 / BLOCK,  # and a zero point of 4 bits
}
"""Bytes a weight."""
MARGIN = 1.05  # for graphs, biases and alignment


def model_bytes(parts: Parts, precisions: Precisions, bank: Path) -> int:
    """About how many bytes writing a model directory takes on the disk."""
    names = components_of(parts)
    components = sum(component_bytes(parts, name, precisions.of(name)) for name in names)
    # a language model in fp16 is written in fp32 first
    draft = component_bytes(parts, "lm", "fp32") if precisions.lm == "fp16" else 0
    return components + draft + table_bytes(parts, bank)


def table_bytes(parts: Parts, bank: Path) -> int:
    """Of the token embeddings, the tokenizer and the bank."""
    stored = bank.stat().st_size if bank.exists() else 0
    return parts.embeddings.numel() * 2 + len(parts.tokenizer.to_str().encode()) + stored


def component_bytes(parts: Parts, name: str, precision: Precision) -> int:
    """About how many bytes one component's graph and weights will have."""
    module: nn.Module = getattr(parts, name)
    total = 0.0
    for key, tensor in tensors_of(module):
        count = tensor.numel()
        if name == "lm" and tensor.data_ptr() == parts.embeddings.data_ptr():
            # a tied head: 8 bits, or read from the embeddings' own file
            total += count * BYTES["int8"] if precision in ("int8", "int4") else 0
        elif tensor.ndim < 2 or count < SMALLEST:
            total += 4 * count
        elif name == "lm" and precision == "int4" and "lm_head" in key:
            total += count * BYTES["int8"]
        else:
            total += count * BYTES[precision]
    return int(total * MARGIN)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers of a module with their names, shared ones once."""
    seen: set[int] = set()
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield key, tensor


def check_disk(target: Path, needed: int) -> None:
    """Raises InputError when the disk of `target` (which need not be there yet) has less free."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"{target} would take about {needed / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB are "
            "free on that disk"
        )
