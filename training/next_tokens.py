"""What most often follows each token: guesses for decoding, which never change an answer.

The language model is asked once for every token of its vocabulary, as if the token were the first
of an answer to an empty prompt.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tinyalign.runtime.manifest import NEXT_TOKENS
from tinyalign.runtime.prompt import encode_template
from tinyalign.training.parts import Parts

BATCH = 256


@torch.inference_mode()
def next_tokens(parts: Parts) -> NDArray[np.uint32]:
    """The model's likeliest token after each one, [V]."""
    before = encode_template(parts.tokenizer, parts.prompt.question.split("{question}")[1])
    vocab = parts.lm.config.vocab_size
    prefix = parts.lm(torch.tensor([before]), use_cache=True).past_key_values
    found = []
    for start in range(0, vocab, BATCH):
        tokens = torch.arange(start, min(start + BATCH, vocab))[:, None]  # [B, 1]
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(tokens))
        logits = parts.lm(tokens, past_key_values=cache).logits[:, -1]  # [B, V]
        found.append(logits.argmax(-1).numpy().astype(np.uint32))
        if start % (16 * BATCH) == 0:
            print(f"next tokens: {start} of {vocab}", file=sys.stderr, flush=True)
    return np.concatenate(found)


def write_next_tokens(parts: Parts, directory: Path) -> None:
    """Write the table as raw little-endian numbers of 32 bits into a weights directory."""
    next_tokens(parts).astype("<u4").tofile(directory / NEXT_TOKENS)
