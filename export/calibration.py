"""Prompts to calibrate quantized weights on: like those that the model will read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from tinyalign.bank import Bank
from tinyalign.runtime.images import Picture
from tinyalign.runtime.prompt import encode_text
from tinyalign.training.answer import look, prompt_rows, recall
from tinyalign.training.parts import Parts

QUESTIONS = ("What is this?", "What do you know about this?", "Is this an animal?")
PROMPTS = 128
TEXT_TOKENS = 256  # of the bank's texts one after another, in one piece of text
TEXTS = 32


@torch.inference_mode()
def calibration_prompts(parts: Parts, bank: Path, pictures: Sequence[Picture]) -> list[Tensor]:
    """Embedded tokens [1, N, D]: pictures of a bank's memories with questions, the memories that
    are retrieved and an answer; and plain text, the memories' own. Where there is no bank,
    `pictures` with questions."""
    if not bank.exists():
        shown = [look(parts, picture) for picture in pictures]
        return [prompt_rows(parts, seen, question, ()) for seen in shown for question in QUESTIONS]
    with Bank.open(bank, read_only=True) as memories:
        every = memories.list()
        seen = [memory for memory in every if memory.thumbnail]
        seen = seen[:: max(1, len(seen) // PROMPTS)][:PROMPTS]
        prompts = []
        for memory, question in zip(seen, cycle(QUESTIONS), strict=False):
            assert memory.thumbnail is not None
            cells = look(parts, memory.thumbnail)
            rows = prompt_rows(parts, cells, question, recall(parts, [memories], cells, question))
            answer = encode_text(parts.tokenizer, memory.text)
            prompts.append(torch.cat([rows, parts.embeddings[list(answer)][None]], 1))
    words = encode_text(parts.tokenizer, "\n".join(memory.text for memory in every))
    pieces = [words[i : i + TEXT_TOKENS] for i in range(0, len(words), TEXT_TOKENS)]
    pieces = pieces[:: max(1, len(pieces) // TEXTS)][:TEXTS]
    return prompts + [parts.embeddings[list(piece)][None] for piece in pieces]
