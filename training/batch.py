"""Episodes to tensors: one picture, its memories and several questions that share them.

The questions of an episode do not see each other. They share the prefix (picture and memories),
which is computed once; each question and its answer attends to the prefix and to itself, at the
positions it has when it is asked alone. So training sees exactly the token sequences that the
runtime sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tinyalign.runtime.manifest import MemoryMode, PromptSpec
from tinyalign.runtime.memory_text import MemoryText, copies, read_memory
from tinyalign.runtime.prompt import (
    ImageSegment,
    MemorySegment,
    TokenSegment,
    build_prompt,
    encode_template,
    encode_text,
)
from tinyalign.training.modules import Compressor, MemoryShape, RagConnector


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
    mode: MemoryMode = "latent"  # as what the language model reads the memories


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
    memory_ids: Tensor  # [K, N'] token ids, 0-padded
    members: Tensor  # [K, C, N'] 1 where a token is in a chunk
    chunk_places: Tensor  # [M] where each chunk's token goes, flat indices into B * N
    chunk_rows: Tensor  # [M] which chunk it is, flat indices into K * C
    copies: Copies  # bonuses for copying, see runtime.memory_text

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        moved = {
            item.name: getattr(self, item.name).to(device)
            for item in fields(self)
            if item.name != "copies"
        }
        places = (self.copies.rows, self.copies.ids, self.copies.lengths)
        return Batch(**moved, copies=Copies(*(tensor.to(device) for tensor in places)))


@dataclass
class Copies:
    """What an answer that repeats a memory would say next: a bonus on some logits of the rows that
    have a label (counted in that order)."""

    rows: Tensor  # [S]
    ids: Tensor  # [S]
    lengths: Tensor  # [S] tokens that were equal before, less one


def text_input(
    texts: Sequence[MemoryText], shape: MemoryShape, longest: int
) -> tuple[Tensor, Tensor]:
    """Token ids [n, longest], 0 behind the text, and members [n, C, longest] for the compressor."""
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    members = torch.zeros(len(texts), shape.chunks, longest)
    for k, text in enumerate(texts):
        ids[k, : len(text.ids)] = torch.tensor(text.ids)
        for c, span in enumerate(text.members):
            members[k, c, span.start : span.stop] = 1
    return ids, members


def make_batch(
    episodes: Sequence[Episode], spec: PromptSpec, tokenizer: Tokenizer, shape: MemoryShape
) -> Batch:
    """Tokenize, place and pad."""
    stop = encode_template(tokenizer, spec.stop[0])
    rows: list[
        tuple[list[int], list[int], list[int], list[int]]
    ] = []  # ids, positions, labels, block
    image: list[list[int]] = []
    texts: list[MemoryText] = []  # of all memories
    chunks: list[tuple[int, int, int]] = []  # (episode, place, number of the chunk)
    memory_rows: list[int] = []
    copied: list[tuple[int, int, int]] = []  # (label, token, length)
    labelled = 0
    for number, episode in enumerate(episodes):
        ids: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        block: list[int] = []
        places: list[int] = []
        prefix = 0
        read = [
            read_memory(tokenizer, memory.text, shape.max_text_tokens, shape.chunks)
            for memory in episode.memories
        ]
        sentences = [sentence for text in read for sentence in text.to_copy()]
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
                        text = read[segment.index]
                        if episode.mode != "text":
                            first = shape.chunks * len(texts)
                            for c in range(len(text.chunks)):
                                chunks.append((number, len(ids) + c, first + c))
                            ids += [0] * len(text.chunks)
                            texts.append(text)
                            memory_rows.append(episode.memories[segment.index].row)
                        if episode.mode != "latent":
                            ids += text.ids
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
            for place in range(len(answer)):
                length, found = copies(answer[:place], sentences, len(spec.copy_bonus))
                copied += [(labelled + place, token, length - 1) for token in sorted(found)]
            labelled += len(answer)
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

    longest = max((len(text.ids) for text in texts), default=1)
    memory_ids, members = text_input(texts, shape, longest)
    labels_of, tokens_of, lengths = torch.tensor(copied, dtype=torch.long).reshape(-1, 3).unbind(1)
    return Batch(
        ids_t, positions_t, mask, labels_t,
        image_places=torch.tensor([e * width + p for e, ps in enumerate(image) for p in ps]),
        image_rows=torch.tensor([episode.row for episode in episodes]),
        memory_rows=torch.tensor(memory_rows, dtype=torch.long),
        memory_ids=memory_ids,
        members=members,
        chunk_places=torch.tensor([e * width + p for e, p, _ in chunks], dtype=torch.long),
        chunk_rows=torch.tensor([row for *_, row in chunks], dtype=torch.long),
        copies=Copies(labels_of, tokens_of, lengths),
    )  # fmt: skip


def embed_batch(
    batch: Batch,
    image: Tensor,
    memory_cells: Tensor,
    embeddings: Tensor,
    compressor: Compressor,
    rag_connector: RagConnector,
    image_keep: Tensor | None = None,
) -> Tensor:
    """The LM's input [B, N, D]: text, image tokens and memory tokens at their places.

    Args:
        batch: of B episodes with K memories.
        image: the connector's tokens [B, T, D] for the pictures asked about.
        memory_cells: [K, C, Dv] of the memories' pictures.
        embeddings: the LM's token embeddings [V, D].
        compressor, rag_connector: the parts.
        image_keep: [B] 0 where the picture's tokens are blanked (dropout), else 1.
    """
    count, width = batch.ids.shape
    flat = F.embedding(batch.ids, embeddings).float().flatten(0, 1)  # [B * N, D]
    if image_keep is not None:
        image = image * image_keep[:, None, None]
    flat = flat.index_copy(0, batch.image_places, image.flatten(0, 1))
    if len(batch.memory_rows):
        text = F.embedding(batch.memory_ids, embeddings).float()  # [K, N', D]
        tokens, _ = rag_connector(compressor(text, batch.members, memory_cells))  # [K, C, D]
        flat = flat.index_copy(0, batch.chunk_places, tokens.flatten(0, 1)[batch.chunk_rows])
    return flat.view(count, width, -1)


def answer_loss(
    lm: PreTrainedModel, inputs: Tensor, batch: Batch, copy_bonus: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of the answer tokens in nats; `copy_bonus` [3] is the RAG connector's."""
    return F.cross_entropy(*answer_logits(lm, inputs, batch, copy_bonus))


def attention_masks(
    config: PretrainedConfig, batch: Batch, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """What every token may attend to, [B, 1, N, N] of 0 and -inf; by kind of layer in models where
    some layers only see the last `sliding_window` tokens."""
    full = batch.mask.to(dtype)
    window = getattr(config, "sliding_window", None)
    if window is None:
        return full
    far = batch.positions[:, :, None] - batch.positions[:, None, :] >= window  # [B, N, N]
    sliding = full.masked_fill(far[:, None], torch.finfo(dtype).min)
    if getattr(config, "layer_types", None) is None:  # Phi-3: all layers
        return sliding
    return {"full_attention": full, "sliding_attention": sliding}


def answer_logits(
    lm: PreTrainedModel, inputs: Tensor, batch: Batch, copy_bonus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [S, V] of all answer tokens of a batch and what they are to be [S].

    Only the rows that have a label go through the head.
    """
    hidden = lm.model(
        inputs_embeds=inputs,
        attention_mask=attention_masks(lm.config, batch, inputs.dtype),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    wanted = batch.labels >= 0
    logits = lm.lm_head(hidden[wanted]).float()
    if cap := getattr(lm.config, "final_logit_softcapping", None):  # Gemma's
        logits = cap * torch.tanh(logits / cap)
    if copy_bonus is not None:
        places = (batch.copies.rows, batch.copies.ids)
        logits = logits.index_put(places, copy_bonus[batch.copies.lengths], accumulate=True)
    return logits, batch.labels[wanted]
