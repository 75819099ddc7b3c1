"""Which precisions the weights of each component can have; no heavy imports, for ``--help``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyalign.runtime.manifest import Precision

if TYPE_CHECKING:
    from tinyalign.training.parts import Parts

CHOICES: dict[str, tuple[Precision, ...]] = {
    "vision": ("fp32", "fp16", "int8"),  # onnxruntime has no 4-bit convolution
    "connector": ("fp32", "fp16", "int8", "int4"),
    "compressor": ("fp32", "fp16", "int8", "int4"),
    "rag_connector": ("fp32", "fp16", "int8", "int4"),
    "lm": ("fp32", "fp16", "int8", "int4"),
}
"""In the order in which they are written. fp16 is for the disk only: onnxruntime turns such weights
to float32 when it opens a graph on a CPU. int8 and int4 are blocks of 32 weights with a scale each
(`quantize.py`); the vision encoder's int8 is of weights and activations, calibrated on pictures;
the language model's int4 is calibrated with GPTQ, which takes minutes."""


MEMORY = ("compressor", "rag_connector")
"""Components that a model without a memory does not have."""


@dataclass(frozen=True)
class Precisions:
    """The precision of each component's weights."""

    lm: Precision = "int8"
    vision: Precision = "fp32"
    connector: Precision = "int8"
    compressor: Precision = "fp32"
    rag_connector: Precision = "int8"

    def of(self, component: str) -> Precision:
        """A component's precision, by its name."""
        precision: Precision = getattr(self, component)
        return precision


def components_of(parts: Parts) -> tuple[str, ...]:
    """The components that a model has, in the order in which they are written."""
    return tuple(name for name in CHOICES if parts.remembers or name not in MEMORY)


FLOATS = Precisions("fp32", "fp32", "fp32", "fp32", "fp32")
