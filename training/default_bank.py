"""The bank a model ships with: the class prototypes and the training pictures, with names and
glosses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tinyalign.bank import Bank, NewMemory, content_hash
from tinyalign.runtime.memory_text import read_memory
from tinyalign.training.batch import text_input
from tinyalign.training.features import Record
from tinyalign.training.fingerprint import fingerprint_of
from tinyalign.training.world import World, cells_of

CHUNK = 256


def build_bank(world: World, path: Path, thumbnails: Mapping[str, bytes]) -> None:
    """Write the world's memories as a sealed bank file, replacing one that is there.

    `thumbnails`: small pictures by picture id, as far as there are any.
    """
    parts = world.parts
    assert parts.keys is not None
    path.unlink(missing_ok=True)
    shape = parts.compressor.shape
    with Bank.create(
        path,
        fingerprint_of(parts),
        parts.keys.width,
        shape.latent_width,
        "default",
        parts.prompt.similarity[-1][1],
    ) as bank:
        for start in range(0, len(world.bank), CHUNK):
            rows = [int(row) for row in world.bank[start : start + CHUNK]]
            texts = world.bank_texts[start : start + CHUNK]
            latents = latents_of(world, rows, texts)
            memories = []
            for offset, (row, text) in enumerate(zip(rows, texts, strict=True)):
                record = world.records[row]
                thumbnail = thumbnails.get(record.id)
                memories.append(
                    NewMemory(
                        key=world.bank_keys[start + offset],
                        latents=latents[offset],
                        text=text,
                        source=source_of(record),
                        metadata=metadata_of(record),
                        thumbnail=thumbnail,
                        content_hash=content_hash(record.id.encode(), text),
                    )
                )
            bank.add(memories)
        bank.seal()


def metadata_of(record: Record) -> dict[str, str]:
    """Name and kind, of a picture from `--data` its concept."""
    if record.source == "llava":
        return {"concept": record.concept}
    return {"name": record.name, "kind": record.kind}


def source_of(record: Record) -> str:
    """Where a picture is from: package and file, licence, maker where the licence asks for one."""
    licence = "Apache-2.0" if record.source == "prototypes" else record.licence
    return ", ".join(part for part in (record.id, licence, record.creator) if part)


@torch.inference_mode()
def latents_of(world: World, rows: Sequence[int], texts: Sequence[str]) -> list[np.ndarray]:
    """Used latents of some memories, each f32 [1 + its chunks, d]."""
    parts = world.parts
    shape = parts.compressor.shape
    read = [read_memory(parts.tokenizer, t, shape.max_text_tokens, shape.chunks) for t in texts]
    ids, members = text_input(read, shape, shape.max_text_tokens)
    words = F.embedding(ids, parts.embeddings.float())
    latents = parts.compressor(words, members, cells_of(world, rows)).numpy()
    return [rows[: 1 + len(text.chunks)] for rows, text in zip(latents, read, strict=True)]
