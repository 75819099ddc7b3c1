"""The trained parts of TinyAlign as torch modules: connector, compressor and RAG connector.

    cells [B, C, Dv]  --Connector-->     image tokens  [B, T, D]
    (token embeddings [B, N, D], chunks [B, C, N], cells)  --Compressor-->  latents [B, L, d]
    latents [K, L, d] --RagConnector-->  memory tokens [K, C, D]

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
        classifier: the frozen encoder's classifier, [classes, Dv] weight; an encoder may have none.
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
        names = F.normalize(names, dim=-1)
        if len(self.class_names):
            residual, confidence = self.named(pooled)
            names = (1 - confidence) * names + CLASS_TRUST * residual
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


class Projector(nn.Module):
    """Another vision-language model's own connector, behind its encoder's cells."""

    def __init__(self, project: nn.Module) -> None:
        super().__init__()
        self.project = project

    def forward(self, cells: Tensor) -> Tensor:
        """cells f32 [B, 1 + P, Dv] -> image tokens f32 [B, T, D]."""
        tokens: Tensor = self.project(cells[:, 1:])
        return tokens


@dataclass(frozen=True)
class MemoryShape:
    """Sizes of a memory's latents: one for the picture, one for each chunk of the text."""

    width: int = 576  # D, the LM's
    vision_width: int = 1280  # Dv
    latent_width: int = 192  # d
    chunks: int = 4  # C, as many LM tokens does a memory become
    max_text_tokens: int = 48  # N, the longest text that fits
    hidden: int = 64  # of the MLP that weighs a chunk's tokens

    @property
    def latents(self) -> int:
        """L."""
        return 1 + self.chunks


class Compressor(nn.Module):
    """(token embeddings, chunks, cells) -> latents: a resampler with fixed routing.

    Latent 0 reads the picture. Latent 1 + c reads the text tokens of chunk c: their embeddings,
    each with a learned weight, are pooled and projected. (A free Perceiver learned nothing in the
    time that this takes.)
    """

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__()
        self.shape = shape
        self.picture = nn.Linear(shape.vision_width, shape.latent_width)
        self.weigh = nn.Sequential(
            nn.Linear(shape.width, shape.hidden), nn.GELU(), nn.Linear(shape.hidden, 1)
        )
        self.project = nn.Linear(shape.width, shape.latent_width, bias=False)

    def picture_latent(self, cells: Tensor) -> Tensor:
        """cells [B, C, Dv] -> unit vectors [B, d]."""
        pooled = F.layer_norm(cells[:, 0], (self.shape.vision_width,))
        return F.normalize(self.picture(pooled), dim=-1)

    def text_latents(self, token_embeddings: Tensor, members: Tensor) -> Tensor:
        """token embeddings [B, N, D], members [B, C, N] (1 where a token is in a chunk) -> unit
        vectors [B, C, d], zeros for empty chunks."""
        unit = F.normalize(token_embeddings, dim=-1)
        weights = self.weigh(unit * self.shape.width**0.5).squeeze(-1).exp()  # [B, N]
        weights = weights[:, None] * members  # [B, C, N]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
        return F.normalize(self.project(weights @ unit), dim=-1, eps=1e-6)

    def forward(self, token_embeddings: Tensor, members: Tensor, cells: Tensor) -> Tensor:
        """token embeddings [B, N, D], members [B, C, N], cells [B, cells, Dv] -> [B, L, d]."""
        text = self.text_latents(token_embeddings, members)
        return torch.cat([self.picture_latent(cells)[:, None], text], dim=1)


class RagConnector(nn.Module):
    """Latents to memory tokens (the paper's RAG connector, an MLP d -> D -> D with GELU).

    A chunk's latent becomes one LM token: a linear map back into the space of token embeddings,
    and the MLP, which starts at zero, on top. The picture latent goes through an MLP of its own
    into a soft-vocabulary token, of which a learned share is added to the first chunk's token.

    Args:
        shape: sizes.
        vocabulary: soft vocabulary of the picture token.
        radius: length of a memory token, that of a usual token embedding.
    """

    def __init__(self, shape: MemoryShape, vocabulary: SoftVocabulary, radius: float) -> None:
        super().__init__()
        self.shape = shape
        self.vocabulary = vocabulary
        self.radius = nn.Parameter(torch.tensor(float(radius)))
        self.lift = nn.Linear(shape.latent_width, shape.width)
        self.hidden = nn.Linear(shape.latent_width, shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.picture_hidden = nn.Linear(shape.latent_width, shape.width)
        self.picture_out = nn.Linear(shape.width, shape.width)
        self.picture_share = nn.Parameter(torch.zeros(()))
        # Bonus for the next token of a copied sentence after 1, 2, 3 or more equal tokens.
        self.copy_bonus = nn.Parameter(torch.tensor([1.5, 3.0, 4.5]))

    def picture_vector(self, latent: Tensor) -> Tensor:
        """[K, d] -> [K, D], before the soft vocabulary."""
        return self.picture_out(F.gelu(self.picture_hidden(latent)))

    def text_tokens(self, latents: Tensor) -> Tensor:
        """[.., d] -> [.., D]."""
        vectors = self.lift(latents) + self.out(F.gelu(self.hidden(latents)))
        return self.radius * F.normalize(vectors, dim=-1)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents [K, L, d] -> memory tokens [K, C, D], keep [K, C] (False: padding, drop it)."""
        tokens = self.text_tokens(latents[:, 1:])  # [K, C, D]
        picture, _ = self.vocabulary(self.picture_vector(latents[:, :1]))  # [K, 1, D]
        first = tokens[:, :1] + self.picture_share * picture
        keep = latents[:, 1:].abs().sum(-1) > 0.5  # [K, C]; a used latent is a unit vector
        return torch.cat([first, tokens[:, 1:]], dim=1), keep
