"""Ask a picture a question: the runtime for a device, without torch.

from tinyalign.runtime import TinyAlign

model = TinyAlign.load()
print(model.ask("cat.jpg", "What is this?").text)
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

# onnxruntime's wheels hold a telemetry client, on unless this says otherwise before it is imported.
# Nothing is sent from here; whoever wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from tinyalign.runtime.answers import Answer, AnswerStream, EncodedPicture, Timings
    from tinyalign.runtime.errors import (
        BankError,
        InputError,
        ModelError,
        PictureError,
        QuestionError,
        TinyAlignError,
    )
    from tinyalign.runtime.model import TinyAlign

__all__ = [
    "Answer",
    "AnswerStream",
    "BankError",
    "EncodedPicture",
    "InputError",
    "ModelError",
    "PictureError",
    "QuestionError",
    "Timings",
    "TinyAlign",
    "TinyAlignError",
]

# Looked up on first use, so that `--help` and training do not wait for onnxruntime.
_LATER = {
    "Answer": "answers",
    "AnswerStream": "answers",
    "BankError": "errors",
    "EncodedPicture": "answers",
    "InputError": "errors",
    "ModelError": "errors",
    "PictureError": "errors",
    "QuestionError": "errors",
    "Timings": "answers",
    "TinyAlign": "model",
    "TinyAlignError": "errors",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
