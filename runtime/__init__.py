"""Ask a picture a question: the runtime for a device, without torch."""

from __future__ import annotations

from tinyalign.runtime.errors import (
    BankError,
    InputError,
    ModelError,
    PictureError,
    QuestionError,
    TinyAlignError,
)

__all__ = [
    "BankError",
    "InputError",
    "ModelError",
    "PictureError",
    "QuestionError",
    "TinyAlignError",
]
