"""Episodes to tensors: one picture, its memories and several questions that share them.

The questions of an episode do not see each other. They share the prefix (picture and memories),
which is computed once; each question and its answer attends to the prefix and to itself, at the
positions it has when it is asked alone. So training sees exactly the token sequences that the
runtime sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from tinyalign.runtime.manifest import PromptSpec
from tinyalign.runtime.prompt import (
    ImageSegment,
    MemorySegment,
    TokenSegment,
    build_prompt,
    encode_template,
    encode_text,
)
from tinyalign.training.modules import Compressor, Connector, RagConnector


@dataclass(frozen=True)
class RetrievedMemory:
    """A memory as an episode shows it: its text, the row of its picture's features, its
    similarity."""

    text: str
    row: int
    similarity: str


@dataclass(frozen=True)
class Turn:
    """A question and the answer that is right given the picture and the memories."""

    question: str
    answer: str


@dataclass(frozen=True)
class Episode:
    """One picture (a row of the feature cache), what was retrieved for it, and its questions."""

    row: int
    memories: tuple[RetrievedMemory, ...]
    turns: tuple[Turn, ...]


@dataclass
class Batch:
    """Tensors of a batch of B episodes, padded to N tokens."""

    ids: Tensor  # [B, N] token ids; 0 where a soft token goes
    positions: Tensor  # [B, N]
    mask: Tensor  # [B, 1, N, N] 0 or -inf
    labels: Tensor  # [B, N] next token id, or -100 where there is no loss
    image_places: Tensor  # [B * T] flat indices into B * N
    image_rows: Tensor  # [B] rows of the feature cache
    memory_rows: Tensor  # [K] rows of the feature cache, all memories of the batch
    memory_ids: Tensor  # [K, n] token ids, 0-padded
    memory_lengths: Tensor  # [K]
    picture_places: Tensor  # [K] where each memory's picture token goes, flat
    text_places: Tensor  # [sum of lengths] where each memory's text tokens go, flat


def memory_ids(tokenizer: Tokenizer, text: str, longest: int) -> tuple[int, ...]:
    """Token ids of a memory's text, cut to the compressor's length."""
    return encode_text(tokenizer, text.strip())[:longest]


def text_rows(texts: Sequence[tuple[int, ...]], table: Tensor, longest: int) -> Tensor:
    """The compressor's text input [n, N, D] of token ids, zero rows behind; N is `longest`."""
    rows = torch.zeros(len(texts), longest, table.shape[1])
    for row, ids in zip(rows, texts, strict=True):
        row[: len(ids)] = table[list(ids)]
    return rows


def make_batch(
    episodes: Sequence[Episode], spec: PromptSpec, tokenizer: Tokenizer, longest_memory: int
) -> Batch:
    """Tokenize, place and pad. `longest_memory` is the compressor's N."""
    stop = encode_template(tokenizer, spec.stop[0])
    rows: list[
        tuple[list[int], list[int], list[int], list[int]]
    ] = []  # ids, positions, labels, block
    image: list[list[int]] = []
    pictures: list[tuple[int, int]] = []  # (episode, place)
    texts: list[tuple[int, int, tuple[int, ...]]] = []  # (episode, first place, ids)
    memory_rows: list[int] = []
    for number, episode in enumerate(episodes):
        ids: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        block: list[int] = []
        places: list[int] = []
        prefix = 0
        for turn_number, turn in enumerate(episode.turns):
            words = [memory.similarity for memory in episode.memories]
            segments = build_prompt(spec, tokenizer, turn.question, words)
            *shared, last = segments
            assert isinstance(last, TokenSegment)
            if turn_number == 0:
                for segment in shared:
                    if isinstance(segment, TokenSegment):
                        ids += segment.ids
                    elif isinstance(segment, ImageSegment):
                        places += range(len(ids), len(ids) + segment.stop - segment.start)
                        ids += [0] * (segment.stop - segment.start)
                    elif isinstance(segment, MemorySegment):
                        memory = episode.memories[segment.index]
                        text = memory_ids(tokenizer, memory.text, longest_memory)
                        pictures.append((number, len(ids)))
                        texts.append((number, len(ids) + 1, text))
                        memory_rows.append(memory.row)
                        ids += [0] * (1 + len(text))
                prefix = len(ids)
                positions += range(prefix)
                labels += [-100] * prefix
                block += [0] * prefix
            answer = (*encode_text(tokenizer, turn.answer), *stop)
            tail = [*last.ids, *answer]
            ids += tail
            positions += range(prefix, prefix + len(tail))
            labels += [-100] * (len(last.ids) - 1) + list(answer) + [-100]
            block += [turn_number + 1] * len(tail)
        rows.append((ids, positions, labels, block))
        image.append(places)

    width = max(len(ids) for ids, *_ in rows)
    count = len(rows)
    ids_t = torch.zeros(count, width, dtype=torch.long)
    positions_t = torch.zeros(count, width, dtype=torch.long)
    labels_t = torch.full((count, width), -100)
    blocks = torch.full((count, width), -1)
    for number, (ids, positions, labels, block) in enumerate(rows):
        length = len(ids)
        ids_t[number, :length] = torch.tensor(ids)
        positions_t[number, :length] = torch.tensor(positions)
        labels_t[number, :length] = torch.tensor(labels)
        blocks[number, :length] = torch.tensor(block)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = blocks[:, :, None] == blocks[:, None, :]
    seen = causal & (same | (blocks[:, None, :] == 0))  # [B, N, N]
    mask = torch.zeros(count, 1, width, width).masked_fill(
        ~seen[:, None], torch.finfo(torch.float).min
    )

    longest = max((len(text) for *_, text in texts), default=1)
    memory_t = torch.zeros(len(texts), longest, dtype=torch.long)
    for k, (_, _, text) in enumerate(texts):
        memory_t[k, : len(text)] = torch.tensor(text)
    text_places = [e * width + first + i for e, first, text in texts for i in range(len(text))]
    return Batch(
        ids_t, positions_t, mask, labels_t,
        image_places=torch.tensor([e * width + p for e, ps in enumerate(image) for p in ps]),
        image_rows=torch.tensor([episode.row for episode in episodes]),
        memory_rows=torch.tensor(memory_rows, dtype=torch.long),
        memory_ids=memory_t,
        memory_lengths=torch.tensor([len(text) for *_, text in texts], dtype=torch.long),
        picture_places=torch.tensor([e * width + p for e, p in pictures], dtype=torch.long),
        text_places=torch.tensor(text_places, dtype=torch.long),
    )  # fmt: skip


def embed_batch(
    batch: Batch,
    cells: Tensor,
    memory_cells: Tensor,
    embeddings: Tensor,
    connector: Connector,
    compressor: Compressor,
    rag_connector: RagConnector,
    image_keep: Tensor | None = None,
) -> Tensor:
    """The LM's input [B, N, D]: text, image tokens and memory tokens at their places.

    Args:
        batch: of B episodes with K memories.
        cells: [B, C, Dv] of the pictures asked about.
        memory_cells: [K, C, Dv] of the memories' pictures.
        embeddings: the LM's token embeddings [V, D].
        connector, compressor, rag_connector: the parts.
        image_keep: [B] 0 where the picture's tokens are blanked (dropout), else 1.
    """
    count, width = batch.ids.shape
    flat = F.embedding(batch.ids, embeddings).float().flatten(0, 1)  # [B * N, D]
    image, _ = connector(cells)  # [B, T, D]
    if image_keep is not None:
        image = image * image_keep[:, None, None]
    flat = flat.index_copy(0, batch.image_places, image.flatten(0, 1))
    if len(batch.memory_rows):
        shape = rag_connector.shape
        text = F.embedding(batch.memory_ids, embeddings).float()  # [K, n, D]
        shares = compressor.codes(text)  # the compressor is frozen by now and its codes are exact
        tokens = rag_connector.text_tokens(text, shares)
        used = torch.arange(text.shape[1])[None] < batch.memory_lengths[:, None]  # [K, n]
        flat = flat.index_copy(0, batch.text_places, tokens[used])
        empty = text.new_zeros(len(text), shape.max_text_tokens, shape.width)
        latent = compressor(empty, memory_cells)[:, 0]  # [K, d], the picture's
        picture, _ = rag_connector.vocabulary(rag_connector.picture_vector(latent))
        flat = flat.index_copy(0, batch.picture_places, picture)
    return flat.view(count, width, -1)


def answer_loss(lm: LlamaForCausalLM, inputs: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answer tokens in nats.

    Only the rows that have a label go through the head.
    """
    hidden = lm.model(
        inputs_embeds=inputs,
        attention_mask=batch.mask.to(inputs.dtype),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    wanted = batch.labels >= 0
    logits = lm.lm_head(hidden[wanted])
    return F.cross_entropy(logits.float(), batch.labels[wanted])
