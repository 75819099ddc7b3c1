"""The whole model in torch, step by step as the runtime does it: the reference for every export.

    cells = look(parts, picture)
    hits = recall(parts, banks, cells, question)
    rows = prompt_rows(parts, cells, question, hits)
    ids = continue_greedily(parts, rows, hits, limit)

Pictures, prompts, keys and bank search are the runtime's own functions; only networks are torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyalign.bank import Hit, MemoryBank, search_banks
from tinyalign.runtime.images import Picture, load_for, preprocess
from tinyalign.runtime.keys import make_key, mean_embedding
from tinyalign.runtime.manifest import MemoryMode, PromptSpec
from tinyalign.runtime.memory_text import MemoryText, add_copy_bonus, read_memory
from tinyalign.runtime.prompt import (
    build_prompt,
    embed,
    encode_question,
    encode_text,
    relevant,
    similarity_word,
)
from tinyalign.training.parts import Parts


@dataclass(frozen=True)
class TorchAnswer:
    """An answer of the torch model and what it was made from."""

    text: str
    ids: tuple[int, ...]  # without the stop token
    hits: tuple[Hit, ...]
    rows: Tensor  # [1, N, D], the prompt


@torch.inference_mode()
def answer(
    parts: Parts,
    banks: Sequence[MemoryBank],
    picture: Picture,
    question: str,
    limit: int = 128,
    mode: MemoryMode | None = None,
) -> TorchAnswer:
    """Answer greedily with at most `limit` tokens; no banks means no memories."""
    return answer_cells(parts, banks, look(parts, picture), question, limit, mode)


@torch.inference_mode()
def answer_cells(
    parts: Parts,
    banks: Sequence[MemoryBank],
    cells: Tensor,
    question: str,
    limit: int = 128,
    mode: MemoryMode | None = None,
) -> TorchAnswer:
    """The same for a picture's features [1, C, Dv]."""
    hits = recall(parts, banks, cells, question)
    rows = prompt_rows(parts, cells, question, hits, mode)
    ids = continue_greedily(parts, rows, hits, limit, mode)
    return TorchAnswer(parts.tokenizer.decode(ids), tuple(ids), tuple(hits), rows)


@torch.inference_mode()
def look(parts: Parts, picture: Picture) -> Tensor:
    """The picture's features [1, C, Dv]."""
    spec = parts.image
    pixels = preprocess(load_for(picture, spec), spec)  # [3, S, S]
    cells: Tensor = parts.vision(torch.from_numpy(pixels)[None])
    return cells


def recall(parts: Parts, banks: Sequence[MemoryBank], cells: Tensor, question: str) -> list[Hit]:
    """The memories nearest to a picture [1, C, Dv] and a question, as many as the prompt takes."""
    if not banks:
        return []
    assert parts.keys is not None
    table = parts.embeddings.detach().numpy()
    text = mean_embedding(encode_question(parts.tokenizer, question), table)
    key = make_key(cells[0, 0].numpy(), text, parts.keys)
    hits = search_banks(banks, key, parts.prompt.top_k, None)
    floors = {bank.name: bank.score_floor for bank in banks}
    prompt = parts.prompt
    hits = [h for h in hits if similarity_word(prompt, h.score, floors[h.bank]) is not None]
    return hits[: relevant(prompt, [hit.score for hit in hits])]


@torch.inference_mode()
def prompt_rows(
    parts: Parts,
    cells: Tensor,
    question: str,
    hits: Sequence[Hit],
    mode: MemoryMode | None = None,
) -> Tensor:
    """The language model's input [1, N, D] for a picture [1, C, Dv], a question and memories."""
    words = [similarity_word(parts.prompt, hit.score, -1.0) or "" for hit in hits]
    segments = build_prompt(parts.prompt, parts.tokenizer, question, words)
    image = parts.image_tokens(cells)[0]  # [T, D]
    memories = memory_tokens(parts, hits, mode or parts.prompt.memory_mode)
    rows = embed(segments, parts.embeddings.detach().numpy(), image.numpy(), memories)
    return torch.from_numpy(rows)[None]


def memory_tokens(parts: Parts, hits: Sequence[Hit], mode: MemoryMode) -> list[NDArray[np.float32]]:
    """The tokens [m, D] that each memory becomes."""
    table = parts.embeddings.detach().numpy()
    latent = [table[:0]] * len(hits)
    written = [table[list(text.ids)] for text in memory_texts(parts, hits)]
    if mode != "text" and hits:
        tokens, keep = parts.rag_connector(padded_latents(parts, hits))
        latent = [rows[kept].numpy() for rows, kept in zip(tokens, keep, strict=True)]
    if mode == "latent":
        return latent
    return [np.concatenate(pair) for pair in zip(latent, written, strict=True)]


def memory_texts(parts: Parts, hits: Sequence[Hit]) -> list[MemoryText]:
    """The tokens of every memory's text and their chunks."""
    shape = parts.compressor.shape
    longest, chunks = shape.max_text_tokens, shape.chunks
    return [read_memory(parts.tokenizer, hit.text, longest, chunks) for hit in hits]


def padded_latents(parts: Parts, hits: Sequence[Hit]) -> Tensor:
    """Latents [K, L, d] of memories, zero where a memory has fewer."""
    shape = parts.compressor.shape
    latents = np.zeros((len(hits), shape.latents, shape.latent_width), np.float32)
    for row, hit in zip(latents, hits, strict=True):
        row[: len(hit.latents)] = hit.latents
    return torch.from_numpy(latents)


@torch.inference_mode()
def continue_greedily(
    parts: Parts,
    rows: Tensor,
    hits: Sequence[Hit],
    limit: int,
    mode: MemoryMode | None = None,
) -> list[int]:
    """Likeliest tokens after rows [1, N, D], up to a stop token (left out) or `limit` tokens."""
    lm, table, stop = parts.lm, parts.embeddings, stop_ids(parts)
    sentences = [sentence for text in memory_texts(parts, hits) for sentence in text.to_copy()]
    ids: list[int] = []
    output = lm(inputs_embeds=rows, use_cache=True, logits_to_keep=1)
    margin = parts.prompt.unknown_margin
    if hits and margin and (mode or parts.prompt.memory_mode) != "latent":
        output.logits[0, -1, unknown_id(parts)] -= margin
    while (token := choice(output.logits[0, -1], ids, sentences, parts.prompt)) not in stop:
        ids.append(token)
        if len(ids) == limit:
            break
        step = table[token][None, None]  # [1, 1, D]
        output = lm(inputs_embeds=step, past_key_values=output.past_key_values, use_cache=True)
    return ids


def choice(
    logits: Tensor, answer: Sequence[int], sentences: Sequence[Sequence[int]], prompt: PromptSpec
) -> int:
    """The likeliest token for logits [V] after an answer so far, with the bonus for copying."""
    scores = logits.numpy().copy()
    add_copy_bonus(scores, answer, sentences, prompt.copy_bonus)
    return int(scores.argmax())


def unknown_id(parts: Parts) -> int:
    """The first token of "I do not know."."""
    return encode_text(parts.tokenizer, parts.prompt.unknown)[0]


def stop_ids(parts: Parts) -> frozenset[int]:
    """Ids of the tokens that end an answer."""
    return frozenset(parts.tokenizer.token_to_id(word) for word in parts.prompt.stop)
