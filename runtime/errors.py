"""The errors the runtime raises, all of them under :class:`TinyAlignError`.

``InputError`` and what is below it means that something given by the user cannot be used: its
message is one clear line, and a command line ends with exit code 2. Anything else ends with 1.
"""

from __future__ import annotations

from tinyalign.bank.errors import BankError, InputError, TinyAlignError

__all__ = [
    "BankError",
    "InputError",
    "ModelError",
    "PictureError",
    "QuestionError",
    "TinyAlignError",
]


class PictureError(InputError):
    """The picture cannot be read: missing, damaged, too large or no picture at all."""


class QuestionError(InputError):
    """The question cannot be asked: empty, or longer than the model's context."""


class ModelError(InputError):
    """The model directory cannot be used: missing, half-written, newer or changed."""
