"""The trained parts of TinyAlign as torch modules: connector, compressor and RAG connector.

    cells [B, C, Dv]  --Connector-->     image tokens  [B, T, D]
    (token embeddings [B, N, D], cells)  --Compressor-->  latents [B, L, d]
    latents [K, L, d] --RagConnector-->  memory tokens [K, M, D]

Both connectors speak in *soft-vocabulary tokens*: what enters the language model (LM) is a mixture
of the LM's own token embeddings, so a frozen LM can read it at once and a person can read it as
words. The shapes and their names follow TinyAlign (arXiv 2505.12884, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COSINE_SCALE = 30.0  # sharpness of the soft vocabulary: softmax(30 * cosine)
CLASS_TRUST = 2.0  # weight of the encoder's own classes among the name slots
DROPOUT = 0.2  # in the connector, while it trains


@dataclass(frozen=True)
class ConnectorShape:
    """Sizes of the connector. `name_slots` image tokens spell a name, the others one attribute
    each."""

    cells: int = 10  # C: one global cell and 3 x 3 cells
    vision_width: int = 1280  # Dv
    width: int = 576  # D, the LM's
    hidden: int = 768
    cell_width: int = 64  # every 3 x 3 cell is first brought down to this
    name_slots: int = 4
    attribute_slots: int = 4  # kind, colour, number, place

    @property
    def tokens(self) -> int:
        """T, the number of image tokens."""
        return self.name_slots + self.attribute_slots


class SoftVocabulary(nn.Module):
    """h [.., D] -> (mixture of token embeddings [.., D], id of the nearest token [..])."""

    embeddings: Tensor  # [Vs, D]
    unit: Tensor  # [Vs, D], of length one
    ids: Tensor  # [Vs], ids in the LM's vocabulary

    def __init__(self, embeddings: Tensor, ids: Tensor) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings.float(), persistent=False)
        self.register_buffer("unit", F.normalize(embeddings.float(), dim=-1), persistent=False)
        self.register_buffer("ids", ids.long(), persistent=False)

    def logits(self, h: Tensor) -> Tensor:
        """[.., D] -> [.., Vs], scaled cosine to every token of the vocabulary."""
        return COSINE_SCALE * (F.normalize(h, dim=-1) @ self.unit.T)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(h)
        return logits.softmax(dim=-1) @ self.embeddings, self.ids[logits.argmax(dim=-1)]


class Connector(nn.Module):
    """Picture features to image tokens.

    A two-layer MLP over the global cell and the 3 x 3 cells gives one vector per slot. The name
    slots
    also get a residual: the encoder's own class probabilities mixed with the class names' token
    embeddings, so a confident photograph is named from the first step. The MLP's say in a name
    shrinks as the encoder's confidence grows: it has only seen renders and drawings, and
    photographs fool it.

    Args:
        shape: sizes.
        vocabulary: the soft vocabulary.
        classifier: the frozen encoder's classifier, [classes, Dv] weight.
        classifier_bias: [classes].
        class_names: [classes, name_slots] indices into the soft vocabulary.
    """

    classifier: Tensor
    classifier_bias: Tensor
    class_names: Tensor

    def __init__(
        self,
        shape: ConnectorShape,
        vocabulary: SoftVocabulary,
        classifier: Tensor,
        classifier_bias: Tensor,
        class_names: Tensor,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.vocabulary = vocabulary
        self.register_buffer("classifier", classifier.float(), persistent=False)
        self.register_buffer("classifier_bias", classifier_bias.float(), persistent=False)
        self.register_buffer("class_names", class_names.long(), persistent=False)
        self.cell = nn.Linear(shape.vision_width, shape.cell_width)
        self.norm = nn.LayerNorm(shape.vision_width)
        joined = shape.vision_width + (shape.cells - 1) * shape.cell_width
        self.hidden = nn.Linear(joined, shape.hidden)
        self.slots = nn.Linear(shape.hidden, shape.tokens * shape.width)

    def slot_vectors(self, cells: Tensor) -> Tensor:
        """cells [B, C, Dv] -> one vector per slot [B, T, D], before the soft vocabulary."""
        shape = self.shape
        pooled = cells[:, 0]  # [B, Dv]
        grid = self.cell(self.norm(cells[:, 1:])).flatten(1)  # [B, (C-1) * cell_width]
        joined = F.dropout(torch.cat([self.norm(pooled), grid], dim=-1), DROPOUT, self.training)
        hidden = F.dropout(F.gelu(self.hidden(joined)), DROPOUT, self.training)
        slots = self.slots(hidden).unflatten(-1, (shape.tokens, shape.width))  # [B, T, D]
        names, attributes = slots[:, : shape.name_slots], slots[:, shape.name_slots :]
        residual, confidence = self.named(pooled)
        names = (1 - confidence) * F.normalize(names, dim=-1) + CLASS_TRUST * residual
        return torch.cat([names, attributes], dim=1)

    def named(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """pooled [B, Dv] -> mixed class names [B, name_slots, D], the best class's odds [B, 1,
        1]."""
        odds = (pooled @ self.classifier.T + self.classifier_bias).softmax(dim=-1)  # [B, classes]
        names = self.vocabulary.unit[self.class_names]  # [classes, name_slots, D]
        residual = (odds @ names.flatten(1)).unflatten(-1, names.shape[1:])
        return residual, odds.amax(dim=-1)[:, None, None]

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """cells [B, C, Dv] -> image tokens [B, T, D], ids of the words they read as [B, T]."""
        tokens, ids = self.vocabulary(self.slot_vectors(cells))
        return tokens, ids


@dataclass(frozen=True)
class MemoryShape:
    """Sizes of a memory's latents: one for the picture, the others for the text."""

    width: int = 576  # D, the LM's
    vision_width: int = 1280  # Dv
    latent_width: int = 64  # d
    text_latents: int = 6
    tokens_per_latent: int = 8

    @property
    def latents(self) -> int:
        """L."""
        return 1 + self.text_latents

    @property
    def max_text_tokens(self) -> int:
        """N, the longest text that fits, in LM tokens."""
        return self.text_latents * self.tokens_per_latent

    @property
    def code_width(self) -> int:
        """Width of one text token's share of a latent."""
        return self.latent_width // self.tokens_per_latent

    @property
    def memory_tokens(self) -> int:
        """M, LM tokens one memory can become: one for the picture, one for each text token."""
        return 1 + self.max_text_tokens


class Compressor(nn.Module):
    """(token embeddings, cells) -> latents: a resampler with fixed routing.

    Latent 0 reads the picture. Latent 1 + i reads text tokens 8i .. 8i+7, each through the same
    small projection to the unit sphere, so that the RAG connector can find the very token again
    among the whole vocabulary. (A free Perceiver learned nothing in the time that this takes; see
    docs.)
    """

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__()
        self.shape = shape
        self.picture = nn.Linear(shape.vision_width, shape.latent_width)
        self.code = nn.Linear(shape.width, shape.code_width)

    def codes(self, embeddings: Tensor) -> Tensor:
        """[.., D] -> unit vectors [.., c]."""
        return F.normalize(self.code(embeddings), dim=-1)

    def forward(self, token_embeddings: Tensor, cells: Tensor) -> Tensor:
        """token embeddings [B, N, D] (zero rows are padding), cells [B, C, Dv] -> latents [B, L,
        d]."""
        shape = self.shape
        used = (token_embeddings.abs().sum(-1, keepdim=True) > 0).float()  # [B, N, 1]
        codes = self.codes(token_embeddings) * used  # [B, N, c]
        text = codes.reshape(-1, shape.text_latents, shape.latent_width)
        picture = F.normalize(
            self.picture(F.layer_norm(cells[:, 0], (shape.vision_width,))), dim=-1
        )
        return torch.cat([picture[:, None], text], dim=1)


class RagConnector(nn.Module):
    """Latents to memory tokens (the paper's RAG connector, an MLP d -> D -> D with GELU).

    Every text share of a latent is looked up among the codes of the whole vocabulary; the found
    token's embedding is the base of the memory token and the MLP adds what training finds useful.
    The picture latent goes through an MLP of its own into a soft-vocabulary token.

    Args:
        shape: sizes.
        vocabulary: soft vocabulary of the picture token.
        embeddings: the LM's token embeddings [V, D], frozen.
        codes: the compressor's codes of all of them [V, c], frozen once the compressor is.
    """

    embeddings: Tensor
    code_table: Tensor

    def __init__(
        self, shape: MemoryShape, vocabulary: SoftVocabulary, embeddings: Tensor, codes: Tensor
    ) -> None:
        super().__init__()
        self.shape = shape
        self.vocabulary = vocabulary
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.register_buffer("code_table", codes.float(), persistent=False)
        self.text_hidden = nn.Linear(shape.code_width, shape.width)
        self.text_out = nn.Linear(shape.width, shape.width)
        nn.init.zeros_(self.text_out.weight)
        nn.init.zeros_(self.text_out.bias)
        self.picture_hidden = nn.Linear(shape.latent_width, shape.width)
        self.picture_out = nn.Linear(shape.width, shape.width)

    def picture_vector(self, latent: Tensor) -> Tensor:
        """[K, d] -> [K, D], before the soft vocabulary."""
        return self.picture_out(F.gelu(self.picture_hidden(latent)))

    def text_tokens(self, embeddings: Tensor, shares: Tensor) -> Tensor:
        """The found tokens' embeddings [.., D] and their shares [.., c] -> memory tokens [..,
        D]."""
        return embeddings + self.text_out(F.gelu(self.text_hidden(shares)))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents [K, L, d] -> memory tokens [K, M, D], keep [K, M] (False: padding, drop it)."""
        shape = self.shape
        shares = latents[:, 1:].reshape(-1, shape.max_text_tokens, shape.code_width)  # [K, N, c]
        used = shares.abs().sum(-1) > 0.5  # [K, N]; a used share is a unit vector
        ids = (shares @ self.code_table.T).argmax(dim=-1)  # [K, N]
        text = self.text_tokens(self.embeddings[ids].float(), shares)
        picture, _ = self.vocabulary(self.picture_vector(latents[:, :1]))  # [K, 1, D]
        keep = torch.cat([torch.ones_like(used[:, :1]), used], dim=1)
        return torch.cat([picture, text], dim=1), keep
