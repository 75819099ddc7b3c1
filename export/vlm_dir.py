"""A model directory from somebody else's vision-language model, and what it says beside torch.

There is no memory in it yet: no compressor, no RAG connector, no key recipe and no bank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyalign.export.components import export_component
from tinyalign.export.lm import (
    EMBEDDINGS_NAME,
    embedding_rows,
    lm_spec,
    write_embeddings,
)
from tinyalign.export.model_dir import write_lm, written_files
from tinyalign.export.precisions import Precisions
from tinyalign.export.quality import AnswerReport, calibration_pictures, check_floor
from tinyalign.export.size import BYTES, check_disk
from tinyalign.export.target import replacing
from tinyalign.export.vlm import Vlm, load_vlm
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.files import file_sha256
from tinyalign.runtime.images import Picture, load_for, preprocess
from tinyalign.runtime.manifest import MANIFEST_NAME, ConnectorSpec, Licence, Manifest
from tinyalign.runtime.prompt import build_prompt, embed

QUESTIONS = ("What is in the picture?", "What colour is it?", "How many things are there?")
PICTURES = 8  # to compare on
LIMIT = 16  # tokens of an answer that is compared
ROOM = 512  # tokens of question and answer beside the picture, at least


def write_vlm(
    vlm: Vlm,
    directory: Path,
    precisions: Precisions,
    pictures: Sequence[Picture],
    progress: Callable[[str], None],
) -> None:
    """Write graphs, tables and tokenizer; two or more `pictures` to calibrate with."""
    write_embeddings(vlm.lm, directory / EMBEDDINGS_NAME)
    vlm.tokenizer.save(str(directory / "tokenizer.json"))
    spec = vlm.encoder.image
    pixels = torch.from_numpy(np.stack([preprocess(load_for(p, spec), spec) for p in pictures]))
    progress(f"vision ({precisions.vision})")
    path = directory / "vision.onnx"
    export_component("vision", vlm.encoder.module, path, (pixels,), precisions.vision)
    progress(f"connector ({precisions.connector})")
    path, cells = directory / "connector.onnx", torch.ones(2, *cells_shape(vlm))
    export_component("projector", vlm.connector, path, (cells,), precisions.connector)

    def prompts() -> list[Tensor]:
        return [prompt_rows(vlm, p, q) for p in pictures for q in QUESTIONS]

    path = directory / "lm.onnx"
    write_lm(vlm.lm, path, precisions.lm, context_of(vlm), prompts, progress)


def write_vlm_manifest(
    vlm: Vlm, directory: Path, name: str, precisions: Precisions, quality: dict[str, Any]
) -> Manifest:
    """Write the manifest over all files of the directory as they are now."""
    seen = file_sha256(directory / "vision.onnx") + file_sha256(directory / EMBEDDINGS_NAME)
    own = ("vision", "connector", "lm")
    manifest = Manifest(
        name=name,
        fingerprint=hashlib.sha256(seen.encode()).hexdigest(),
        licences=(Licence("all weights", "see the model's own card", name),),
        image=vlm.encoder.image,
        vision=vlm.encoder.vision,
        connector=ConnectorSpec(vlm.tokens, words=False),
        compressor=None,
        rag_connector=None,
        lm=lm_spec(vlm.lm.config, context_of(vlm)),
        precisions={part: precisions.of(part) for part in own},
        prompt=vlm.prompt,
        files=written_files(directory),
        quality=quality,
    )
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def cells_shape(vlm: Vlm) -> tuple[int, int]:
    """[1 + P, Dv]."""
    return vlm.encoder.vision.cells, vlm.encoder.vision.width


def context_of(vlm: Vlm) -> int:
    """Tokens that the exported language model can hold: 2048, or what it was made for if less."""
    most = int(vlm.lm.config.max_position_embeddings)
    return min(most, max(2048, vlm.tokens + ROOM))


# ---- the same in torch ------------------------------------------------------------------------


@torch.inference_mode()
def prompt_rows(vlm: Vlm, picture: Picture, question: str) -> Tensor:
    """The language model's input f32 [1, N, D] for a picture and a question."""
    spec = vlm.encoder.image
    pixels = torch.from_numpy(preprocess(load_for(picture, spec), spec))[None]
    tokens = vlm.connector(vlm.encoder.module(pixels))[0].numpy()  # [T, D]
    segments = build_prompt(vlm.prompt, vlm.tokenizer, question)
    return torch.from_numpy(embed(segments, embedding_rows(vlm.lm), tokens))[None]


@torch.inference_mode()
def torch_answer(vlm: Vlm, picture: Picture, question: str, limit: int) -> list[int]:
    """Greedy tokens in torch, at most `limit`, without the one that ends the answer."""
    stop = {vlm.tokenizer.token_to_id(word) for word in vlm.prompt.stop}
    table = torch.from_numpy(embedding_rows(vlm.lm))
    ids: list[int] = []
    output = vlm.lm(inputs_embeds=prompt_rows(vlm, picture, question), use_cache=True)
    while (token := int(output.logits[0, -1].argmax())) not in stop:
        ids.append(token)
        if len(ids) == limit:
            break
        step = F.embedding(torch.tensor([[token]]), table)
        output = vlm.lm(inputs_embeds=step, past_key_values=output.past_key_values, use_cache=True)
    return ids


def compare(vlm: Vlm, model: TinyAlign, pictures: Sequence[Picture]) -> AnswerReport:
    """Greedy answers of the exported model beside torch's; tokens count as the same up to the first
    that differs."""
    equal = tokens = same = 0
    for picture in pictures:
        for question in QUESTIONS:
            told = model.ask(picture, question, max_tokens=LIMIT).token_ids
            expected = torch_answer(vlm, picture, question, LIMIT)
            pairs = enumerate(zip(told, expected, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), min(len(told), len(expected)))
            equal += list(told) == expected
            same, tokens = same + first, tokens + max(len(told), len(expected))
    return AnswerReport(len(pictures) * len(QUESTIONS), equal, tokens, same)


def export_vlm(
    source: Path,
    target: Path,
    precisions: Precisions,
    accepted: bool,
    progress: Callable[[str], None],
) -> tuple[AnswerReport, int]:
    """Read, write and compare; the comparison and the model's bytes. Raises InputError.

    `accepted`: whether fewer answers than the floor may be those of torch (`quality.FLOOR`).
    """
    progress(f"loading {source}")
    vlm = load_vlm(source)
    needed = 2 * embedding_rows(vlm.lm).size
    for part, module in parts_of(vlm).items():
        bytes_a_weight = BYTES["fp32" if precisions.of(part) == "fp16" else precisions.of(part)]
        needed += int(bytes_a_weight * sum(p.numel() for p in module.parameters()))
    check_disk(target, needed)
    pictures = calibration_pictures(target / "none")[:PICTURES]
    with replacing(target) as draft:
        write_vlm(vlm, draft, precisions, pictures, progress)
        write_vlm_manifest(vlm, draft, source.resolve().name, precisions, {})
        progress(f"comparing answers to {len(pictures) * len(QUESTIONS)} questions")
        with TinyAlign.load(draft) as model:
            measured = compare(vlm, model, pictures)
        check_floor(measured, accepted)
        quality = {"answers": measured.to_dict()}
        name = source.resolve().name
        manifest = write_vlm_manifest(vlm, draft, name, precisions, quality)
    return measured, sum(entry.bytes for entry in manifest.files)


def parts_of(vlm: Vlm) -> dict[str, nn.Module]:
    """The modules by the names of their components."""
    return {"vision": vlm.encoder.module, "connector": vlm.connector, "lm": vlm.lm}
